"""A model of a layout's sizes with random weights that are made on the device, so that 16 GB need not pass through the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import MeshSpec
from ..distributed.mesh import build_mesh
from ..distributed.tensor_parallel import Shard, cut
from ..models.families import OpenedModel, mmdit_model, unet_model
from ..models.mmdit import MMDiTConfig
from ..models.mmdit_checkpoint import POS_EMBED
from .layouts import Config


@dataclass
class OnDevice:
    """A checkpoint's tensors as a source that models read from, slices as views where they are whole."""

    tensors: Mapping[str, Tensor]
    path: Path = Path("random weights")
    bytes_read: int = field(default=0, init=False)

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str, shard: Shard | None = None) -> Tensor:
        return cut(self.tensors[name], shard)

    def held_bytes(self, name: str, shard: Shard | None) -> int | None:
        return None

    def check_unchanged(self) -> None:
        return None


def random_model(config: Config, device: torch.device, dtype: torch.dtype) -> OpenedModel:
    """That layout's model, ready to be built for any mesh. Call it outside of any world: all tensors are whole."""
    tensors: dict[str, Tensor] = {}
    source = OnDevice(tensors)
    opened = mmdit_model(source, config) if isinstance(config, MMDiTConfig) else unet_model(source, config)
    with torch.device("meta"):
        whole = opened.build(build_mesh(MeshSpec()), "native")
    torch.manual_seed(1)
    for name, parameter in whole.named_parameters():
        tensors[name] = random_tensor(name, parameter.shape, device, dtype)
    if isinstance(config, MMDiTConfig):
        tensors[POS_EMBED] = random_tensor(POS_EMBED, (1, config.pos_embed_size**2, config.hidden), device, dtype)
    return opened


def random_tensor(name: str, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Scaled so that activations stay near 1."""
    tensor: Any = torch.empty(tuple(shape), device=device, dtype=dtype)
    if len(shape) > 1:
        return tensor.normal_(0.0, tensor[0].numel() ** -0.5)
    is_norm = name.endswith("weight")  # every other weight has two dims or more
    return tensor.normal_(1.0 if is_norm else 0.0, 0.02)
