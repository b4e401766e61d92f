"""Which model a file holds, and how it is built: the one list of families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from ..checkpoint_files.diffusion_part import FROM_SCRATCH_MARK, diffusion_entries
from ..checkpoint_files.latent_scales import SD3_SCALE, SD3_SHIFT, SDXL_SCALE, SDXL_SHIFT
from ..config import MMDIT_AXES, MMDIT_REST, UNET_AXES, UNET_REST
from ..distributed.mesh import Mesh
from ..errors import CheckpointError
from .checkpoint import TensorSource
from .fp8_source import FP8Source
from .from_scratch import Block, FromScratch, GridPositions
from .from_scratch_file import from_scratch_config
from .mmdit import JointBlock, MMDiT, MMDiTConfig
from .mmdit_checkpoint import POS_EMBED, PositionTable, mmdit_config, open_mmdit
from .network import Network, TokenNetwork
from .opened_file import open_diffusion
from .unet import BandUNet, UNetConfig, loadable_unet
from .unet_checkpoint import is_unet, open_unet, unet_places


@dataclass(frozen=True)
class Kind:
    """What a family takes, and how its users are told so.

    A VAE's latent becomes the model's by (latent - shift) * scale, numbers for all of its channels or one for each. `prediction` is
    what its output means. `edges`: how the names of the layers begin by which latents come in and go out.
    """

    name: str
    axes: tuple[str, ...]
    rest: str
    scale: float | tuple[float, ...]
    shift: float | tuple[float, ...]
    prediction: str
    latent_remedy: str
    prompt_remedy: str
    edges: tuple[str, ...]

    def to_model(self, latent: Tensor) -> Tensor:
        return (latent - _by_channel(self.shift, latent)) * _by_channel(self.scale, latent)

    def to_vae(self, latent: Tensor) -> Tensor:
        return latent / _by_channel(self.scale, latent) + _by_channel(self.shift, latent)


def _by_channel(values: float | tuple[float, ...], latent: Tensor) -> float | Tensor:
    return latent.new_tensor(values).view(-1, 1, 1) if isinstance(values, tuple) else values


# Sources of the scales: the configurations of SD3's, FLUX's, SDXL's and Playground 2.5's VAE. From-scratch models add the shift last.
SD3 = Kind(
    "mmdit",
    MMDIT_AXES,
    MMDIT_REST,
    SD3_SCALE,
    SD3_SHIFT,
    "flow",
    "Use an SD3 latent, from EmptySD3LatentImage or a VAE of 16 channels.",
    "Encode the prompt with SD3's text encoders (CLIPLoader type sd3).",
    ("x_embedder.", "final_layer."),
)
FROM_SCRATCH = Kind(
    "mmdit",
    MMDIT_AXES,
    MMDIT_REST,
    0.3611,
    -0.1159 / 0.3611,
    "flow",
    SD3.latent_remedy,
    "Use Load Conditioning: Gemma and ModernBERT.",
    ("pos_enc.", "patch_emb.", "out_norm.", "out_proj."),
)
SDXL = Kind(
    "unet",
    UNET_AXES,
    UNET_REST,
    SDXL_SCALE,
    SDXL_SHIFT,
    "eps",
    "Use an SDXL latent, from EmptyLatentImage or a VAE of 4 channels.",
    "Encode the prompt with this model's text encoders: base and refiner have different ones.",
    ("conv_in.", "conv_out."),
)
# Its latents have a standard deviation of a half, EDM's sigma_data.
PLAYGROUND = replace(
    SDXL,
    scale=tuple(0.5 / deviation for deviation in (8.4927, 5.9022, 6.5498, 5.2299)),
    shift=(-1.6574, 1.886, -1.383, 2.5155),
)


# What a model of that kind is read from, where its weights are to be held otherwise than its file has them.
Held: TypeAlias = Callable[[TensorSource, Kind], TensorSource]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class OpenedModel:
    """A file that was recognised.

    Args:
        build: (mesh, kernel) -> a module without weights, whose names are those of `source`.
        network: (that module with its weights, mesh, kernel, device, dtype) -> what is asked.
        unread: (that module) -> names in the file of tensors that its rank doesn't read when it loads: those of other
            stages, and those that are read when they are needed.
        repeated: the block that most of the model is made of; see models/compiled.py.
        place: a single-file name -> the tensor of `source` that holds it, and its first row there.
        later: (network) -> names of `unread` that this rank reads when they are needed, and what is told of another
            tensor in their place, or of None for the file's own.
    """

    source: TensorSource
    config: Any
    kind: Kind
    build: Callable[[Mesh, str], nn.Module]
    network: Callable[[Any, Mesh, str, torch.device, torch.dtype], Network]
    repeated: type[nn.Module]
    unread: Callable[[Any], frozenset[str]] = lambda module: frozenset()
    place: Callable[[str], tuple[str, int]] = lambda name: (name, 0)
    later: Callable[[Any], Mapping[str, Callable[[Tensor | None], None]]] = lambda network: {}


def open_model(path: Path, kind: str = "any", weights: str = "", device: torch.device = CPU) -> OpenedModel:
    """The model at `path`; `kind` is mmdit, unet or any. `weights` is one of WEIGHTS, made on `device`, or empty: see FP8Source.

    Raises: CheckpointError, UnsupportedError: the file holds something else; the message says what.
    """
    names = diffusion_entries(path)

    def held(source: TensorSource, kind: Kind) -> TensorSource:
        return FP8Source(source, weights, kind.edges, device) if weights else source

    if kind != "unet" and FROM_SCRATCH_MARK in names:
        return _open_from_scratch(path, held)
    if kind != "mmdit" and is_unet(names):
        return _open_unet(path, held)
    if kind == "unet":
        raise CheckpointError(
            f"{path.name} holds no UNet.", "Choose an SDXL model; LoadParallelMMDiT opens SD3 and SD3.5."
        )
    return _open_mmdit(path, held)


def _open_mmdit(path: Path, held: Held) -> OpenedModel:
    source = held(open_mmdit(path), SD3)
    return mmdit_model(source, mmdit_config(source))


def mmdit_model(source: TensorSource, config: MMDiTConfig) -> OpenedModel:
    """SD3's transformer of these sizes, from tensors under the single-file names."""
    return OpenedModel(
        source,
        config,
        SD3,
        lambda mesh, kernel: MMDiT(config, mesh, kernel),
        lambda model, mesh, kernel, device, dtype: TokenNetwork(
            model, PositionTable(source, config.pos_embed_size, device, dtype)
        ),
        JointBlock,
        lambda model: frozenset({POS_EMBED, *filter(model.is_elsewhere, source.names())}),
        later=lambda network: {POS_EMBED: network.positions.replace},
    )


def _open_unet(path: Path, held: Held) -> OpenedModel:
    found, config = open_unet(path)
    kind = PLAYGROUND if config.edm is not None and config.edm.prediction == "edm" else SDXL
    return replace(unet_model(held(found, kind), config, kind), place=unet_places(found, config))


def unet_model(source: TensorSource, config: UNetConfig, kind: Kind = SDXL) -> OpenedModel:
    """SDXL's UNet of these sizes, from tensors under the names of the module that it builds."""
    return OpenedModel(
        source,
        config,
        kind,
        lambda mesh, kernel: loadable_unet(config, mesh),
        lambda model, mesh, kernel, device, dtype: BandUNet(model, config, mesh, kernel),
        BasicTransformerBlock,
    )


def _open_from_scratch(path: Path, held: Held) -> OpenedModel:
    source = held(open_diffusion(path), FROM_SCRATCH)
    config = from_scratch_config(source)
    return OpenedModel(
        source,
        config,
        FROM_SCRATCH,
        lambda mesh, kernel: FromScratch(config, mesh, kernel),
        lambda model, mesh, kernel, device, dtype: TokenNetwork(model, GridPositions(device)),
        Block,
        lambda model: frozenset(filter(model.is_elsewhere, source.names())),
    )
