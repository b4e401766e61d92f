"""ComfyUI-layerdiffuse's nodes for SDXL on a local MODEL and on its parallel twin, for twins.py; small files of its layouts."""

import functools
import os

import torch
from control_cases import mahiro, with_lora
from packs import part_of_pack
from refusals import refused
from safetensors.torch import save_file
from twins import call

MODELS = {
    "sdxl, cfg": ("unet-layers.safetensors", {"cfg": 2}),
    "sdxl, sliced": ("unet-layers.safetensors", {"patch": 2, "sliced": True}),
}
# Packs are there before MODELs are: this one puts a function of its own around that of all transformer blocks.
layers = part_of_pack(os.environ["LAYERDIFFUSE_PATH"], "layered_diffusion")
PACK = "ComfyUI-layerdiffuse"
FOREGROUND, ATTENTION, CONV = "SDXL, Foreground", "SDXL, Attention Injection", "SDXL, Conv Injection"
WIDER = "can't honour a patch that widens input_blocks.0.0.weight"


def write_files(model, folder):
    """By the weights' names, kinds and numbers of parts, as its files have them."""
    os.makedirs(folder, exist_ok=True)
    generator, network = torch.Generator().manual_seed(13), model.model.diffusion_model.state_dict()
    attention, convolutions = {}, {}
    for name, weight in network.items():
        key = f"diffusion_model.{name}"
        if "attn" in name and name.endswith("weight"):
            attention[f"{key}::lora::0"] = 0.05 * torch.randn(weight.shape[0], 4, generator=generator)
            attention[f"{key}::lora::1"] = torch.randn(4, weight.shape[1], generator=generator)
        elif weight.ndim == 4:
            convolutions[f"{key}::diff::0"] = 0.01 * torch.randn(weight.shape, generator=generator)
    save_file(attention, os.path.join(folder, "layer_xl_transparent_attn.safetensors"))
    save_file(convolutions, os.path.join(folder, "layer_xl_transparent_conv.safetensors"))
    first = network["input_blocks.0.0.weight"]
    for file, channels in (("layer_xl_fg2ble", 8), ("layer_xl_fgble2bg", 12)):
        wide = 0.05 * torch.randn(first.shape[0], channels, *first.shape[2:], generator=generator)
        whole = attention | {"diffusion_model.input_blocks.0.0.weight::diff::0": wide}
        save_file(whole, os.path.join(folder, f"{file}.safetensors"))


def applied(config, weight, model):
    return call(layers.LayeredDiffusionFG, model=model, config=config, weight=weight)


def prompts(twins, model):
    return {
        "cond": twins.prompt(model, 1),
        "uncond": twins.prompt(model, 2),
        "latent": {"samples": twins.latent(model)},
    }


def conditioned(twins, node, more, model):
    """The MODEL and prompts of a node that widens the first convolution, for what it puts beside the latent."""
    settings = prompts(twins, model) | more | {"config": FOREGROUND, "weight": 1.0}
    changed, positive, negative = node().apply_layered_diffusion(model, **settings)
    return changed, {"positive": positive, "negative": negative}


def cases(twins):
    # Where its nodes look for their files.
    layers.layer_model_root = os.path.join(twins.folder, "layer_model")
    blended = {"blended_latent": {"samples": torch.ones(1, 4, 8, 6)}}
    wider = {"Cond Apply": (layers.LayeredDiffusionCond, {}), "Diff Apply": (layers.LayeredDiffusionDiff, blended)}
    for number, name in enumerate(MODELS):
        if not number:
            write_files(twins.pair(name, *MODELS[name])[0], layers.layer_model_root)
        for config in (ATTENTION, CONV):
            yield name, f"{PACK}: {config}", functools.partial(applied, config, 1.0), {}
        half = functools.partial(applied, CONV, 0.5)
        yield name, f"{PACK}: {CONV}, half, euler_ancestral", half, {"sampler": "euler_ancestral"}
        yield name, f"{PACK}: {CONV}, step by step", lambda model: mahiro(applied(CONV, 1.0, model)), {}
        yield name, f"{PACK}: {CONV}, with a LoRA", lambda model: with_lora(applied(CONV, 0.6, model)), {}
        for case, (node, more) in wider.items():
            make = functools.partial(conditioned, twins, node, more)
            yield name, f"{PACK}: {case}", lambda model: model, {"of": functools.partial(refused, twins, WIDER, make)}
