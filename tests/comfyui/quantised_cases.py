"""Files in every quantised form, plain and with a LoRA, for twins.py; the GGUF ones where ComfyUI-GGUF is installed.

ComfyUI quantises a patched weight again, with chance in it; ranks add the patch to the weight's values. So a LoRA's latent is compared
with that of a local MODEL of the values, from a file of the same name in the folder `values`.
"""

import functools
import os

from patch_cases import RANK, chosen, kohya, noise, weights

FOLDER = os.environ["QUANTISED_FILES"]
MESHES = [{"tp": 2}, {"pp": 2}, {"ulysses": 2}]


def models():
    """Each file on one of the meshes, in turn; UNets in bands, their weights sliced."""
    found = {}
    for number, name in enumerate(sorted(n for n in os.listdir(FOLDER) if "." in n)):
        sliced = {"patch": 2, "sliced": True}
        found[name] = name, sliced if name.startswith("unet") else MESHES[number % len(MESHES)]
    return found


MODELS = models()


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


def cases(twins):
    has_pack = os.path.isdir(os.path.join(twins.comfy_folder, "custom_nodes", "ComfyUI-GGUF"))
    for name in MODELS:
        if has_pack or not name.endswith(".gguf"):
            yield name, "plain", lambda model: model, {}
            yield name, "LoRA", functools.partial(of_values, twins, name), {}
            yield name, "LoRA as ComfyUI lays it", functools.partial(with_lora, twins), {}
