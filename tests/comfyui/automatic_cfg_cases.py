"""Nodes of the pack ComfyUI-AutomaticCFG, for twins.py: its folder stands in AUTOMATIC_CFG_PATH."""

import functools
import os

from packs import part_of_pack
from refusals import refused
from twins import call

MODELS = {
    "sdxl": ("unet-tiny.safetensors", {"patch": 2, "sliced": True}),
    "sd3.5-medium": ("sd3.5-medium.safetensors", {"cfg": 2}),
}
nodes = part_of_pack(os.environ["AUTOMATIC_CFG_PATH"], "nodes")
# Of both models sigmas of the first steps, and of the later ones.
BOTH = {"uncond_sigma_start": 1000, "uncond_sigma_end": 0.3}
FAKE = {"skip_uncond": True, "fake_uncond_start": True, "uncond_sigma_start": 0.9, "uncond_sigma_end": 0.3}
MEAN = {"subtract_latent_mean": True, "subtract_latent_mean_sigma_start": 1000, "subtract_latent_mean_sigma_end": 0}
SCALED = {
    "latent_intensity_rescale": True,
    "latent_intensity_rescale_method": "hard",
    "latent_intensity_rescale_cfg": 8,
    "latent_intensity_rescale_sigma_start": 1000,
    "latent_intensity_rescale_sigma_end": 0,
}
PLAIN = {
    "Automatic CFG": (nodes.simpleDynamicCFG, {"hard_mode": True, "boost": False}),
    "Automatic CFG, soft and boosted": (nodes.simpleDynamicCFG, {"hard_mode": False, "boost": True}),
    "Automatic CFG - Negative": (nodes.simpleDynamicCFGlerpUncond, {"boost": False, "negative_strength": 0.7}),
    "Automatic CFG - Warp Drive": (nodes.simpleDynamicCFGwarpDrive, BOTH | {"fake_uncond_sigma_end": 0.1}),
    "Automatic CFG - Post rescale only": (nodes.postCFGrescaleOnly, MEAN | SCALED),
}
METHOD = "attention_modifiers_input_using_cond"
ATTENTIONS = [{
    "sigma_start": 1000, "sigma_end": 0, "self_attn_mod_eval": "q * 3", "unet_attn": "attn1",
    "unet_block_id_input": "", "unet_block_id_middle": "0", "unet_block_id_output": "",
}]  # fmt: skip
OF = {"cond_exp": "positive", "uncond_exp": "negative", "fake_uncond_exp": "fake_negative"}


def cases(twins):
    for name in MODELS:
        for case, (node, settings) in PLAIN.items():
            yield name, case, functools.partial(call, node, **settings), {"steps": 4, "cfg": 7.0}
        for experiment in OF:
            yield name, f"{experiment} by sine", functools.partial(advanced, experiment, "sine"), {"steps": 4}
            told = f"with {experiment} by {METHOD}, which patches blocks of the model"
            if name == "sdxl":  # the attentions are a UNet's
                make = functools.partial(with_attentions, experiment)
                yield (
                    name,
                    f"{experiment} by attentions",
                    lambda model: model,
                    {"of": functools.partial(refused, twins, told, make)},
                )


def advanced(experiment, method, model, **more):
    fake = experiment == "fake_uncond_exp"
    when = FAKE if fake else {f"{experiment}_sigma_start": 1000, f"{experiment}_sigma_end": 0}
    named = {experiment: True, f"{experiment}_method": method, f"{experiment}_value": 3}
    return call(nodes.advancedDynamicCFG, model=model, automatic_cfg="hard", **named, **when, **more)


def with_attentions(experiment, model):
    return advanced(experiment, METHOD, model, **{f"attention_modifiers_{OF[experiment]}": ATTENTIONS}), {"steps": 4}
