"""Image prompts beside regional prompts and NegPiP, by their packs' own nodes, for twins.py."""

import functools
import os

import comfy_extras.nodes_pag as pag
import image_prompt_cases as pictures
import region_cases as regions
from block_cases import both
from refusals import named
from twins import call

MODELS = {name: found for name, found in pictures.MODELS.items() if name != pictures.HALVES}
NEEDED = ("IPADAPTER_PLUS", "INSTANTID", "PULID", "PPM_PATH", "CGEM156_PATH", "PROMPT_CONTROL_PATH")
# On meshes beside the first: what mixes tokens of all bands, and what differs by row.
FEW = ("PuLID's style, cgem156's, two latents", "IPAdapter with a mask, ppm's with NegPiP")


def cases(twins):
    """None where one of the packs isn't there."""
    if not all(name in os.environ for name in NEEDED):
        return
    for number, name in enumerate(MODELS):
        is_first = number == 0 and pictures.WORLD == 2
        found = (case for case in of_one(twins) if is_first or case[0] in FEW)
        yield from ((name, f"REGIONS: {case}", *rest) for case, *rest in found)


def of_one(twins):
    cgem, ppm, negpip, control = regions.packs()
    drawn = pictures.drawn
    found = {name: {case: change for case, change, _ in of(twins)} for name, of in OF_PACKS.items()}
    plain, two = found["IPADAPTER_PLUS"]["two pictures"], found["IPADAPTER_PLUS"]["two, one masked, some steps"]
    masked = found["IPADAPTER_PLUS"]["mask, an odd size, a batch"]
    split, coupled = regions.with_negpip(negpip), regions.ppm_coupled(twins, ppm)
    odd = {"of": regions.sized(twins, *regions.ODD)}
    two_odd = {"latent": drawn(2, 4, *regions.ODD, seed=3)}

    of_four = regions.cgem_coupled(twins, cgem, (128, 96))
    style = found["PULID"]["style"]
    yield "PuLID's style, cgem156's, two latents", both(style, of_four), {"latent": drawn(2, 4, 16, 12, seed=3)}
    with_both = both(masked, split, regions.ppm_coupled(twins, ppm))
    yield "IPAdapter with a mask, ppm's with NegPiP", with_both, {"of": regions.doubled(twins)}
    yield "IPAdapter with a mask, ppm's, two latents", both(coupled, masked), two_odd
    yield "IPAdapter and NegPiP", both(masked, split), {"of": regions.doubled(twins)}
    yield "InstantID's, ppm's, step by step", pictures.stepwise(both(found["INSTANTID"]["plain"], coupled)), two_odd
    steps = {"of": functools.partial(regions.masked(twins, control), steps=4)}
    yield "two IPAdapters of some steps, prompt-control's", two, steps
    guided = lambda model: call(pag.PerturbedAttentionGuidance, model=model, scale=2.0)  # noqa: E731
    yield "IPAdapter, ppm's and PAG, step by step", both(plain, coupled, guided), odd
    far = {"negative": twins.prompt(twins.pair("sdxl", *pictures.MODELS["sdxl"])[0], 2, 24 * 5)}
    yield "prompts apart, step by step", both(plain, coupled), far | {"of": regions.sized(twins, *regions.ODD)}
    words = ["An image prompt (Attn2Replace of", "can't be computed"]
    refused = functools.partial(named, twins, words, regions.sized(twins, *regions.ODD))
    yield "two prompts for one latent", both(plain, one_region(twins, ppm)), {"of": refused}


def one_region(twins, node):
    """Three rows of an evaluation, for which the packs have keys of two."""
    base, one, _ = regions.masks(regions.ODD)

    def change(model):
        first = twins.prompt(model, 3, 12)
        given = {"base_cond": twins.prompt(model, 1), "cond_1": first, "mask_1": one}
        return call(node.AttentionCouplePPM, model=model, base_mask=base + 0.05, **given)

    return change


OF_PACKS = {"IPADAPTER_PLUS": pictures.of_ipadapter, "INSTANTID": pictures.of_instantid, "PULID": pictures.of_pulid}
