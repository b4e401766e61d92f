"""ComfyUI's own model of a file whose weights a backend holds: its class, its names and shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_detection
import comfy.supported_models
import comfy.utils
import torch
from comfy.model_base import BaseModel
from torch import Tensor

from ..parallel_backend import RemoteModel
from ..parallel_backend.checkpoint_files.diffusion_part import diffusion_entries
from ..parallel_backend.errors import CheckpointError
from ..parallel_backend.quantized.whole_file import WholeFile
from .remote_network import make_remote

FROM_SCRATCH, SDXL = "sd3-from-scratch", "sdxl"
# Beside an SDXL model in its file: they tell ComfyUI what its output means; those that begin with _EDM do by their values.
_OUTPUT_MARKS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
_EDM = "edm_"
# The layer that takes SDXL's pooled prompt and sizes, as diffusers and the tests' files call it.
_POOLED = ("add_embedding.linear_1.weight", "class_embedding.linear_1.weight")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def meta_state_dict(path: Path) -> dict[str, Tensor]:
    """The diffusion model's tensors without their values, which ComfyUI recognises a model by; and marks beside it, with theirs."""
    meta = {
        name: torch.empty(entry["shape"], dtype=_DTYPES.get(entry["dtype"], torch.float32), device="meta")
        for name, entry in diffusion_entries(path, _OUTPUT_MARKS).items()
    }
    if marks := [name for name in meta if name.startswith(_EDM)]:
        values = WholeFile(path, _EDM)
        meta |= {name: values[name.removeprefix(_EDM)] for name in marks}
    return meta


def base_model(remote: RemoteModel, path: Path) -> BaseModel:
    """ComfyUI's own model of that file, whose network has its class, its names and shapes, and no weights.

    Raises: CheckpointError: ComfyUI doesn't recognise the file.
    """
    dtype = getattr(torch, remote.load.dtype)
    if remote.family == FROM_SCRATCH:
        meta, tensors, config = {}, None, from_scratch_config()
    else:
        meta = meta_state_dict(path)
        config, tensors = detected(meta, remote.family == SDXL)
    if config is None:
        raise CheckpointError(f"ComfyUI doesn't recognise the model in {path.name}.", "Update ComfyUI.")
    config.set_inference_dtype(dtype, None)
    if tensors is None:
        config.unet_config["disable_unet_model_creation"] = True
    model = config.get_model(meta, "", device=torch.device("meta"))
    model.device = None  # ComfyUI's patcher sets it
    config.__deepcopy__ = lambda memo: config  # copies of a MODEL share it: ComfyUI's class has no way to be copied
    if tensors is None:
        model.diffusion_model = torch.nn.Module()
        model.diffusion_model.in_channels = config.unet_config["in_channels"]
    else:
        typed = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        try:
            model.diffusion_model.load_state_dict(typed, strict=False, assign=True)
        except RuntimeError as error:
            raise CheckpointError(
                f"ComfyUI has no network of the sizes in {path.name}.",
                "The file is damaged, or of a model that this ComfyUI doesn't know: update ComfyUI, or download it again.",
                str(error),
            ) from error
    make_remote(model, remote, dtype)
    model.as_made = model.diffusion_model.as_made
    return model


def detected(meta: dict[str, Tensor], sdxl: bool) -> tuple[Any, dict[str, Tensor] | None]:
    """What ComfyUI knows the model as, and its tensors under ComfyUI's own names.

    Args:
        sdxl: taken for SDXL also at widths that ComfyUI has no name for.
    """
    if config := comfy.model_detection.model_config_from_unet(meta, ""):
        return config, meta
    if tensors := comfy.model_detection.convert_diffusers_mmdit(dict(meta), ""):
        return comfy.model_detection.model_config_from_unet(tensors, ""), tensors
    if "conv_in.weight" in meta:
        unet_config = diffusers_unet_config(meta)
        config = comfy.model_detection.model_config_from_unet_config(unet_config)
        names = comfy.utils.unet_to_diffusers(unet_config)
        tensors = {names[name]: tensor for name, tensor in meta.items() if name in names}
    else:
        unet_config, config, tensors = comfy.model_detection.detect_unet_config(meta, ""), None, meta
    if config is None and sdxl:
        edits = unet_config["in_channels"] == 8
        config = (comfy.supported_models.SDXL_instructpix2pix if edits else comfy.supported_models.SDXL)(unet_config)
    return config, tensors


class FromScratchLatent(comfy.latent_formats.Flux):
    """FLUX's VAE as the from-scratch models were trained with it: the shift is added after the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.shift_factor: float = -0.1159 / self.scale_factor


def from_scratch_config() -> Any:
    """SD3's class of sampling, at shift 1, for a family that ComfyUI has no detection for."""
    config = comfy.supported_models.SD3({"in_channels": 16})
    config.latent_format = FromScratchLatent()
    config.sampling_settings = {"shift": 1.0}
    return config


def diffusers_unet_config(meta: dict[str, Tensor]) -> dict[str, Any]:
    """The sizes of a UNet of SDXL's layout under diffusers' names, as ComfyUI's detection says them of its own names."""

    def count(prefix: str) -> int:
        return comfy.model_detection.count_blocks(list(meta), prefix + ".{}.")

    def depths(side: str, block: int, layers: int) -> list[int]:
        return [count(f"{side}_blocks.{block}.attentions.{layer}.transformer_blocks") for layer in range(layers)]

    blocks = range(count("down_blocks"))
    layers = [count(f"down_blocks.{block}.resnets") for block in blocks]
    up = [depth for block in blocks for depth in depths("up", block, layers[-1 - block] + 1)]
    width = meta["conv_in.weight"].shape[0]
    (pooled,) = (t for name, t in meta.items() if name in _POOLED)
    projections = [tensor for name, tensor in meta.items() if name.endswith(".proj_in.weight")]
    contexts = [tensor for name, tensor in meta.items() if name.endswith("attn2.to_k.weight")]
    middle = count("mid_block.attentions.0.transformer_blocks") or -1
    return {
        "image_size": 32,
        "use_spatial_transformer": True,
        "use_temporal_attention": False,
        "legacy": False,
        "num_classes": "sequential",
        "adm_in_channels": pooled.shape[1],
        "in_channels": meta["conv_in.weight"].shape[1],
        "out_channels": meta["conv_out.weight"].shape[0],
        "model_channels": width,
        "channel_mult": [meta[f"down_blocks.{b}.resnets.0.conv2.weight"].shape[0] // width for b in blocks],
        "num_res_blocks": layers,
        "transformer_depth": [depth for block in blocks for depth in depths("down", block, layers[block])],
        "transformer_depth_output": up[::-1],
        "transformer_depth_middle": middle if count("mid_block.resnets") else -2,
        "use_linear_in_transformer": all(tensor.ndim == 2 for tensor in projections),
        "context_dim": contexts[0].shape[1] if contexts else None,
    }
