"""ComfyUI's own guidance nodes that the backend's loop has, for twins.py."""

import comfy_extras.nodes_apg as apg
import comfy_extras.nodes_custom_sampler as custom
import comfy_extras.nodes_perpneg as perpneg
import meshes
import torch
from node_cases import hung
from twins import call

MODELS = meshes.models()


def cases(twins):
    """All on the first mesh of two ranks, and on others what they spread in other ways."""
    for number, name in enumerate(MODELS):
        yield from ((name, *case) for case in spread(twins))
        if meshes.WORLD == 2 and number == 0:
            yield from ((name, *case) for case in once(twins))


def batch(twins, model):
    return twins.latent(model, 9, 7).repeat(2, 1, 1, 1) * torch.tensor([1.0, 0.6]).reshape(2, 1, 1, 1)


def sampled(twins, **settings):
    """KSampler's latent, of two odd latents."""

    def run(model, **_):
        return twins.sample(model, latent=batch(twins, model), **settings)

    return run


def guided(twins, cfg, neg_scale, sampler="euler", tokens=24):
    """SamplerCustomAdvanced's latent with PerpNegGuider."""

    def run(model, **_):
        positive, negative, empty = twins.prompt(model, 1), twins.prompt(model, 2), twins.prompt(model, 3, tokens)
        prompts = {"positive": positive, "negative": negative, "empty_conditioning": empty}
        guider = call(perpneg.PerpNegGuider, model=model, cfg=cfg, neg_scale=neg_scale, **prompts)
        sigmas = call(custom.BasicScheduler, model=model, scheduler="karras", steps=2, denoise=0.7)
        noise = call(custom.RandomNoise, noise_seed=3)
        latent = {"samples": batch(twins, model)}
        sampler_object = call(custom.KSamplerSelect, sampler_name=sampler)
        return custom.SamplerCustomAdvanced.execute(noise, guider, sampler_object, sigmas, latent).result[0]["samples"]

    return run


def same(model):
    return model


def perp_neg(twins, neg_scale=0.7, tokens=24):
    return lambda model: call(
        perpneg.PerpNeg, model=model, empty_conditioning=twins.prompt(model, 3, tokens), neg_scale=neg_scale
    )


def spread(twins):
    momentum = hung(apg.APG, eta=0.5, norm_threshold=4.0, momentum=-0.6)
    yield "APG, momentum, heun", momentum, {"of": sampled(twins, sampler="heun", steps=3)}
    yield "PerpNeg, another length", perp_neg(twins, tokens=20), {"of": sampled(twins)}
    yield "PerpNegGuider", same, {"of": guided(twins, 4.0, 0.7, "dpmpp_2s_ancestral")}


def once(twins):
    yield "APG, no threshold", hung(apg.APG, eta=2.0, norm_threshold=0.0, momentum=0.0), {}
    yield "PerpNeg", perp_neg(twins), {}
    both = hung(apg.APG, eta=0.8, norm_threshold=5.0, momentum=0.2)
    yield "APG and PerpNeg", lambda model: both(perp_neg(twins)(model)), {}
    yield "PerpNegGuider, another length", same, {"of": guided(twins, 4.0, 0.7, tokens=20)}
    yield "PerpNegGuider, neg_scale 0", same, {"of": guided(twins, 4.0, 0.0)}
    yield "PerpNegGuider, cfg 1", same, {"of": guided(twins, 1.0, 0.7)}
    yield "PerpNegGuider, cfg 1, neg_scale 0", same, {"of": guided(twins, 1.0, 0.0)}
    # Core has zeros in uncond's place; and it keeps the average for the sampling that goes on.
    yield "step by step: APG, cfg 1", hung(apg.APG, eta=0.5, norm_threshold=5.0, momentum=0.0), {"cfg": 1.0}
    parted = {"start_step": 0, "last_step": 2, "steps": 4, "denoise": 1.0}
    yield "step by step: APG, a part", hung(apg.APG, eta=0.5, norm_threshold=5.0, momentum=0.3), parted
