"""Patches of a MODEL's weights: low-rank ones as their tensors, all others as what ComfyUI's own code makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_management as mm
import comfy.model_patcher
import comfy.utils
import torch
from comfy.hooks import HookGroup
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor

from ...parallel_backend import WeightPatches
from ...parallel_backend.checkpoint_files.patch_file import LowRank, Whole
from ...parallel_backend.errors import UnsupportedError
from .shuffled_tokens import is_shuffling

PREFIX = "diffusion_model."
# Older cores have it beside their patcher.
_seed_of = getattr(comfy.utils, "string_to_seed", None) or comfy.model_patcher.string_to_seed
_shape_of = getattr(comfy.lora, "calculate_shape", None)
# As ComfyUI keeps a patch: strength, value, strength of the model's own weight, rows that it concerns, function of it.
Entry = tuple[float, Any, float, Any, Any]


def unsendable_weights(model: ModelPatcher) -> Iterator[str]:
    """What hangs on the MODEL and would change its weights or layers otherwise than by patches, each by its name."""
    if getattr(model, "weight_wrapper_patches", None):
        yield "weight wrappers"
    if getattr(model, "injections", None):
        yield f"injections ({', '.join(model.injections)})"
    for patches in (model.patches, *model.hook_patches.values()):
        for key, entries in patches.items():
            if not key.startswith(PREFIX):
                yield f"a patch on {key}, which is outside the diffusion model"
            else:
                yield from _widened(key, entries, comfy.utils.get_attr(model.model, key))
    for key, put in model.object_patches.items():
        if not is_shuffling(put) and key.split(".")[0] in ("diffusion_model", "apply_model", "_apply_model"):
            yield f"the object patch {key!r}"


def _widened(key: str, entries: Sequence[Entry], weight: Tensor) -> Iterator[str]:
    """A weight that its patches make larger: a layer that takes more than the ranks' model does."""
    if _shape_of is not None and (shape := tuple(_shape_of(entries, weight, key))) != tuple(weight.shape):
        yield f"a patch that widens {key.removeprefix(PREFIX)} from {list(weight.shape)} to {list(shape)}"


def all_patches(model: ModelPatcher, hooks: HookGroup | None) -> dict[str, list[Entry]]:
    """By weight, in the order in which ComfyUI lays them on: those of the MODEL, then those of the hooks."""
    found = {key: list(entries) for key, entries in model.patches.items()}
    if hooks is not None:
        for key, entries in model.get_combined_hook_patches(hooks).items():
            found[key] = [*found.get(key, []), *entries]
    return found


def weight_patches(
    patches: Mapping[str, Sequence[Entry]],
    shapes: Mapping[str, torch.Size],
    base: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> WeightPatches:
    """Those patches as a backend takes them.

    Args:
        shapes, base: of the model's tensors, by their names in it; `base` is read where ComfyUI computes.
        device: where ComfyUI computes. dtype: of the results.
    """
    low_rank: list[tuple[LowRank, float]] = []
    whole: list[Whole] = []
    for key, entries in patches.items():
        name = key.removeprefix(PREFIX)
        shape = shapes[name]
        products = [_low_rank(name, entry, shape) for entry in entries]
        if all(product is not None for product in products):
            low_rank += [product for product in products if product is not None and product[1] != 0.0]
        else:
            make = partial(patched_weight, entries, base, name, device, dtype)
            whole.append(Whole(name, tuple(shape), dtype, make))
    return WeightPatches(low_rank, whole)


def patched_weight(
    entries: Sequence[Entry], base: Mapping[str, Tensor], name: str, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The weight as ComfyUI's own code patches it, on the CPU.

    Raises: UnsupportedError: a patch of weights that are in a backend.
    """
    key, weight = PREFIX + name, base[name]
    start = mm.cast_to_device(weight, device, mm.lora_compute_dtype(device), copy=True)
    try:
        out = comfy.lora.calculate_weight(entries, start, key, original_weights={key: [(weight,)]})
    except NotImplementedError as error:  # torch's, of what has no values
        raise UnsupportedError(
            f"The patch on {name} is made of a parallel MODEL's weights, which ComfyUI doesn't hold.",
            "Let ComfyUI load the model that the patch is made of.",
        ) from error
    return comfy.float.stochastic_rounding(out, dtype, seed=_seed_of(key)).cpu()


class PatchedWeights(Mapping[str, Tensor]):
    """The weights of a MODEL as its patches leave them, in `dtype`, on the CPU; each is made when it is asked for."""

    def __init__(
        self,
        base: Mapping[str, Tensor],
        patches: Mapping[str, Sequence[Entry]],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`patches` by the weights' names in `base`; ComfyUI computes on `device`."""
        self._base, self._patches, self._device, self._dtype = base, patches, device, dtype

    def __getitem__(self, name: str) -> Tensor:
        if name in self._patches:
            return patched_weight(self._patches[name], self._base, name, self._device, self._dtype)
        return self._base[name].to(self._dtype)

    def __contains__(self, name: object) -> bool:
        """Without making the weight."""
        return name in self._base

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


def _low_rank(name: str, entry: Entry, shape: torch.Size) -> tuple[LowRank, float] | None:
    """The product that the entry adds, and its factor; None where it is more than that, or doesn't fit."""
    strength, value, strength_model, offset, function = entry
    plain = type(value) is LoRAAdapter and strength_model == 1.0 and function is None
    if not plain or (offset is not None and offset[0] != 0):
        return None
    up, down, alpha, mid, dora_scale, reshape = value.weights
    if mid is not None or dora_scale is not None or reshape is not None:
        return None
    row, rows = (0, shape[0]) if offset is None else offset[1:]
    rank = down.shape[0]
    fits = up.shape[0] == rows and prod(up.shape[1:]) == rank and prod(down.shape[1:]) == prod(shape[1:])
    if not fits:  # ComfyUI's code says so in the log, and leaves the weight as it was
        return None
    return LowRank(name, up, down, row), strength * (1.0 if alpha is None else alpha / rank)
