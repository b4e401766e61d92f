"""Attention and norms shared by rows, by the packs' own nodes, for twins.py: each pack's folder stands in an environment variable.

StyleAligned's norms change networks for good, so that these MODELs are of this module alone.
"""

import os

import meshes
import packs
import torch
from attention_cases import tiled
from node_cases import same
from region_cases import parallel_alone
from twins import call

MODELS = {f"{name}, aligned": files for name, files in meshes.models().items() if name.startswith("sdxl")}
ALIGNED, REFERENCE = os.environ.get("STYLE_ALIGNED_PATH"), os.environ.get("EXPERIMENTS_PATH")
# On all meshes.
EVERYWHERE = ("BatchAlign, attention", "BatchAlign, norms", "ReferenceOnlySimple")


def cases(twins):
    """All on the first mesh of 2 ranks, of others those that differ by mesh; with shared norms last."""
    for number, name in enumerate(MODELS):
        reference = of_reference(twins) if REFERENCE else ()
        aligned = of_aligned(twins) if ALIGNED else ()
        for case, change, settings in (*reference, *aligned):
            if (meshes.WORLD == 2 and number == 0) or case in EVERYWHERE:
                yield name, case, change, settings


def of_reference(twins):
    yield "ReferenceOnlySimple", same, {"of": with_reference(twins, 2)}
    yield "ReferenceOnlySimple, cfg 1", same, {"of": with_reference(twins, 1, cfg=1.0)}
    longer = [[torch.randn(1, 48, 2048), {"pooled_output": torch.randn(1, 1280)}]]
    yield "ReferenceOnlySimple, by steps", same, {"of": with_reference(twins, 1, negative=longer)}
    yield "ReferenceOnlySimple, another batch", same, {"of": with_reference(twins, 1, extra=1, cfg=1.0)}


def with_reference(twins, count, extra=0, **settings):
    """The node's MODEL and its latents, the reference first; `extra` more of them than it was told."""

    def run(model):
        reference = {"samples": torch.randn(1, 4, 21, 13, generator=torch.Generator().manual_seed(3))}
        node = packs.part_of_pack(REFERENCE, "reference_only").ReferenceOnlySimple()
        changed, latent = node.reference_only(model, reference, count)
        samples = torch.cat([latent["samples"], *[latent["samples"][-1:]] * extra])
        if extra:
            return parallel_alone(twins)(changed, latent=samples, **settings)
        return twins.sample(changed, latent=samples, noise_mask=latent["noise_mask"], denoise=1.0, **settings)

    return run


def of_aligned(twins):
    def batch(count):
        return {"latent": torch.randn(count, 4, 21, 13, generator=torch.Generator().manual_seed(9))}

    longer = {"negative": [[torch.randn(1, 48, 2048), {"pooled_output": torch.randn(1, 1280)}]]}
    yield "BatchAlign, attention", align("disabled", "q+k"), batch(3)
    yield "BatchAlign, weighed", align("disabled", "q+k+v", 0.6), batch(2)
    yield "BatchAlign, weightless, of attention alone", align("disabled", "disabled", 0.0), batch(2)
    yield "BatchAlign, by steps", align("disabled", "q+k"), batch(2) | longer
    yield "BatchAlign, cfg 1", align("disabled", "q+k", 0.5), batch(2) | {"cfg": 1.0}
    yield "BatchAlign, odd rows", align("disabled", "q+k"), {"of": parallel_alone(twins, cfg=1.0)}
    yield (
        "BatchAlign and HyperTile",
        lambda model: align("disabled", "q+k")(tiled()(model)),
        {"of": parallel_alone(twins)},
    )
    yield "ReferenceSampler", same, {"of": by_reference_sampler(twins)}
    yield "BatchAlign, norms", align("both", "q+k"), batch(2)
    yield "norms that stay on the network", same, batch(2)
    yield "norms, odd rows", same, {"of": parallel_alone(twins, cfg=1.0)}


def align(norms, attention, scale=1.0):
    def change(model):
        node = packs.part_of_pack(ALIGNED, "__init__").StyleAlignedBatchAlign
        return call(node, model=model, share_norm=norms, share_attn=attention, scale=scale)

    return change


def by_reference_sampler(twins):
    """The node's own sampling, of a reference that it puts into the latent step by step."""

    def run(model):
        samplers = twins.comfy.samplers
        sigmas = samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 3)
        reference = torch.randn(3, 4, 16, 12, generator=torch.Generator().manual_seed(4))
        positive, negative, style = (twins.prompt(model, seed) for seed in (1, 2, 3))
        settings = {"share_norm": "disabled", "share_attn": "q+k", "scale": 1.0, "batch_size": 2}
        given = {"positive": positive, "negative": negative, "ref_positive": style, "ref_latents": reference}
        node = packs.part_of_pack(ALIGNED, "__init__").StyleAlignedReferenceSampler
        sampler = samplers.sampler_object("euler")
        sampled = {"noise_seed": 5, "cfg": 3.0, "sampler": sampler, "sigmas": sigmas}
        return call(node, model=model, **settings, **sampled, **given)["samples"]

    return run
