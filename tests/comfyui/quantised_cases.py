"""Files in every quantised form, plain and with a LoRA, for twins.py; the GGUF ones where ComfyUI-GGUF is installed. And a loader's fp8.

ComfyUI quantises a patched weight again, with chance in it; ranks add the patch to the weight's values. So a LoRA's latent is compared
with that of a local MODEL of the values, from a file of the same name in the folder `values`.
"""

import functools
import importlib
import os
import pathlib

import torch
from patch_cases import RANK, chosen, kohya, noise, weights

FOLDER = os.environ["QUANTISED_FILES"]
MESHES = [{"tp": 2}, {"pp": 2}, {"ulysses": 2}]


def models():
    """Each file on one of the meshes, in turn; UNets in bands, their weights sliced."""
    found = {}
    for number, name in enumerate(sorted(n for n in os.listdir(FOLDER) if "." in n and "half" not in n)):
        sliced = {"patch": 2, "sliced": True}
        found[name] = name, sliced if name.startswith("unet") else MESHES[number % len(MESHES)]
    return found


FILES = models()
E4M3, E5M2, HAS = {"dtype": torch.float8_e4m3fn}, {"dtype": torch.float8_e5m2}, {"has_fp8": True}
TOLD = {
    "weight_dtype fp8_e4m3fn": ("half.safetensors", {"tp": 2}, E4M3),
    "weight_dtype fp8_e5m2": ("half.safetensors", {"ulysses": 2}, E5M2),
    "weight_dtype fp8_e4m3fn of a UNet": ("unet_half.safetensors", {"patch": 2}, E4M3),
    "products of fp8_e4m3fn_fast": ("half.safetensors", {"tp": 2}, E4M3 | HAS | {"fp8_optimizations": True}),
    "products of fp8_e4m3fn": ("half.safetensors", {"tp": 2}, E4M3 | HAS),
    "products of a scaled file": ("fp8_with_scales.safetensors", {"pp": 2}, HAS),
    "products of a file that wants none": ("scaled_fp8.safetensors", {"tp": 2}, HAS),
}
MODELS = FILES | TOLD


def with_lora(twins, model):
    tensors, shapes = {}, weights(model)
    for number, name in enumerate(chosen(model, 2)):
        rows, columns = shapes[name + ".weight"]
        make = functools.partial(noise, seed=number, scale=0.3)
        tensors[f"{kohya(name)}.lora_up.weight"] = make(rows, RANK)
        tensors[f"{kohya(name)}.lora_down.weight"] = make(RANK, columns)
    return twins.comfy.sd.load_lora_for_models(model, None, tensors, 0.7, 0.0)[0]


def of_values(twins, name, model):
    """The LoRA on the parallel MODEL, or on a local one of the values."""
    if not isinstance(model, twins.remote_model.RemotePatcher):
        model = twins.local(os.path.join(FOLDER, "values", name.replace(".gguf", ".safetensors")))
    return with_lora(twins, model)


def one_layer(twins, model):
    """What comes out of a layer that makes its products in fp8: ComfyUI's, or a rank's."""
    x = noise(30, 256, seed=1, scale=20.0).reshape(2, 15, 256).clone()  # which ComfyUI clamps in its place
    name = "joint_blocks.1.x_block.mlp.fc1"
    if not isinstance(model, twins.remote_model.RemotePatcher):
        return model.model.diffusion_model.get_submodule(name)(x)
    weights = importlib.import_module("pack.parallel_backend.quantized.weight")
    families = importlib.import_module("pack.parallel_backend.models.families")
    load = model.model.diffusion_model.remote.load
    source = families.open_model(pathlib.Path(load.path), weights=load.weights).source
    weight, bias = (source.read(f"{name}.{leaf}") for leaf in ("weight", "bias"))
    assert weights.multiply_in_fp8(weight, load.fast_fp8)
    bias = bias.dequantized() if isinstance(bias, weights.QuantizedWeight) else bias
    return torch.nn.functional.linear(x, weight, bias.float())


def cases(twins):
    for name in ("products of fp8_e4m3fn_fast", "products of a scaled file"):
        yield name, "one layer", lambda model: model, {"of": functools.partial(one_layer, twins)}
    has_pack = os.path.isdir(os.path.join(twins.comfy_folder, "custom_nodes", "ComfyUI-GGUF"))
    yield from ((name, "plain", lambda model: model, {}) for name in TOLD)
    for name in FILES:
        if has_pack or not name.endswith(".gguf"):
            yield name, "plain", lambda model: model, {}
            yield name, "LoRA", functools.partial(of_values, twins, name), {}
            yield name, "LoRA as ComfyUI lays it", functools.partial(with_lora, twins), {}
