"""ComfyUI's own nodes that no other module of cases tries, on both families, for twins.py: those that are refused, and the rest.

tests/census.py makes a table of them and of the others.
"""

import os
import tempfile

import comfy_extras.nodes_attention_multiply as multiply
import comfy_extras.nodes_eps as eps
import comfy_extras.nodes_freelunch as freelunch
import comfy_extras.nodes_model_advanced as advanced
import comfy_extras.nodes_nag as nag
import comfy_extras.nodes_pag as pag
import comfy_extras.nodes_rope as rope
import comfy_extras.nodes_sag as sag
import comfy_extras.nodes_sd3 as sd3
import comfy_extras.nodes_slg as slg
import comfy_extras.nodes_tomesd as tomesd
import comfy_extras.nodes_torch_compile as compiling
import comfy_extras.nodes_video_model as video
import folder_paths
import torch
from block_cases import shrink
from node_cases import hung, same
from patch_cases import lora_file
from safetensors.torch import save_file
from twins import call

import nodes

MODELS = {
    "sd3.5-large": ("sd3.5-large.safetensors", {"cfg": 2}),
    "sdxl": ("unet-tiny.safetensors", {"patch": 2}),
}
_QKV = {"q": 1.2, "k": 0.9, "v": 1.1, "out": 0.8}
_SKIPPED = {"scale": 2.0, "start_percent": 0.0, "end_percent": 1.0}
ON_A_MODEL = {
    "FreeU": hung(freelunch.FreeU, b1=1.1, b2=1.2, s1=0.9, s2=0.2),
    "FreeU_V2": hung(freelunch.FreeU_V2, b1=1.3, b2=1.4, s1=0.9, s2=0.2),
    "TomePatchModel": hung(tomesd.TomePatchModel, ratio=0.3),
    "PatchModelAddDownscale": shrink(3),
    "SelfAttentionGuidance": hung(sag.SelfAttentionGuidance, scale=0.5, blur_sigma=2.0),
    "PerturbedAttentionGuidance": hung(pag.PerturbedAttentionGuidance, scale=3.0),
    "NAGuidance": hung(nag.NAGuidance, nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5),
    "UNetSelfAttentionMultiply": hung(multiply.UNetSelfAttentionMultiply, **_QKV),
    "UNetCrossAttentionMultiply": hung(multiply.UNetCrossAttentionMultiply, **_QKV),
    "UNetTemporalAttentionMultiply": hung(
        multiply.UNetTemporalAttentionMultiply,
        self_structural=1.1,
        self_temporal=1.0,
        cross_structural=0.9,
        cross_temporal=1.0,
    ),
    "SkipLayerGuidanceSD3": hung(sd3.SkipLayerGuidanceSD3, layers="1, 2", **_SKIPPED),
    "SkipLayerGuidanceDiT": hung(slg.SkipLayerGuidanceDiT, double_layers="1, 2", single_layers="", **_SKIPPED),
    "ScaleROPE": hung(
        rope.ScaleROPE,
        scale_x=1.5,
        shift_x=0.0,
        scale_y=1.5,
        shift_y=0.0,
        scale_t=1.0,
        shift_t=0.0,
    ),
    "Epsilon Scaling": hung(eps.EpsilonScaling, scaling_factor=1.01),
    "VideoLinearCFGGuidance": hung(video.VideoLinearCFGGuidance, min_cfg=1.0),
    "VideoTriangleCFGGuidance": hung(video.VideoTriangleCFGGuidance, min_cfg=1.0),
    "ModelComputeDtype": hung(advanced.ModelComputeDtype, dtype="fp32"),
    "ModelAttentionBackend": hung(advanced.ModelAttentionBackend, attention="pytorch attention"),
}
if "TWINS_BY_NODE" in os.environ:  # for the table alone: a local MODEL compiles for half a minute
    ON_A_MODEL["TorchCompileModel"] = hung(compiling.TorchCompileModel, backend="inductor")


def cases(twins):
    """Each on one mesh of both families."""
    for name, files in MODELS.items():
        local, _ = twins.pair(name, *files)
        yield from ((name, case, change, {}) for case, change in ON_A_MODEL.items())
        yield name, "LoraLoaderModelOnly", with_lora, {}
        plain, other = twins.prompt(local, 1), twins.prompt(local, 2)
        yield from (
            (name, case, same, {"positive": p, "negative": other}) for case, p in on_conditioning(twins, plain).items()
        )


def with_lora(model):
    """The node, of a file that fits this model."""
    with tempfile.TemporaryDirectory() as folder:
        save_file(lora_file(model, "lora"), os.path.join(folder, "lora.safetensors"))
        folder_paths.folder_names_and_paths["loras"] = ([folder], {".safetensors"})
        return call(nodes.LoraLoaderModelOnly, model=model, lora_name="lora.safetensors", strength_model=0.8)


def on_conditioning(twins, plain):
    """By node: a positive prompt."""
    percent = {"width": 0.5, "height": 0.75, "x": 0.25, "y": 0.0, "strength": 0.8}
    image = type("ClipVisionOutput", (), {"image_embeds": torch.randn(1, 1280)})()
    return {
        "ConditioningSetAreaPercentage": call(nodes.ConditioningSetAreaPercentage, conditioning=plain, **percent),
        "ConditioningSetAreaStrength": call(nodes.ConditioningSetAreaStrength, conditioning=plain, strength=0.7),
        "unCLIPConditioning": call(
            nodes.unCLIPConditioning, conditioning=plain, clip_vision_output=image, strength=1.0, noise_augmentation=0.0
        ),
    }
