"""What the pack comfyui_jankhidiffusion puts in the place of ComfyUI's own function for ControlNets, for all MODELs of the process."""

from __future__ import annotations

from comfy.ldm.modules.diffusionmodules import openaimodel

from .patches import origin

_OF_PACK = "raunet:State.hd_apply_control"


def scales_residuals() -> bool:
    """Whether a ControlNet's output is resized to that which it is added to; by ComfyUI's own function it is left out."""
    return origin(openaimodel.apply_control) == _OF_PACK
