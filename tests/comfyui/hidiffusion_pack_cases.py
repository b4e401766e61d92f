"""The nodes of the pack comfyui_jankhidiffusion, for twins.py."""

import functools
import importlib
import json
import os

import comfy_extras.nodes_freelunch as freelunch
import comfy_extras.nodes_pag as pag
import control_cases
import meshes
import packs
import torch
from attention_cases import tiled
from block_cases import both, shrink
from node_cases import hung
from twins import call

FOLDER = os.environ["JANKHIDIFFUSION_PATH"]
NAME = "comfyui_jankhidiffusion"
MODELS = {name: model for name, model in meshes.models().items() if name.startswith("sdxl")}
# One with SDXL's own numbers of blocks, for which presets are made.
LAYERS = "sdxl, layers"
if meshes.WORLD == 2:
    MODELS[LAYERS] = ("unet-layers.safetensors", {"patch": 2})
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


SHRINK = shrink(4, downscale_factor=1.4, upscale_method="bilinear")


def on(module, name, settings, more):
    """The node on the MODEL, with its text of parameters."""
    settings = settings | ({"yaml_parameters": json.dumps(more)} if more else {})
    return lambda model: call(getattr(packs.part_of_pack(FOLDER, f"py.{module}"), name), model=model, **settings)


def rau_net(changed=None, **more):
    return on("raunet", "ApplyRAUNet", RAU_NET | (changed or {}), more)


def windows(changed=None, **more):
    return on("msw_msa_attention", "ApplyMSWMSAAttention", WINDOWS | (changed or {}), more)


def sized(batch, rows, columns, **settings):
    return {"latent": torch.randn(batch, 4, rows, columns, generator=torch.Generator().manual_seed(9))} | settings


class BesidePlain:
    """Samplings that are told from those of the local MODEL without the nodes; `same`: they must not be."""

    def __init__(self, twins, name):
        self.twins, self.name, self.plain = twins, name, {}

    def __call__(self, model, same=False, **settings):
        out = self.twins.sample(model, **settings)
        key = repr([(name, getattr(value, "shape", value)) for name, value in settings.items() if name != "positive"])
        if key not in self.plain:
            self.plain[key] = self.twins.sample(self.twins.pair(self.name, *MODELS[self.name])[0], **settings)
        changed = self.twins.distance(model, out, self.plain[key]) > 1e-3
        assert changed != same, "the nodes change nothing" if same is False else "the nodes change what they should not"
        return out


def in_parallel_alone(twins, model, **settings):
    """A local MODEL fails in its own way, in mid-picture."""
    is_parallel = isinstance(model, twins.remote_model.RemotePatcher)
    return twins.sample(model, **settings) if is_parallel else settings["latent"]


def of_another_version(kind):
    """As if the pack's function held settings that are not known."""

    def change(model):
        function = model.model_options["transformer_options"]["patches"][kind][0]
        cells = dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))
        holder = cells["state"].cell_contents if "state" in cells else cells["config"]
        setattr(holder, "config" if "state" in cells else "cell_contents", object())
        return model

    return change


def resized_by_another_pack(run, module, model, **settings):
    """As where ComfyUI-bleh is installed, whose methods have names of its own."""
    own = packs.part_of_pack(FOLDER, f"py.{module}")
    scale_samples, own.scale_samples = own.scale_samples, sized
    try:
        return run(model, **settings)
    finally:
        own.scale_samples = scale_samples


def cases(twins):
    """All on the first mesh of 2 ranks, of others those that differ by mesh."""
    for number, name in enumerate(MODELS):
        beside = BesidePlain(twins, name)
        found = of_layers(twins) if name == LAYERS else every(twins)
        for case, change, settings in found:
            if (meshes.WORLD == 2 and number == 0) or case in FEW or name == LAYERS:
                yield name, f"{NAME}: {case}", change, {"of": beside} | settings


def every(twins):
    yield from of_rau_net()
    yield from of_windows()
    yield from refused(functools.partial(in_parallel_alone, twins))


def of_rau_net():
    """The tiny model's input blocks 2 and 4 are downsamplings, its output blocks 1 and 3 end in upsamplings."""
    odd = sized(2, 21, 13, steps=3)
    unit = {"ca_latent_pixel_increment": 1}
    yield "RAUNet", rau_net(), sized(1, 24, 16)
    yield "RAUNet, twice", rau_net({"input_blocks": "2,4", "output_blocks": "1,3"}), odd
    staged = {"two_stage_upscale_mode": "nearest-exact", "upscale_mode": "bislerp", "output_blocks": "3,1"}
    gains = {f"{when}_{way}scale_multiplier": 0.9 for when in ("pre", "post") for way in ("up", "down")}
    yield "RAUNet in two stages", rau_net(staged, **gains), odd
    yield "RAUNet by both, odd", rau_net(CA, **unit), odd
    pooled = {**CA, **ALONE, "ca_downscale_mode": "avg_pool2d"}
    yield "pooled", rau_net(pooled, **unit, ca_avg_pool2d_ceil_mode=False), odd
    yield "pooled, rounded up", rau_net(pooled, **unit, ca_downscale_factor_w=3.0), odd
    after_skip = {**CA, **ALONE, "ca_input_blocks": "2", "ca_downscale_mode": "bilinear", "ca_downscale_factor": 1.5}
    gains = {f"ca_{name}": gain for name, gain in zip(gains, (0.9, 1.1, 0.8, 1.2), strict=True)}
    yield "after the skip", rau_net(after_skip, **unit, **gains, ca_input_after_skip_mode=True), odd
    fading = {"ca_fadeout_start_time": 0.1, "ca_fadeout_cap": 0.2, "ca_downscale_mode": "area"}
    yield "fading, step by step", rau_net({**CA, **ALONE}, **unit, **fading), sized(1, 40, 36, steps=5, denoise=1.0)
    times = {"time_mode": "sigma", "start_time": 20.0, "end_time": 1.5}
    yield "RAUNet with FreeU", both(rau_net(times), hung(freelunch.FreeU, b1=1.1, b2=1.4, s1=0.9, s2=0.2)), odd
    yield "RAUNet with deep shrink", both(SHRINK, rau_net(CA, **unit)), odd
    yield "deep shrink after RAUNet at one block", both(rau_net({**CA, "ca_input_blocks": "4"}, **unit), SHRINK), odd
    larger = {**CA, **ALONE, "ca_downscale_factor": 0.7, "ca_downscale_mode": "nearest"}
    yield "larger within", rau_net(larger, **unit), sized(1, 16, 32)


