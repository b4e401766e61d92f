"""ControlNets of the Stable Diffusion line's UNets, told by the names of a file's tensors."""

from __future__ import annotations

from collections.abc import Collection

# Before the names of single files that are laid out as full checkpoints are.
PREFIX = "control_model."
# One of each layout, that every ControlNet with weights of its own has.
_MARKS = ("zero_convs.0.0.weight", "controlnet_cond_embedding.conv_in.weight")
# A tensor of no values, which says what the others are.
CONTROL_LORA, _DIFFERENCE = "lora_controlnet", "difference"


def is_unet_control(names: Collection[str]) -> bool:
    """Whether a file of these names is a ControlNet of a UNet, of whatever kind and version."""
    return is_control_lora(names) or not {*_MARKS, *(PREFIX + mark for mark in _MARKS)}.isdisjoint(names)


def is_control_lora(names: Collection[str]) -> bool:
    """Whether it has pairs of low rank, to be added to a model's weights."""
    return CONTROL_LORA in names


def is_difference(names: Collection[str]) -> bool:
    """Whether it has differences from a model's weights."""
    return _DIFFERENCE in names
