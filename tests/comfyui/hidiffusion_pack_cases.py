"""The nodes of the pack comfyui_jankhidiffusion, for twins.py."""

import json
import os

import comfy_extras.nodes_freelunch as freelunch
import comfy_extras.nodes_model_downscale as downscale
import meshes
import packs
import torch
from node_cases import hung
from twins import call

FOLDER = os.environ["JANKHIDIFFUSION_PATH"]
NAME = "comfyui_jankhidiffusion"
MODELS = {name: model for name, model in meshes.models().items() if name.startswith("sdxl")}
# What other numbers of ranks are tried with as well.
FEW = ("RAUNet by both, odd", "MSW-MSA, odd", "RAUNet and MSW-MSA")
RAU_NET = {
    "input_blocks": "2",
    "output_blocks": "3",
    "start_time": 0.0,
    "end_time": 0.6,
    "time_mode": "percent",
    "ca_input_blocks": "3",
    "ca_output_blocks": "3",
    "ca_start_time": 1.0,
    "ca_end_time": 1.0,
    "upscale_mode": "bicubic",
    "ca_upscale_mode": "bicubic",
    "two_stage_upscale_mode": "disabled",
    "ca_downscale_mode": "adaptive_avg_pool2d",
    "ca_downscale_factor": 2.0,
}
CA = {"ca_start_time": 0.0, "ca_end_time": 0.6}
ALONE = {"start_time": 1.0, "end_time": 1.0}
WINDOWS = {"input_blocks": "3", "middle_blocks": "", "output_blocks": "3"}
WINDOWS |= {"time_mode": "percent", "start_time": 0.0, "end_time": 1.0}


def on(module, name, settings, more):
    """The node on the MODEL, with its text of parameters."""
    settings = settings | ({"yaml_parameters": json.dumps(more)} if more else {})
    return lambda model: call(getattr(packs.part_of_pack(FOLDER, f"py.{module}"), name), model=model, **settings)


def rau_net(changed=None, **more):
    return on("raunet", "ApplyRAUNet", RAU_NET | (changed or {}), more)


def windows(changed=None, **more):
    return on("msw_msa_attention", "ApplyMSWMSAAttention", WINDOWS | (changed or {}), more)


def both(*changes):
    def change(model):
        for one in changes:
            model = one(model)
        return model

    return change


def sized(batch, rows, columns, **settings):
    return {"latent": torch.randn(batch, 4, rows, columns, generator=torch.Generator().manual_seed(9))} | settings


def cases(twins):
    """All on the first mesh of 2 ranks, of others those that differ by mesh."""
    for number, name in enumerate(MODELS):
        for case, change, settings in every(twins):
            if (meshes.WORLD == 2 and number == 0) or case in FEW:
                yield name, f"{NAME}: {case}", change, dict(settings)


def every(twins):
    yield from of_rau_net()
    yield from of_windows()
    yield from refused()


