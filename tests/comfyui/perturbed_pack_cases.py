"""The nodes of the pack sd-perturbed-attention, for twins.py."""

import os

import meshes
import packs
import torch
from twins import call

FOLDER = os.environ["PERTURBED_ATTENTION_PATH"]
NAME = "sd-perturbed-attention"
MODELS = {name: model for name, model in meshes.models().items() if name.startswith("sdxl")}


def node(name, module="pag_nodes", **inputs):
    """The node on the MODEL."""
    return lambda model: call(getattr(packs.part_of_pack(FOLDER, module), name), model=model, **inputs)


def cases(twins):
    """All on the first mesh of 2 ranks, of others those that differ by mesh."""
    for number, name in enumerate(MODELS):
        picture = {"latent": torch.randn(2, 4, 21, 13, generator=torch.Generator().manual_seed(9))}
        square = {"latent": torch.randn(1, 4, 20, 20, generator=torch.Generator().manual_seed(9))}
        found = every(picture, square, [[torch.randn(1, 24, 2048), {}]])
        for case, change, settings in found:
            if (meshes.WORLD == 2 and number == 0) or case in ("PAG of a list", "SEG, the mean", "SEG, a blur"):
                yield name, f"{NAME}: {case}", change, dict(settings)


def every(picture, square, negative):
    perturbed, smoothed = "PerturbedAttention", "SmoothedEnergyGuidanceAdvanced"
    yield "PAG", node(perturbed, scale=3.0), picture
    listed = {"unet_block_list": "d0.0,m0,u0.1,u1", "adaptive_scale": 0.1, "rescale": 0.5}
    yield "PAG of a list", node(perturbed, scale=2.0, **listed), {}
    snf = {"unet_block": "input", "unet_block_id": 5, "rescale_mode": "snf", "rescale": 0.2}
    yield "PAG, SNF", node(perturbed, scale=2.0, **snf), {}
    early = {"sigma_start": 8.0, "sigma_end": 1.0, "rescale_mode": "partial", "rescale": 0.4}
    yield "PAG at some sigmas", node(perturbed, scale=2.0, **early), {"steps": 4}
    yield "SEG, the mean", node(smoothed, scale=3.0), picture
    yield "SEG, a blur", node(smoothed, scale=3.0, blur_sigma=0.6, unet_block_list="d1.1,m0.0,u0"), square
    yield "SEG, a wide blur", node(smoothed, scale=3.0, blur_sigma=400.0, unet_block_list="d0,u0.0"), {}
    window = {"tile_width": 96, "tile_height": 64, "tile_overlap": 32, "sigma_end": -1.0}
    yield "SWG", node("SlidingWindowGuidanceAdvanced", scale=2.0, **window), picture
    yield "FDG", node("FrequencyDecoupledGuidance", "fdg_nodes", strength_high=6.0), {}
    yield "momentum", node("MomentumGuidance", "mg_nodes", momentum=0.5, ema=0.6), {"steps": 4}
    yield "NAG", node("NormalizedAttentionGuidance", "nag_nodes", negative=negative), {}
    yield "PLADIS", node("Pladis", "pladis_nodes"), {}
    yield "TPG", node("TokenPerturbationGuidance", "tpg_nodes", unet_block_list="d1"), {}
    yield "a block outside", node(perturbed, unet_block="output", unet_block_id=50), picture
    yield "a blur of 0", node(smoothed, blur_sigma=0.0), picture
