"""A Control-LoRA's file beside the UNet that it is made of: together they are a whole ControlNet.

Of the UNet's encoder it has pairs of low rank, whose products are added to the UNet's weights; the rest of a ControlNet it has whole.
Source: Stability's Control-LoRAs, on Hu et al. 2021 (arXiv 2106.09685).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint_files.unet_control_files import CONTROL_LORA
from ..distributed.tensor_parallel import Shard, cut
from ..errors import CheckpointError, UnsupportedError
from .checkpoint import SourceOver, TensorSource, is_quantised
from .opened_file import open_source
from .unet import UNetConfig
from .unet_control import UNetControlConfig
from .unet_control_checkpoint import control_name

_UP, _DOWN = "up", "down"
# By our joint projections, the parts of them that files have.
_PARTS = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v")}


def open_control_lora(path: Path, base: TensorSource, unet: UNetConfig) -> tuple[ControlLoraSource, UNetControlConfig]:
    """The ControlNet that the file at `path` makes of that UNet, and its sizes.

    Args:
        base: the UNet's tensors, as its file has them.
    Raises: CheckpointError: the file is not whole. UnsupportedError: it is made for another UNet, or this one is quantised.
    """
    if is_quantised(base):
        raise UnsupportedError(
            f"{path.name} is a Control-LoRA, which is added to weights that {base.path.name} holds quantised.",
            "Use the UNet in half precision, or a whole ControlNet.",
        )
    given = open_source(path, "")
    names = {control_name(name, unet.layers_per_block): name for name in given.names() if name != CONTROL_LORA}
    hint = names.get("controlnet_cond_embedding.conv_in.weight")
    if hint is None:
        raise CheckpointError(f"{path.name} lacks the embedding of its image.", "Get the file again.")
    config = UNetControlConfig(**_common(unet) | {"up_depths": ()}, hint_channels=given.shape(hint)[1])
    return ControlLoraSource(given, base, names), config


def _common(unet: UNetConfig) -> dict[str, Any]:
    """What is said of a UNet that is so of its ControlNet; it takes the latent alone."""
    return vars(unet) | {"extra_channels": 0, "v_prediction": False, "zero_snr": False, "edm": None}


@dataclass
class ControlLoraSource(SourceOver):
    """The sums, each made when it is read.

    Args:
        inner: the Control-LoRA's own file.
        base: the UNet's, under the names of its modules.
        in_file: by our names, those of the file.
    """

    base: TensorSource
    in_file: dict[str, str]

    def names(self) -> list[str]:
        """Of the UNet's encoder all; whose own they are is seen when they are read."""
        encoder = [
            name for name in self.base.names() if not name.startswith(("up_blocks.", "conv_norm_out.", "conv_out."))
        ]
        own = [name for name in self.in_file if not name.endswith((f".{_UP}", f".{_DOWN}"))]
        return list(dict.fromkeys([*encoder, *own]))

    def shape(self, name: str) -> tuple[int, ...]:
        return self.inner.shape(self.in_file[name]) if name in self.in_file else self.base.shape(name)

    def held_bytes(self, name: str, shard: Shard | None) -> int | None:
        return None

    def read(self, name: str, shard: Shard | None = None) -> Tensor:
        """Raises: UnsupportedError: the pair is for a weight of another size."""
        if name in self.in_file:
            return self.inner.read(self.in_file[name], shard)
        weight, stem, leaf = self.base.read(name), *_split(name)
        if leaf != "weight":
            return cut(weight, shard)
        last = stem.rpartition(".")[2]
        stems = [stem.removesuffix(last) + part for part in _PARTS.get(last, (last,))]
        rows = len(weight) // len(stems)
        added = [self._added(part, (rows, *weight.shape[1:])) for part in stems]
        if all(product is None for product in added):
            return cut(weight, shard)
        parts = weight.float().split(rows)
        summed = [part if product is None else part + product for part, product in zip(parts, added, strict=True)]
        return cut(torch.cat(summed), shard)

    def check_unchanged(self) -> None:
        self.inner.check_unchanged()
        self.base.check_unchanged()

    def _added(self, stem: str, shape: tuple[int, ...]) -> Tensor | None:
        """The product of the pair for that layer's weight; None where there is none."""
        names = [self.in_file.get(f"{stem}.{leaf}") for leaf in (_UP, _DOWN)]
        if None in names:
            return None
        up, down = (self.inner.read(str(name)).float().flatten(1) for name in names)
        product = up @ down
        if product.numel() != torch.Size(shape).numel():
            raise UnsupportedError(
                f"{self.path.name} is made for another UNet: its {stem} is {list(product.shape)}, this model's {list(shape)}.",
                "Choose a Control-LoRA of this model, or the model of this Control-LoRA.",
            )
        return product.view(shape)


def _split(name: str) -> tuple[str, str]:
    stem, _, leaf = name.rpartition(".")
    return stem, leaf
