"""ControlNet files as users have them, in every type and layout, and what ComfyUI computes with a MODEL's own weights, for twins.py.

Files lie in folders named after the models that they are for. Of one that core can't open as it is meant, its values lie in a file
of the same name in a folder `values` beside it: these are a local MODEL's.
"""

import functools
import importlib
import os
import sys
from contextlib import contextmanager

import comfy.controlnet
import comfy.model_detection
import torch
from comfy_extras.nodes_controlnet import SetUnionControlNetType
from control_cases import VAE, applied, image, mahiro, same, with_lora
from twins import call

MODELS = {
    "sdxl": ("unet-layers.safetensors", {"patch": 2}),
    "union": ("unet-320.safetensors", {"patch": 2}),
    "sd3": ("sd3-medium.safetensors", {"tp": 2}),
    "sd3.5-large": ("sd3.5-large.safetensors", {"ulysses": 2}),
    "sdxl in fp8": ("unet-layers-fp8.safetensors", {"cfg": 2}),
    "sdxl in scaled fp8": ("unet-layers-scaled.safetensors", {"patch": 2}),
}
QUANTISED = ("sdxl in fp8", "sdxl in scaled fp8")


@contextmanager
def known_to_core(model):
    """Core knows SDXL's ControlNets in diffusers' layout at their full size alone; now at this model's too."""
    detect = comfy.model_detection.unet_config_from_diffusers_unet
    config = dict(model.model.model_config.unet_config, out_channels=4)
    comfy.model_detection.unet_config_from_diffusers_unet = lambda *_, **__: dict(config)
    try:
        yield
    finally:
        comfy.model_detection.unet_config_from_diffusers_unet = detect


def opened(model, path, of=None):
    """As core's loaders open it: in the type that core chooses."""
    with known_to_core(model):
        return comfy.controlnet.load_controlnet(path, of)


def is_parallel(twins, model):
    return isinstance(model, twins.remote_model.RemotePatcher)


def with_file(twins, model, path, **more):
    """KSampler's latent with the ControlNet of that file, on a local MODEL with that of its values if there is one."""
    values = os.path.join(os.path.dirname(path), "values", os.path.basename(path))
    is_local = not is_parallel(twins, model)
    control = opened(model, values if is_local and os.path.exists(values) else path)
    return twins.sample(model, **used(twins, model, control), **more)


def used(twins, model, control, **more):
    """Prompts with it; a union is told that its picture is of depths."""
    if getattr(control.control_model, "task_embedding", None) is not None:
        control = call(SetUnionControlNetType, control, "depth")
    is_sd3 = type(model.model).__name__ == "SD3"
    return applied(twins, model, (control, 0.8, 0.0, 1.0, image()), **(VAE if is_sd3 else {}), **more)


def file_cases(twins, name):
    folder = os.path.join(twins.folder, name)
    for file in sorted(file for file in os.listdir(folder) if "." in file):
        run = functools.partial(with_file, twins, path=os.path.join(folder, file))
        yield file.removesuffix(".safetensors"), same, {"of": run}
        if file.startswith("scaled"):
            yield f"{file.removesuffix('.safetensors')}, step by step", mahiro, {"of": run}


def cases(twins):
    importlib.import_module("pack.nodes.controlnet_files").remember_files()
    for name in MODELS:
        if name not in QUANTISED:
            yield from ((name, *case) for case in file_cases(twins, name))
