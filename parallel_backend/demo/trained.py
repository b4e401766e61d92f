"""Small trained checkpoints: the demo's, and those of own runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from ..checkpoint_files.taesd_files import FAMILIES, taesd_files
from ..client.backend import Backend
from ..client.guidance import settings_of
from ..client.remote import RemoteModel
from ..client.remote_control import ControlUse, RemoteControl
from ..config import MeshSpec, SamplerSpec
from ..errors import CheckpointError
from ..rpc.conditioning import Conditioning
from .captions import SD3_WIDTHS, SDXL_WIDTHS, encode
from .files import CONTROL_FILE, MMDIT_FILE, UNET_FILE, DemoFile, pair, present

# A file on this machine, or one that may have to be fetched first.
Source = Path | DemoFile
SPEC = SamplerSpec(steps=20, cfg_scale=4.0, seed=1)


@dataclass(frozen=True)
class Trained:
    """A checkpoint, the autoencoder of its latents, and how it is sampled.

    Args:
        control: a ControlNet for it, which takes edges.
        channels: of its latents.
        widths: of context and pooled prompt.
        mesh: of two ranks.
    """

    checkpoint: Source
    autoencoder: tuple[Source, Source]
    channels: int
    widths: tuple[int, int]
    spec: SamplerSpec
    mesh: MeshSpec
    control: Source | None = None

    @property
    def path(self) -> Path:
        """Raises: CheckpointError: the demo's file had to be fetched, and could not be."""
        return _on_disk(self.checkpoint)

    @property
    def vae(self) -> tuple[Path, Path]:
        """Encoder and decoder. Raises: CheckpointError: as `path`."""
        encoder, decoder = self.autoencoder
        return _on_disk(encoder), _on_disk(decoder)

    @property
    def control_path(self) -> Path | None:
        """Raises: CheckpointError: as `path`."""
        return None if self.control is None else _on_disk(self.control)

    def net(self, backend: Backend, model: RemoteModel) -> RemoteControl | None:
        """Its ControlNet beside the model there. Raises: CheckpointError: as `path`."""
        path = self.control_path
        return None if path is None else backend.load_control(path, model)

    @property
    def is_unet(self) -> bool:
        return self.widths == SDXL_WIDTHS

    def job(self, captions: Sequence[str], size: int) -> tuple[Tensor, Conditioning, Conditioning]:
        """The empty latent and both prompts of a batch; `size` in pixels.

        Raises: InputError: a caption is outside the grammar.
        """
        sizes = [size, size, 0, 0, size, size] if self.is_unet else None
        positive, negative = (Conditioning(*encode(asked, self.widths), sizes) for asked in (captions, [""]))
        return torch.zeros(len(captions), self.channels, size // 8, size // 8), positive, negative

    def sample(
        self,
        model: RemoteModel,
        captions: Sequence[str],
        size: int,
        controls: Sequence[ControlUse] = (),
        **changed: Any,
    ) -> Tensor:
        """The latents of a batch, by the checkpoint's own settings or others of `spec`."""
        spec = msgspec.structs.replace(self.spec, **changed)
        return model.sample(*self.job(captions, size), controls=controls, **settings_of(spec))


def add_choice(parser: argparse.ArgumentParser) -> None:
    """The options that `chosen` reads."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--model",
        choices=tuple(SHIPPED),
        default="mmdit",
        help="of this pack's small checkpoints; controlnet is the unet along the edges of a picture",
    )
    which.add_argument(
        "--trained",
        type=Path,
        metavar="FOLDER",
        help="of `train mmdit`, `train unet` or `train controlnet`, in their place",
    )


def chosen(args: argparse.Namespace) -> Trained:
    """What those options ask for.

    Raises: CheckpointError: as `trained_in`.
    """
    return trained_in(args.trained) if args.trained else SHIPPED[args.model]


def trained_in(folder: Path) -> Trained:
    """What `parallel-mmdit train mmdit`, `train unet` or `train controlnet` left in a folder.

    Raises: CheckpointError: no such run is there, or not to its end.
    """
    try:
        run = msgspec.json.decode((folder / "run.json").read_bytes(), type=_Run)
    except (OSError, msgspec.MsgspecError) as error:
        raise CheckpointError(
            f"{folder} holds no run of a model ({error}).",
            "Name the --output of `train mmdit`, `train unet` or `train controlnet`.",
        ) from None
    path = folder / f"{run.task}.safetensors"
    if not path.is_file():
        raise CheckpointError(f"The run in {folder} has left no {path.name} yet.", "Let it end; --until ends it early.")
    made, family = (_mmdit, FAMILIES[16]) if run.task == "mmdit" else (_unet, FAMILIES[4])
    autoencoder = taesd_files(Path(run.autoencoder), family)
    if run.task == "controlnet":
        return replace(_unet(Path(run.unet) / "unet.safetensors", autoencoder), control=path)
    return made(path, autoencoder)


class _Run(msgspec.Struct):
    """What `train` writes of its settings, as far as it matters here."""

    task: Literal["mmdit", "unet", "controlnet"]
    autoencoder: str
    unet: str = ""


def _on_disk(file: Source) -> Path:
    return present(file) if isinstance(file, DemoFile) else file


def _mmdit(checkpoint: Source, autoencoder: tuple[Source, Source]) -> Trained:
    return Trained(checkpoint, autoencoder, 16, SD3_WIDTHS, SPEC, MeshSpec(cfg=2))


def _unet(checkpoint: Source, autoencoder: tuple[Source, Source]) -> Trained:
    spec = msgspec.structs.replace(SPEC, scheduler="normal")
    return Trained(checkpoint, autoencoder, 4, SDXL_WIDTHS, spec, MeshSpec(patch=2))


MMDIT = _mmdit(MMDIT_FILE, pair(FAMILIES[16]))
UNET = _unet(UNET_FILE, pair(FAMILIES[4]))
CONTROLNET = replace(UNET, control=CONTROL_FILE)
SHIPPED = {"mmdit": MMDIT, "unet": UNET, "controlnet": CONTROLNET}
