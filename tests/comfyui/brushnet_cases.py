"""ComfyUI-BrushNet's nodes on a local MODEL and on its parallel twin, for twins.py; a small network in the place of its file's."""

import contextlib
import functools
import os

import comfy.ops
import torch
from control_cases import random_weights
from packs import part_of_pack
from refusals import refused

PACK = "ComfyUI-BrushNet"
MODELS = {"sdxl, cfg": ("unet-layers.safetensors", {"cfg": 2})}


def of(part):
    return part_of_pack(os.environ["BRUSHNET_PATH"], part)


# Packs are there before MODELs are.
of("brushnet_nodes")


def brushnet():
    """As its loader gives it."""
    model = of("brushnet.brushnet").BrushNetModel
    config = model.load_config(of("brushnet_nodes").brushnet_xl_config_file)
    widths = {"block_out_channels": [64, 128, 128], "attention_head_dim": [1, 2, 2]}
    network = random_weights(model.from_config(dict(config) | widths), 14)
    return {"brushnet": network, "SDXL": True, "PP": False, "dtype": torch.float32}


class VAE:
    device = torch.device("cpu")

    def encode(self, pixels):
        cells = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return torch.cat([cells, cells[:, :1]], dim=1)


@contextlib.contextmanager
def as_older_cores(model):
    """As the pack knows ComfyUI: newer ones choose operations otherwise, and tell its wrapper of shapes as well."""
    config, patch = model.model.model_config, of("model_patch")
    kept, wrapper = config.custom_operations, patch.brushNet_out_sample_wrapper
    config.custom_operations = comfy.ops.disable_weight_init
    patch.brushNet_out_sample_wrapper = lambda *args, latent_shapes=None, **more: wrapper(*args, **more)
    try:
        yield
    finally:
        config.custom_operations, patch.brushNet_out_sample_wrapper = kept, wrapper


def brushed(twins, model):
    """The MODEL, prompts and latent of the node BrushNet."""
    generator = torch.Generator().manual_seed(15)
    pixels, mask = torch.rand(1, 64, 48, 3, generator=generator), torch.zeros(1, 64, 48)
    mask[:, 16:48, 16:] = 1
    pair = twins.prompt(model, 1), twins.prompt(model, 2)
    with as_older_cores(model):
        out = of("brushnet_nodes").BrushNet().model_update(model, VAE(), pixels, mask, brushnet(), *pair, 1.0, 0, 10000)
    return out[0], {"positive": out[1], "negative": out[2], "latent": out[3]["samples"], "denoise": 1.0}


def raunet(twins, model):
    """The MODEL of the node RAUNet, which halves other sizes in the first of two steps than in the second."""
    with as_older_cores(model):
        steps = {"du_start": 0, "du_end": 1, "xa_start": 5, "xa_end": 6}
        return of("raunet_nodes").RAUNet().model_update(model, **steps)[0], {"latent": torch.zeros(1, 4, 16, 16)}


def cases(twins):
    words = "transformer option 'brush_model_patch'"
    for name in MODELS:
        for make in (brushed, raunet):
            of_node = functools.partial(refused, twins, words, functools.partial(make, twins))
            yield name, f"{PACK}: {make.__name__}", lambda model: model, {"of": of_node}