def of_rau_net():
    """The tiny model's input blocks 2 and 4 are downsamplings, its output blocks 1 and 3 end in upsamplings."""
    odd = sized(2, 21, 13, steps=3)
    unit = {"ca_latent_pixel_increment": 1}
    yield "RAUNet", rau_net(), sized(1, 24, 16)
    yield "RAUNet, all of the picture smaller", rau_net({"input_blocks": "2,4", "output_blocks": "1,3"}), odd
    staged = {"two_stage_upscale_mode": "nearest-exact", "upscale_mode": "bislerp", "output_blocks": "3,1"}
    gains = {f"{when}_{way}scale_multiplier": 0.9 for when in ("pre", "post") for way in ("up", "down")}
    yield "RAUNet in two stages", rau_net(staged, **gains), odd
    yield "RAUNet by both, odd", rau_net(CA, **unit), odd
    pooled = {**CA, **ALONE, "ca_downscale_mode": "avg_pool2d"}
    yield "pooled", rau_net(pooled, **unit, ca_avg_pool2d_ceil_mode=False), odd
    yield "pooled, rounded up", rau_net(pooled, **unit, ca_downscale_factor_w=3.0), odd
    after_skip = {**CA, **ALONE, "ca_output_blocks": "2", "ca_downscale_mode": "bilinear", "ca_downscale_factor": 1.5}
    gains = {f"ca_{name}": gain for name, gain in zip(gains, (0.9, 1.1, 0.8, 1.2), strict=True)}
    yield "after the skip", rau_net(after_skip, **unit, **gains, ca_input_after_skip_mode=True), odd
    fading = {"ca_fadeout_start_time": 0.1, "ca_fadeout_cap": 0.2, "ca_downscale_mode": "area"}
    yield "fading, step by step", rau_net({**CA, **ALONE}, **unit, **fading), sized(1, 40, 36, steps=5, denoise=1.0)
    times = {"time_mode": "sigma", "start_time": 20.0, "end_time": 1.5}
    yield "RAUNet with FreeU", both(rau_net(times), hung(freelunch.FreeU, b1=1.1, b2=1.4, s1=0.9, s2=0.2)), odd
    shrunk = {"block_number": 4, "downscale_factor": 1.4, "start_percent": 0.0, "end_percent": 1.0}
    shrunk |= {"downscale_after_skip": True, "downscale_method": "bicubic", "upscale_method": "bilinear"}
    yield "RAUNet with deep shrink", both(hung(downscale.PatchModelAddDownscale, **shrunk), rau_net(CA, **unit)), odd
    larger = {**CA, **ALONE, "ca_downscale_factor": 0.7, "ca_downscale_mode": "nearest"}
    yield "larger within", rau_net(larger), sized(1, 16, 32)
    simple = {"model_type": "SDXL", "upscale_mode": "default", "ca_upscale_mode": "bilinear"}
    yield "Simple, low", on("raunet", "ApplyRAUNetSimple", simple | {"res_mode": "low (1024 or lower)"}, {}), {}


def of_windows():
    odd = sized(1, 21, 13, steps=3)
    yield "MSW-MSA", windows(), sized(2, 24, 16, steps=3)
    yield "MSW-MSA, odd", windows({"input_blocks": "3", "middle_blocks": "0", "output_blocks": "0,1,2,3"}), odd
    modes = {"scale_mode": "bicubic", "reverse_scale_mode": "bislerp", "last_shift_mode": "both"}
    gains = {"pre_window_multiplier": 1.1, "post_window_multiplier": 0.9}
    gains |= {"pre_window_reverse_multiplier": 1.2, "post_window_reverse_multiplier": 0.8}
    yield "MSW-MSA, other modes", windows(**modes, **gains, last_shift_strategy="retry"), odd
    yield "MSW-MSA, even, with multipliers", windows({"end_time": 0.7}, **gains), sized(1, 24, 16, steps=3)
    yield "MSW-MSA, skipped where odd", windows(scale_mode="skip"), odd
    yield "MSW-MSA, disabled where odd", windows({"output_blocks": "0,3"}, scale_mode="disabled"), odd
    yield "RAUNet and MSW-MSA", both(rau_net(CA), windows({"output_blocks": "0,1,2,3"})), sized(1, 44, 36, steps=3)
    twice = both(windows({"output_blocks": ""}), windows({"input_blocks": ""}))
    yield "MSW-MSA twice", twice, sized(1, 24, 16, sampler="heun", steps=3)


def refused():
    at_attn2 = windows(force_apply_attn2=True)
    yield "attention to the prompt", at_attn2, {}
    yield "windows in windows", both(windows(), windows()), sized(1, 24, 16)
    yield "multipliers where skipped", windows(scale_mode="skip", pre_window_multiplier=2.0), sized(1, 21, 13)
    # On a local MODEL it fails as well, in mid-picture.
    yield (
        "nothing resizes back",
        rau_net({**CA, "ca_output_blocks": "1"}, ca_latent_pixel_increment=1),
        sized(1, 24, 16),
    )
