"""VAE files: recognised by their names and shapes, in every layout, alone, in a folder or inside a full checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from ..checkpoint_files.header import entries_of
from ..checkpoint_files.vae_part import vae_prefix
from ..distributed.band import Band
from ..distributed.mesh import BandAxes
from ..distributed.patch_layers import place_band_layers
from ..errors import CancelledError, CheckpointError
from .checkpoint import Piece, RenamedSource, check_names
from .left_over import left_over_note
from .opened_file import open_source
from .staging import placing
from .vae import TAESD_SCALES, BandVAE
from .vae_names import kl_module_names, taesd_module_names

_PARTS = ("encoder", "decoder")
_LEVEL = re.compile(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.")


@dataclass
class VAECheckpoint:
    """An opened VAE file (TAESD: two) that is known to be whole.

    Args:
        model: diffusers', without weights.
        sources: the files' tensors by that model's names.
    """

    family: str
    latent_channels: int
    model: Any
    sources: list[RenamedSource]

    def __post_init__(self) -> None:
        """Raises: CheckpointError: a tensor is missing, or of another shape."""
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        check_names(set(self._shapes), self._found, self.file_name)
        for source in self.sources:
            for name in self._shapes.keys() & set(source.names()):
                _check_shape(source, name, self._shapes[name])

    @property
    def file_name(self) -> str:
        return self.sources[0].path.name

    @property
    def _found(self) -> set[str]:
        return {name for source in self.sources for name in source.names()}

    @property
    def note(self) -> str:
        """What of the file is left out; empty if nothing."""
        return left_over_note(self._shapes, self._found, self.file_name)

    @property
    def elements(self) -> int:
        return sum(map(prod, self._shapes.values()))

    @property
    def bytes_read(self) -> int:
        return sum(source.bytes_read for source in self.sources)

    def build(
        self,
        device: torch.device,
        dtype: torch.dtype,
        axes: BandAxes,
        should_stop: Callable[[], bool] = lambda: False,
        told: Callable[[int], object] = lambda nbytes: None,
    ) -> BandVAE:
        """The model with its weights on `device` in `dtype`, layers banded.

        Args:
            told: after each tensor, its bytes.
        Raises: CancelledError: `should_stop` said so.
        """
        place, weights, model = placing(device), {}, self.model
        for source in self.sources:
            for name in filter(self._shapes.__contains__, source.names()):
                if should_stop():
                    raise CancelledError(f"Loading {self.file_name} was cancelled.")
                weights[name] = place(source.read(name).reshape(self._shapes[name]), dtype)
                told(weights[name].nbytes)
        model.load_state_dict(weights, assign=True)
        model.requires_grad_(False).eval()
        band = Band()
        place_band_layers(model.encoder, band)
        place_band_layers(model.decoder, band)
        return BandVAE(model, self.family, self.latent_channels, device, dtype, band, axes)


def open_vae(paths: Sequence[Path]) -> VAECheckpoint:
    """A VAE file or folder or the VAE inside a full checkpoint; for TAESD its encoder and decoder files, in this order.

    Raises: CheckpointError: it holds something else.
    """
    if len(paths) == 2:
        return _open_taesd(paths)
    path = paths[0]
    prefix = vae_prefix(entries_of(path))
    inner = open_source(path, prefix or "")
    if prefix is None or "encoder.conv_in.weight" not in inner.names():
        raise CheckpointError(
            f"{path.name} holds no AutoencoderKL (decoder.conv_in.weight is not there).",
            "Choose the VAE of SD3 or SDXL, or taesd3 / taesdxl.",
        )
    source = RenamedSource(inner, {ours: [Piece(name)] for ours, name in kl_module_names(inner.names()).items()})
    config = _kl_config(source)
    with torch.device("meta"):
        model: Any = AutoencoderKL(**config)
    channels = config["latent_channels"]
    return VAECheckpoint(f"kl-{channels}", channels, model, [source])


def _open_taesd(paths: Sequence[Path]) -> VAECheckpoint:
    family = re.sub(r"_(en|de)coder$", "", paths[1].stem)
    if family not in TAESD_SCALES:
        raise CheckpointError(
            f"{paths[1].name} is of no known TAESD family.",
            f"Known are {', '.join(TAESD_SCALES)} (NAME_decoder.safetensors).",
        )
    opened = [open_source(path) for path in paths]
    if "1.weight" not in opened[1].names():
        raise CheckpointError(f"{paths[1].name} is not a TAESD decoder.", "Use TAESD's own encoder and decoder files.")
    channels = opened[1].shape("1.weight")[1]
    with torch.device("meta"):
        model: Any = AutoencoderTiny(latent_channels=channels)
    sources = []
    for part, inner in zip(_PARTS, opened, strict=True):
        names = taesd_module_names(part, {name: name for name in inner.names()})
        sources.append(RenamedSource(inner, {f"{part}.{ours}": [Piece(name)] for ours, name in names.items()}))
    return VAECheckpoint(family, channels, model, sources)


def _check_shape(source: RenamedSource, name: str, shape: tuple[int, ...]) -> None:
    """Attention's matrices may come as kernels of one cell. Raises: CheckpointError: another shape than that."""
    found = source.shape(name)
    if found[: len(shape)] != shape or set(found[len(shape) :]) - {1}:
        raise CheckpointError(
            f"{source.path.name}: {name} has shape {list(found)}, the model needs {list(shape)}.",
            "The file is damaged, or of a model that this version doesn't know.",
        )


def _kl_config(source: RenamedSource) -> dict[str, Any]:
    """The settings of diffusers' AutoencoderKL. Raises: CheckpointError: no levels to tell them by."""
    names = set(source.names())
    found = {(int(match[1]), int(match[2])) for name in names if (match := _LEVEL.match(name))}
    firsts = [f"encoder.down_blocks.{i}.resnets.0.conv1.weight" for i in range(len({i for i, _ in found}))]
    if not found or not names.issuperset(firsts):
        raise CheckpointError(f"{source.path.name} has not all encoder levels.", "Choose a whole VAE file.")
    return {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": source.shape("decoder.conv_in.weight")[1],
        "block_out_channels": tuple(source.shape(first)[0] for first in firsts),
        "down_block_types": ("DownEncoderBlock2D",) * len(firsts),
        "up_block_types": ("UpDecoderBlock2D",) * len(firsts),
        "layers_per_block": max(j for _, j in found) + 1,
        "use_quant_conv": "quant_conv.weight" in names,
        "use_post_quant_conv": "post_quant_conv.weight" in names,
    }
