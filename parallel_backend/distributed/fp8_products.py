"""Whether products are made in fp8."""

from __future__ import annotations

import msgspec
import torch

from ..errors import UnsupportedError
from ..quantized.forms import kitchen
from .control import Control


class _Card(msgspec.Struct):
    multiplies: bool


def multiply_fp8(device: torch.device, control: Control, whatever_it_says: bool) -> bool:
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
        kitchen()
    except UnsupportedError:
        return False
    return True
