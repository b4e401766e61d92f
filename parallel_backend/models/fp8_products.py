"""Whether a model's products are made in fp8, and with which weights."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import torch

from ..distributed.control import Control
from ..errors import UnsupportedError
from ..quantized.forms import kitchen
from ..quantized.weight import multiply_in_fp8
from .checkpoint import HeldWeight


class _Card(msgspec.Struct):
    multiplies: bool


def cards_multiply_fp8(device: torch.device, control: Control, whatever_it_says: bool) -> bool:
    """Whether every rank's device has products of fp8 (NVIDIA from Ada on), and the package of ComfyUI's kernels.

    Args:
        whatever_it_says: the device counts as one that has them.
    Comm: a note of each rank, since all ranks are to compute alike.
    """
    has = whatever_it_says or (device.type == "cuda" and torch.version.hip is None and _capability(device) >= (8, 9))
    return all(card.multiplies for card in control.gather(_Card(has and _has_kitchen())))


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _has_kitchen() -> bool:
    try:
        return hasattr(kitchen(), "TensorCoreFP8Layout")
    except UnsupportedError:
        return False


def make_products_in_fp8(held: Iterable[HeldWeight], bare: bool) -> str:
    """From now on, of all weights whose form has them; `bare`: those without a scale too. Returns what to tell, if there are any."""
    count = sum(multiply_in_fp8(weight.parameter, bare) for weight in held)
    return f"products with {count} weights are made in fp8, as ComfyUI makes them on such cards" if count else ""
