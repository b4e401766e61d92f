"""The nodes of the pack ComfyUI-NAG, for twins.py."""

import os

import meshes
import packs
import torch

FOLDER = os.environ["NAG_PATH"]
NAME = "ComfyUI-NAG"
MODELS = meshes.models()
NUMBERS = {"nag_scale": 4.0, "nag_tau": 2.0, "nag_alpha": 0.5, "nag_sigma_end": 0.0}


class Sampled:
    """Samples as `Twins.sample` does, with one of the pack's nodes."""

    def __init__(self, twins):
        from comfy.ldm.chroma import layers
        from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock

        # The pack's other families import what cores after 0.8 have no longer, and need nothing of it here.
        layers.DoubleStreamBlock, layers.SingleStreamBlock = DoubleStreamBlock, SingleStreamBlock
        self.twins, self.nodes = twins, packs.part_of_pack(FOLDER, "node")

    def by_sampler(self, model, *, latent=None, other=24, steps=2, cfg=3.0, **numbers):
        latent = self.twins.latent(model) if latent is None else latent
        settings = {"seed": 5, "steps": steps, "sampler_name": "euler", "scheduler": "simple", "denoise": 0.8}
        given = settings | self._prompts(model, other) | NUMBERS | numbers
        node = self.nodes.KSamplerWithNAG()
        return node.sample(model, cfg=cfg, latent_image={"samples": latent}, **given)[0]["samples"]

    def by_guider(self, model, *, batch=1, of=None, **numbers):
        """Without guidance by a negative prompt."""
        latent = self.twins.latent(model)
        prompts = self._prompts(model, 24)
        given = {"conditioning": of or prompts["positive"], "nag_negative": prompts["nag_negative"]}
        of_batch = {"latent_image": {"samples": latent.expand(batch, -1, -1, -1)}}
        (guider,) = self.nodes.NAGGuider().get_guider(model, **given, **NUMBERS | numbers, **of_batch)
        samplers = self.twins.comfy.samplers
        sigmas = samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 2)
        noise = self.twins.comfy.sample.prepare_noise(latent, 5)
        return guider.sample(noise, latent, samplers.sampler_object("euler"), sigmas, seed=5, disable_pbar=True)

    def by_another_version(self, model, **settings):
        """Whose formula is another one."""
        parts = [packs.part_of_pack(FOLDER, name) for name in ("sd.attention", "sd3.mmdit")]
        formulas = [part.nag for part in parts]
        for part in parts:
            part.nag = lambda positive, negative, scale, *_: positive + scale * (positive - negative)
        try:
            return self.by_sampler(model, **settings)
        finally:
            for part, formula in zip(parts, formulas, strict=True):
                part.nag = formula

    def _prompts(self, model, other):
        kinds = (("positive", 1, 24), ("negative", 2, 24), ("nag_negative", 3, other))
        return {kind: self.twins.prompt(model, seed, tokens) for kind, seed, tokens in kinds}


def as_it_is(model):
    return model


def cases(twins):
    """All on the first mesh of 2 ranks, of others those that differ by mesh."""
    sampled = Sampled(twins)
    for number, name in enumerate(MODELS):
        for case, settings in every(sampled, 4 if name.startswith("sdxl") else 16):
            if (meshes.WORLD == 2 and number % 2 == 0) or case in ("a batch", "step by step"):
                yield name, f"{NAME}: {case}", settings.pop("change", as_it_is), settings


def every(sampled, channels):
    batch = torch.randn(2, channels, 21, 13, generator=torch.Generator().manual_seed(9))
    yield "a batch", {"of": sampled.by_sampler, "latent": batch}
    yield "a longer prompt", {"of": sampled.by_sampler, "other": 41}
    yield "a shorter prompt", {"of": sampled.by_sampler, "other": 9}
    yield "cfg 1, some steps", {"of": sampled.by_sampler, "cfg": 1.0, "steps": 4, "nag_sigma_end": 0.6}
    yield "step by step", {"of": sampled.by_sampler, "change": step_by_step, "latent": batch}
    yield "NAGGuider", {"of": sampled.by_guider}
    yield "another version", {"of": sampled.by_another_version}
    yield "a scale of 1 after it", {"of": sampled.by_sampler, "nag_scale": 1.0}
    if channels == 4:  # on the other family the pack itself fails
        yield "NAGGuider of another batch", {"of": sampled.by_guider, "batch": 2}


def step_by_step(model):
    model = model.clone()
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
    return model
