"""MODEL nodes of the packs ComfyUI-ppm and ComfyUI_experiments, for twins.py: each pack's folder stands in an environment variable."""

import importlib
import os
from types import CodeType, FunctionType

import meshes
import packs
import torch
from block_cases import BY_STEPS, both, shrink, sized
from node_cases import hung
from region_cases import part
from twins import call

MODELS = meshes.models()
SETTINGS = {"b1": 1.3, "b2": 1.4, "s1": 0.6, "s2": 0.2, "slice_b1": 96, "slice_b2": 64}
# The pack's FreeU knows SDXL's two inner levels by their widths; those of the tiny model have a tenth of these.
NARROW = {1280: 128, 640: 64}
EVERYWHERE = "FreeU V2 (PPM) at all places, some steps"


def cases(twins):
    """All on the first mesh of 2 ranks; on others FreeU alone, which differs by mesh."""
    for name in MODELS:
        is_unet, is_first = name.startswith("sdxl"), meshes.WORLD == 2 and "," not in name
        if is_unet and (module := part("PPM_PATH", "src.nodes_ppm.freeu_adv")) is not None:
            yield from ((name, *case) for case in free_u(module.FreeU2PPM) if is_first or case[0] == EVERYWHERE)
        if is_first:
            yield from ((name, *case) for case in (*ppm(twins), *experiments()))


def free_u(node):
    at_all = {"input_block": True, "middle_block": True, "output_block": True}
    at_output = {"input_block": False, "middle_block": False, "output_block": True}
    yield (
        EVERYWHERE,
        narrowed(node, **at_all, threshold=2, start_percent=0.2, end_percent=0.7),
        picture() | {"steps": 4},
    )
    yield "FreeU V2 (PPM)", narrowed(node, **at_output), {}
    yield "FreeU V2 (PPM), many frequencies", narrowed(node, **at_output, threshold=7), picture()
    late = {"start_percent": 0.5, "end_percent": 1.0}
    shrunk = both(shrink(2), narrowed(node, **at_all, **late), BY_STEPS)
    yield "step by step: FreeU V2 (PPM), shrunk", shrunk, sized(1, 24, 20) | {"steps": 3}
    yield "FreeU V2 (PPM) at SDXL's widths, without effect", hung(node, **at_all, **SETTINGS), {}
    before_skip = shrink(3, downscale_after_skip=False)
    yield (
        "FreeU V2 (PPM) before what acts on input blocks",
        both(narrowed(node, **at_all), before_skip),
        sized(1, 24, 20),
    )


def narrowed(node, **inputs):
    """The node's own code on the MODEL, with the tiny model's widths in place of SDXL's."""
    plain = node.patch
    patch = FunctionType(_narrow(plain.__code__), plain.__globals__, plain.__name__, plain.__defaults__)
    return lambda model: patch(node(), model, **(SETTINGS | inputs))[0]


def _narrow(code):
    consts = (
        _narrow(x) if isinstance(x, CodeType) else NARROW.get(x, x) if type(x) is int else x for x in code.co_consts
    )
    return code.replace(co_consts=tuple(consts))


def picture():
    return sized(2, 21, 13)


def ppm(twins):
    guidance = part("PPM_PATH", "src.nodes_ppm.guidance")
    if guidance is None:
        return
    misc, cads = (part("PPM_PATH", f"src.nodes_ppm.{name}") for name in ("misc", "cads_ppm"))
    # After the module of core that nodes_latent imports, and that imports it.
    importlib.import_module("comfy_extras.nodes_post_processing")
    applied = importlib.import_module("comfy_extras.nodes_latent").LatentApplyOperationCFG
    tonemap = part("PPM_PATH", "src.nodes_ppm.latent_tonemap").LatentOperationTonemapLuminance
    between = {"sigma_start": 10.0, "sigma_end": 0.3}
    yield "Guidance Limiter", hung(guidance.GuidanceLimiter, **between), {"steps": 3}
    yield "CFGLimiterGuider", lambda model: model, {"of": limited(twins, guidance.CFGLimiterGuider, between)}
    yield "RescaleCFGPost", hung(guidance.RescaleCFGPost, multiplier=0.7, alt_mode=True, **between), {"steps": 3}
    thresholds = {"mimic_scale": 1.5, "threshold_percentile": 0.9}
    yield "DynamicThresholdingSimplePost", hung(guidance.DynamicThresholdingSimplePost, **thresholds), {}
    by_channel = {"separate_feature_channels": True, "scaling_startpoint": "ZERO", "variability_measure": "STD"}
    full = hung(guidance.DynamicThresholdingPost, **thresholds, **by_channel, interpolate_phi=0.8)
    yield "DynamicThresholdingPost", full, {}
    yield "RenormCFGPost", hung(guidance.RenormCFGPost, renorm_cfg=0.6, sigma_start=-1.0, sigma_end=-1.0), {}
    yield "TCFGAdvanced", hung(guidance.TCFGAdvanced, multiplier=0.8, sigma_start=-1.0, sigma_end=-1.0), {}
    yield "SkipFirstStepCFG", hung(guidance.SkipFirstStepCFG, skip_percent=0.3), {"steps": 3, "denoise": 1.0}
    yield "CADSPPM", hung(cads.CADSPPM, scale=0.3, start_percent=0.0, end_percent=1.0), {"of": seeded(twins)}
    yield "EpsilonScalingPPM", hung(misc.EpsilonScalingPPM, scaling_factor=1.05), {}
    operation = tonemap().op("reinhard", 0.5)[0]
    yield "LatentOperationTonemapLuminance", hung(applied, operation=operation), {}
    selector = part("PPM_PATH", "src.nodes_ppm.attention_selector").ModelAttentionSelector
    yield "ModelAttentionSelector", hung(selector, attention="pytorch"), {}


def limited(twins, node, between):
    """SamplerCustomAdvanced's latent with the guider."""

    def run(model, **_):
        prompts = {"positive": twins.prompt(model, 1), "negative": twins.prompt(model, 2)}
        guider = call(node, model=model, cfg=4.0, **prompts, **between)
        sampler = twins.comfy.samplers.sampler_object("euler")
        sigmas = twins.comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 3)
        latent = twins.latent(model, 9, 7)
        noise = twins.comfy.sample.prepare_noise(latent, 5)
        return guider.sample(noise, latent, sampler, sigmas, seed=5)

    return run


def seeded(twins):
    """The node draws from torch's own generator, which ComfyUI doesn't seed for it."""

    def run(model, **settings):
        torch.manual_seed(11)
        return twins.sample(model, **settings)

    return run


def experiments():
    folder = os.environ.get("EXPERIMENTS_PATH")
    if folder is None:
        return
    nodes = {
        "sampler_rescalecfg": ("RescaleClassifierFreeGuidance", {"multiplier": 0.7}),
        "sampler_tonemap": ("ModelSamplerTonemapNoiseTest", {"multiplier": 0.5}),
        "sampler_tonemap_rescalecfg": (
            "TonemapNoiseWithRescaleCFG",
            {"tonemap_multiplier": 0.5, "rescale_multiplier": 0.6},
        ),
    }
    for module, (name, inputs) in nodes.items():
        yield name, hung(getattr(packs.part_of_pack(folder, module), name), **inputs), {"steps": 3}