def of_windows():
    odd = sized(1, 21, 13, steps=3)
    yield "MSW-MSA", windows(), sized(2, 24, 16, steps=3)
    yield "MSW-MSA, odd", windows({"input_blocks": "3", "middle_blocks": "0", "output_blocks": "0,1,2,3"}), odd
    modes = {"scale_mode": "bicubic", "reverse_scale_mode": "bislerp", "last_shift_mode": "both"}
    gains = {"pre_window_multiplier": 1.1, "post_window_multiplier": 0.9}
    gains |= {"pre_window_reverse_multiplier": 1.2, "post_window_reverse_multiplier": 0.8}
    yield "MSW-MSA, other modes", windows(**modes, **gains, last_shift_strategy="retry"), odd
    yield "MSW-MSA, even, with multipliers", windows({"end_time": 0.7}, **gains), sized(1, 24, 16, steps=3)
    yield "MSW-MSA, skipped where odd", windows(scale_mode="skip"), odd | {"same": True}
    yield "MSW-MSA, disabled where odd", windows({"output_blocks": "3"}, scale_mode="disabled"), odd | {"same": True}
    yield "MSW-MSA with PAG", both(windows(), hung(pag.PerturbedAttentionGuidance, scale=3.0)), odd
    yield "RAUNet and MSW-MSA", both(rau_net(CA), windows({"output_blocks": "0,1,2,3"})), sized(1, 44, 36, steps=3)
    yield "deep shrink and MSW-MSA", both(windows({"output_blocks": "0,1,2,3"}), SHRINK), odd
    twice = both(windows({"output_blocks": ""}), windows({"input_blocks": ""}))
    yield "MSW-MSA twice", twice, sized(1, 24, 16, sampler="heun", steps=3)


def refused(alone):
    even = sized(1, 24, 16, of=alone)
    yield "attention to the prompt", windows(force_apply_attn2=True), even
    yield "windows in windows", both(windows(), windows()), even
    yield "multipliers where skipped", windows(scale_mode="skip", pre_window_multiplier=2.0), sized(1, 21, 13, of=alone)
    yield "HyperTile and windows", both(tiled(), windows()), even
    late = windows({"middle_blocks": "0", "start_time": 0.9})
    yield "PAG at a window", both(late, hung(pag.PerturbedAttentionGuidance, scale=3.0)), even
    yield "nothing resizes back", rau_net({**CA, "ca_output_blocks": "1"}, ca_latent_pixel_increment=1), even
    yield "all of it smaller", rau_net({**CA, "ca_input_blocks": "0"}, ca_latent_pixel_increment=1), even
    yield "a method that isn't there", rau_net({"upscale_mode": "lanczos"}), even
    yield "no number", rau_net(pre_upscale_multiplier="two"), even
    yield "another version of RAUNet", both(rau_net(), of_another_version("input_block_patch")), even
    yield "another version of MSW-MSA", both(windows(), of_another_version("attn1_patch")), even
    by_bleh = functools.partial(resized_by_another_pack, alone)
    yield "RAUNet with ComfyUI-bleh", rau_net(), even | {"of": functools.partial(by_bleh, "raunet")}
    yield "MSW-MSA with ComfyUI-bleh", windows(), even | {"of": functools.partial(by_bleh, "msw_msa_attention")}


def of_layers(twins):
    rau = {"model_type": "auto", "upscale_mode": "default", "ca_upscale_mode": "bilinear"}
    simple = on("msw_msa_attention", "ApplyMSWMSAAttentionSimple", {"model_type": "auto"}, {})

    def simple_rau(res_mode):
        return on("raunet", "ApplyRAUNetSimple", rau | {"res_mode": res_mode}, {})

    picture = sized(1, 66, 64, steps=3, denoise=1.0)
    yield "RAUNet Simple, low", simple_rau("low (1024 or lower)"), {"same": True}
    yield "both Simple, ultra", both(simple_rau("ultra (over 2048)"), simple), picture
    model = twins.pair(LAYERS, *MODELS[LAYERS])[0]

    def controlled(control):
        return control_cases.applied(twins, model, (control, 0.8, 0.0, 1.0, control_cases.image()))

    importlib.import_module("pack.nodes.controlnet_files").remember_files()
    in_ranks = controlled(control_cases.loaded(twins, "control-one.safetensors"))
    yield "RAUNet with a ControlNet", simple_rau("ultra (over 2048)"), picture | in_ranks
    local = controlled(control_cases.sdxl_control(model))
    yield "deep shrink with a ControlNet, after RAUNet ran once, step by step", SHRINK, sized(1, 13, 9) | local
