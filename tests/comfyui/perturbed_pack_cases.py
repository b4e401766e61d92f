"""The nodes of the pack sd-perturbed-attention, for twins.py."""

import functools
import os
from unittest.mock import patch

import comfy_extras.nodes_attention_multiply as attention_multiply
import meshes
import packs
import torch
from attention_cases import tiled
from block_cases import both, shrink
from node_cases import hung, same
from refusals import named
from region_cases import doubled, parallel_alone, part, with_negpip
from twins import call

FOLDER = os.environ["PERTURBED_ATTENTION_PATH"]
NAME = "sd-perturbed-attention"
MODELS = meshes.models()
# On every mesh; on others than the first of 2 ranks, these alone.
EVERYWHERE = ("PAG of a list", "SEG, the mean", "SEG, a blur", "NAG", "NAG beside PAG", "PLADIS", "TPG of a list")


def node(name, module="pag_nodes", **inputs):
    """The node on the MODEL."""
    return lambda model: call(getattr(packs.part_of_pack(FOLDER, module), name), model=model, **inputs)


def cases(twins):
    """All on the first mesh of 2 ranks, of others those that differ by mesh."""
    for name in MODELS:
        if not name.startswith("sdxl"):
            if meshes.WORLD == 2 and "," not in name:
                yield from (
                    (name, f"{NAME}: {case}", change, settings) for case, change, settings in on_transformers(twins)
                )
            continue
        picture = {"latent": torch.randn(2, 4, 21, 13, generator=torch.Generator().manual_seed(9))}
        square = {"latent": torch.randn(1, 4, 20, 20, generator=torch.Generator().manual_seed(9))}
        negative, longer = ([[torch.randn(1, tokens, 2048), {}]] for tokens in (24, 41))
        found = every(twins, picture, square, negative, longer)
        for case, change, settings in found:
            if (meshes.WORLD == 2 and "," not in name) or case in EVERYWHERE:
                yield name, f"{NAME}: {case}", change, dict(settings)


def guided(negative, **inputs):
    return node("NormalizedAttentionGuidance", "nag_nodes", negative=negative, **inputs)


def every(twins, picture, square, negative, longer):
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
    yield "NAG", guided(negative, scale=3.0, tau=1.5, alpha=0.7), picture
    other = {"unet_block_list": "d0.0,m0,u1", "sigma_start": 8.0, "sigma_end": 1.0}
    yield "NAG of a list, at some sigmas", guided(longer, **other), {"steps": 4}
    yield "NAG, cfg 1", guided(longer), picture | {"cfg": 1.0}
    twice = guided(negative, tau=0.0, alpha=0.3), guided(longer, scale=1.5, unet_block_list="d1,u0.0")
    yield "NAG twice", lambda model: twice[1](twice[0](model)), {}
    yield "NAG beside PAG", lambda model: guided(longer)(node(perturbed, scale=3.0)(model)), picture
    yield "NAG of two prompts", guided([[torch.randn(2, 24, 2048), {}]]), {}
    yield "SMC", node("SlidingModeControlCFG", "smc_nodes", **{"lambda": 5.0, "k": 0.2}), {"steps": 3}
    yield "PLADIS", node("Pladis", "pladis_nodes"), picture
    listed = {"scale": 1.5, "sparse_func": "sparsemax", "unet_block_list": "d0,m0,u0.0"}
    yield "PLADIS of a list", node("Pladis", "pladis_nodes", **listed), {}
    uneven = {"negative": [[torch.randn(1, 48, 2048), {"pooled_output": torch.randn(1, 1280)}]]}
    yield "step by step: PLADIS, prompts of two lengths", node("Pladis", "pladis_nodes"), uneven
    yield "PLADIS, prompts of two lengths, cfg 1", node("Pladis", "pladis_nodes"), uneven | {"cfg": 1.0}
    yield "PLADIS of another version", node("Pladis", "pladis_nodes"), {"of": of_other_map(twins)}
    yield "SEG of another version", node(smoothed, scale=3.0), {"of": of_other_blur(twins)}
    yield "step by step: PLADIS and PAG", both(node("Pladis", "pladis_nodes"), node(perturbed, scale=2.0)), picture
    if (negpip := part("PPM_PATH", "src.negpip.unet_negpip")) is not None:
        yield "PLADIS beside NegPiP", both(with_negpip(negpip), node("Pladis", "pladis_nodes")), {"of": doubled(twins)}
    shuffled = "TokenPerturbationGuidance"
    drawn = {"of": seeded(twins, picture)}
    yield "TPG", node(shuffled, "tpg_nodes", unet_block_list=""), dict(drawn)
    listed = {"unet_block_list": "d1,m0,u1.0", "rescale": 0.4, "rescale_mode": "partial"}
    yield "TPG of a list", node(shuffled, "tpg_nodes", scale=2.0, **listed), drawn | {"steps": 3}
    late = {"sigma_start": 8.0, "rescale_mode": "snf", "unet_block_list": "u0"}
    yield "TPG at some sigmas", node(shuffled, "tpg_nodes", scale=2.0, **late), drawn | {"steps": 4}
    weights = hung(attention_multiply.UNetCrossAttentionMultiply, q=1.1, k=0.9, v=1.05, out=0.95)
    yield "NAG beside patched weights", same, {"of": again(twins, both(weights, guided(negative)))}
    yield from refused_later(twins, perturbed, smoothed, shuffled)
    yield "a block outside", node(perturbed, unet_block="output", unet_block_id=50), picture
    yield "a blur of 0", node(smoothed, blur_sigma=0.0), picture


