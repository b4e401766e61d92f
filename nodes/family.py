"""Which of ComfyUI's families this pack computes, of a MODEL and of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_detection
import comfy.supported_models
from comfy.model_patcher import ModelPatcher

from ..parallel_backend.errors import UnsupportedError
from ..parallel_backend.rpc.messages import ModelKind
from .core_model import meta_state_dict
from .hung.refusal import as_sentence

# Some tensor of each such file begins like this. ComfyUI's own detection, which reads values of some other families, comes after.
_MARKS = ("joint_blocks.", "pos_embed.pos_embed", "label_emb.", "add_embedding.")
NAMES = "SD3, SD3.5 and SDXL (base, refiner, inpainting and kin)"


def kind_of_model(model: comfy.model_base.BaseModel) -> ModelKind | None:
    """None where it is of another family, or a class of its own made of one of these."""
    kinds: dict[type, ModelKind] = {
        comfy.model_base.SD3: "mmdit",
        comfy.model_base.SDXL: "unet",
        comfy.model_base.SDXL_instructpix2pix: "unet",
        comfy.model_base.SDXLRefiner: "unet",
    }
    return kinds.get(type(model))


def not_parallel(node: str, model: ModelPatcher, otherwise: str) -> UnsupportedError:
    """What a node raises that takes parallel MODELs alone.

    Args:
        otherwise: what is to be done where the MODEL stays as it is: half a sentence.
    """
    if kind_of_model(model.model) is None:
        what = f"{node} needs a parallel MODEL, and one of {type(model.model).__name__} can't be; {NAMES} can."
        return UnsupportedError(what, as_sentence(otherwise))
    return UnsupportedError(f"{node} needs a parallel MODEL.", f"Put Parallelize Model before it, or {otherwise}")


def kind_of_file(path: Path) -> ModelKind | None:
    """By its header alone; None where ComfyUI takes it for another family, or for none.

    Raises: CheckpointError: it can't be read.
    """
    meta = meta_state_dict(path)
    if not any(name.startswith(_MARKS) for name in meta):
        return None
    config: Any = comfy.model_detection.model_config_from_unet(meta, "")
    if config is None:
        config = comfy.model_detection.model_config_from_diffusers_unet(meta)
    if config is None and (joined := comfy.model_detection.convert_diffusers_mmdit(dict(meta), "")):
        config = comfy.model_detection.model_config_from_unet(joined, "")
    if isinstance(config, comfy.supported_models.SD3):
        return "mmdit"
    if isinstance(config, (comfy.supported_models.SDXL, comfy.supported_models.SDXLRefiner)):
        return "unet"
    return None
