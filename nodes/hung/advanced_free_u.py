"""FreeU V2 of the pack ComfyUI-ppm: also on what input blocks and the middle block give, in some steps, with numbers of its own.

At which widths it acts, on how many channels, and how much, its functions say themselves: each is asked at all widths of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...parallel_backend.errors import UnsupportedError
from ...parallel_backend.rpc.extras import AnyExtra, FreeU, FreeUSite
from .block_patches import INPUT, OUTPUT, acts, orders_of, range_of
from .pack_version import pack_and_version
from .patches import Call, Kind, Patch, closed_over, origin
from .refusal import ELSEWHERE
from .sigmas import above

_RANGE = {"sigma_start", "sigma_end"}
_OF_IMAGE = {"_hidden_mean", "b1", "b2", "slice_b1", "slice_b2"} | _RANGE


@dataclass(frozen=True)
class _Function:
    """One of the node's.

    Args:
        name, holds: in the node, and what it has of it.
        weighed: (function, image, options) -> the image as it gives it.
    """

    at: FreeUSite
    name: str
    holds: set[str]
    weighed: Callable[[Any, Tensor, dict[str, Any]], Tensor]


def _of_input(function: Any, image: Tensor, options: dict[str, Any]) -> Tensor:
    out: Tensor = function(image, options)
    return out


def _of_middle(function: Any, image: Tensor, options: dict[str, Any]) -> Tensor:
    out: Tensor = function({"h": image, "transformer_options": options})["h"]
    return out


def _of_output(function: Any, image: Tensor, options: dict[str, Any]) -> Tensor:
    out: Tensor = function(image, torch.ones(1, 1, 1, 1), options)[0]
    return out


# By what ComfyUI calls their places.
_FUNCTIONS = {
    INPUT: _Function("input", "block_patch", _OF_IMAGE, _of_input),
    "middle_block_after_patch": _Function("middle", "block_after_patch_middle", {"block_patch"}, _of_middle),
    OUTPUT: _Function("output", "block_patch_hsp", {"block_patch", "s1", "s2", "threshold"} | _RANGE, _of_output),
}


def _knows(patch: Patch) -> bool:
    known = _FUNCTIONS.get(patch.kind)
    if known is None or origin(patch.function) != f"freeu_adv:FreeU2PPM.patch.<locals>.{known.name}":
        return False
    made_with = closed_over(patch.function)
    of_image = closed_over(made_with["block_patch"]) if "block_patch" in made_with else made_with
    return made_with.keys() == known.holds and of_image.keys() == _OF_IMAGE


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    """Raises: UnsupportedError: a function of the node's does something else than is known."""
    orders = {id(function): order for kind in (INPUT, OUTPUT) for order, function in orders_of(_knows, call, kind)}
    for patch in patches:
        yield from _of(patch, orders.get(id(patch.function), 0), call)


def _of(patch: Patch, order: int, call: Call) -> Iterator[FreeU]:
    """Nothing where it never acts: at no width that the model has, or at no sigma."""
    known, made_with = _FUNCTIONS[patch.kind], closed_over(patch.function)
    of_range = closed_over(made_with["block_patch"]) if "block_patch" in made_with else made_with
    start, end = (float(of_range[name]) for name in ("sigma_start", "sigma_end"))
    end = above(end)
    if not acts(start, end):
        return
    asked = {width: _asked(known, patch.function, width, start) for width in _widths(call.network)}
    acting = {width: found for width, found in asked.items() if found is not None}
    if not acting:
        return
    yield FreeU(
        factors=[(width, of_image, of_skip) for width, (_, of_image, of_skip) in acting.items()],
        by_structure=True,
        order=order,
        scaled=[scaled for scaled, _, _ in acting.values()],
        at=known.at,
        cycles=int(made_with.get("threshold", 1)),
        **range_of(start, end),
    )


def _widths(network: Any) -> list[int]:
    """Numbers of channels that its blocks give."""
    blocks = (*network.input_blocks, *network.output_blocks)
    return list(
        dict.fromkeys(layer.out_channels for block in blocks for layer in block if hasattr(layer, "out_channels"))
    )


def _asked(known: _Function, function: Any, width: int, sigma: float) -> tuple[int, float, float] | None:
    """Of an image of so many channels how many are multiplied, by what where it is the greatest, and a skip connection's factor; None
    where nothing is.

    Raises: UnsupportedError: it does something else.
    """
    image, options = (
        torch.tensor([1.0, 2.0]).expand(1, width, 1, 2),
        {"sigmas": torch.tensor([sigma], dtype=torch.float64)},
    )
    factors = (known.weighed(function, image.clone(), options) / image)[0, :, 0]
    scaled, of_image = int((factors[:, 1] != 1).sum()), float(factors[0, 1])
    wanted = torch.ones(width, 2)
    wanted[:scaled, 1] = of_image
    if not torch.equal(factors, wanted):
        raise UnsupportedError(
            f"A parallel MODEL doesn't know {origin(function)} of {pack_and_version(function)}.", ELSEWHERE
        )
    of_skip = 1.0
    if known.at == "output":
        of_skip = float(function(image.clone(), torch.ones(1, 1, 1, 1), options)[1])
    return None if scaled == 0 and of_skip == 1 else (scaled, of_image, of_skip)


KIND = Kind(_knows, _extras)