def again(twins, change):
    """Its keys are made by the network's weights as they are when the node runs: on a local MODEL, as the last sampling left them."""

    def run(model, **settings):
        twins.sample(change(model), **settings)
        return twins.sample(change(model), **settings)

    return run


def refused_later(twins, perturbed, smoothed, shuffled):
    """What only evaluations after the first can't be honoured in."""
    picture = {"latent": torch.randn(1, 4, 40, 24, generator=torch.Generator().manual_seed(9)), "steps": 4}
    at_the_end = {"sigma_start": 3.0}

    def refusing(words):
        sampled = functools.partial(twins.sample, **picture)
        return {"of": functools.partial(named, twins, [words], sampled)}

    beside = both(shrink(2), node(smoothed, blur_sigma=0.6, **at_the_end))
    yield "SEG later, shrunk", beside, refusing("smoothed energy guidance can't be honoured beside deep shrink")
    beside = both(shrink(2, end_percent=0.3), node(smoothed, blur_sigma=0.6, **at_the_end))
    yield "SEG after what was shrunk", beside, picture
    beside = both(tiled(), node(perturbed, unet_block_list="d1,m0", **at_the_end))
    yield "PAG later, tiled", beside, refusing("HyperTile beside the attn1 patch at input")
    drawing = node(shuffled, "tpg_nodes", unet_block_list="m0", **at_the_end)
    yield "TPG later, tiled in one way", both(tiled(swap_size=1), drawing), {"of": seeded(twins, picture)}
    yield (
        "TPG later, tiled",
        both(tiled(), drawing),
        refusing("token perturbation guidance beside the attn1_patch by HyperTile"),
    )


def on_transformers(twins):
    """Those that act on denoised latents; and those whose patches nothing calls there."""
    window = {"tile_width": 48, "tile_height": 32, "tile_overlap": 16, "sigma_end": -1.0}
    yield "SWG", node("SlidingWindowGuidanceAdvanced", scale=2.0, **window), {}
    yield "FDG", node("FrequencyDecoupledGuidance", "fdg_nodes", strength_high=6.0), {}
    yield "momentum", node("MomentumGuidance", "mg_nodes", momentum=0.5, ema=0.6), {"steps": 3}
    yield "SMC", node("SlidingModeControlCFG", "smc_nodes", **{"lambda": 5.0, "k": 0.2}), {"steps": 3}
    yield "PAG, without effect", node("PerturbedAttention", scale=3.0), {}
    yield "SEG, without effect", node("SmoothedEnergyGuidanceAdvanced", scale=3.0), {}
    yield "PLADIS, without effect", node("Pladis", "pladis_nodes"), {}
    yield "TPG, without effect", node("TokenPerturbationGuidance", "tpg_nodes", unet_block_list=""), {}


def of_other_map(twins):
    return of_another_version(twins, packs.part_of_pack(FOLDER, "pladis_utils").Entmax, "entmax15", torch.softmax)


def of_other_blur(twins):
    utilities = packs.part_of_pack(FOLDER, "guidance_utils")
    return of_another_version(twins, utilities, "gaussian_blur_2d", lambda picture, *_: picture * 0.9)


def of_another_version(twins, owner, name, other):
    """The parallel MODEL's latent where the pack's code calls another function under one of its names."""
    run = parallel_alone(twins)

    def changed(model, **settings):
        with patch.object(owner, name, other):
            return run(model, **settings)

    return changed


def seeded(twins, picture):
    """The node draws from torch's own generator, which ComfyUI doesn't seed for it."""

    def run(model, **settings):
        torch.manual_seed(11)
        return twins.sample(model, **picture, **settings)

    return run
