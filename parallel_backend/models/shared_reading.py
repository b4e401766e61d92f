"""Ranks that hold the same weights read a share each, and pass it on.

Faster than that each reads all, where ranks reach each other faster than a CPU copies from the page cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from ..distributed.collectives import broadcast
from ..distributed.mesh import MeshAxis


def readers(sizes: Mapping[str, int], degree: int) -> dict[str, int]:
    """Which rank reads which tensor: about as many bytes each, and the same answer on every rank."""
    read = [0] * degree
    chosen = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        chosen[name] = read.index(min(read))
        read[chosen[name]] += sizes[name]
    return chosen


def sizes_of(model: nn.Module) -> dict[str, int]:
    """Elements of each parameter, as this rank holds it."""
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


def pass_on(model: nn.Module, axis: MeshAxis, told: Callable[[int], object] = lambda nbytes: None) -> None:
    """Every rank of the axis has all parameters, each from the rank that has read it.

    Args:
        told: after each that this rank hasn't read, its bytes.
    Comm: one broadcast for each parameter.
    """
    chosen = readers(sizes_of(model), axis.degree)
    for name, parameter in model.named_parameters():
        assert parameter.is_contiguous(), f"{name} would be filled in a copy"
        broadcast(parameter.data, chosen[name], axis)
        if chosen[name] != axis.rank:
            told(parameter.nbytes)
