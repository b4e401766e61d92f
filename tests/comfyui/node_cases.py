"""ComfyUI's own nodes that people hang on a MODEL and on CONDITIONING, and its samplers, for twins.py."""

import functools
from unittest.mock import patch

import comfy.k_diffusion.sampling as core_samplers
import comfy.samplers
import comfy_extras.nodes_apg as apg
import comfy_extras.nodes_cfg as cfg_nodes
import comfy_extras.nodes_context_windows as windows
import comfy_extras.nodes_custom_sampler as custom
import comfy_extras.nodes_differential_diffusion as differential
import comfy_extras.nodes_edit_model as edit
import comfy_extras.nodes_eps as eps
import comfy_extras.nodes_fresca as fresca
import comfy_extras.nodes_post_processing  # noqa: F401 - which the next one's import goes round to

import comfy_extras.nodes_latent as latents  # isort: skip
import comfy_extras.nodes_lumina2 as lumina
import comfy_extras.nodes_mahiro as mahiro
import comfy_extras.nodes_model_advanced as advanced
import comfy_extras.nodes_perpneg as perpneg
import comfy_extras.nodes_tcfg as tcfg
import torch
from twins import call

import nodes

MODELS = {
    "sd3.5-large": ("sd3.5-large.safetensors", {"cfg": 2}),
    "sdxl": ("unet-tiny.safetensors", {"patch": 2, "sliced": True}),
}


def hung(node, **inputs):
    """The node on the MODEL."""
    return lambda model: call(node, model=model, **inputs)


def weaker_guidance(share, args):
    return args["denoised"] * share


class WeakerGuidance:
    """A pack's own object in a function's place."""

    def __call__(self, args):
        return weaker_guidance(0.9, args)


def with_an_empty_cell():
    """A function that closes over a name which nobody has set yet."""

    def guide(args):
        return args["denoised"] * 0.9 if args else late

    if guide is None:
        late = None
    return guide


def guided_by(function):
    def change(model):
        model = model.clone()
        model.set_model_sampler_post_cfg_function(function)
        return model

    return change


def model_nodes(twins, name):
    """By what they are called: MODEL -> MODEL."""
    # Older cores' has one formula for all models; that of flow models is not the backend's.
    knows_flow = "is_flow" in advanced.RescaleCFG.patch.__code__.co_cellvars
    rescale = "RescaleCFG" if knows_flow or name == "sdxl" else "RescaleCFG of older cores"
    found = {
        rescale: hung(advanced.RescaleCFG, multiplier=0.6),
        "Mahiro": hung(mahiro.Mahiro),
        "FreSca": hung(fresca.FreSca, scale_low=1.0, scale_high=1.25, freq_cutoff=3),
        "APG": hung(apg.APG, eta=0.8, norm_threshold=5.0, momentum=0.2),
        "CFGZeroStar": hung(cfg_nodes.CFGZeroStar),
        "CFGNorm": hung(cfg_nodes.CFGNorm, strength=0.9),
        "TCFG": hung(tcfg.TCFG),
        "RenormCFG": hung(lumina.RenormCFG, cfg_trunc=100.0, renorm_cfg=1.0),
        "TemporalScoreRescaling": hung(eps.TemporalScoreRescaling, tsr_k=0.9, tsr_sigma=1.0),
        "LatentApplyOperationCFG": hung(
            latents.LatentApplyOperationCFG, operation=call(latents.LatentOperationTonemapReinhard, multiplier=0.8)
        ),
        "PerpNeg": lambda model: call(
            perpneg.PerpNeg, model=model, empty_conditioning=twins.prompt(model, 3), neg_scale=0.7
        ),
        "DifferentialDiffusion": hung(differential.DifferentialDiffusion, strength=0.8),
        "a pack's partial": guided_by(functools.partial(weaker_guidance, 0.8)),
        "a pack's object": guided_by(WeakerGuidance()),
        "a pack's closure": guided_by(with_an_empty_cell()),
    }
    if name == "sdxl":
        for kind in ("eps", "v_prediction", "lcm", "x0"):
            node = hung(advanced.ModelSamplingDiscrete, sampling=kind, zsnr=kind == "v_prediction")
            found[f"ModelSamplingDiscrete {kind}"] = node
        for kind in ("v_prediction", "eps", "edm"):
            node = hung(advanced.ModelSamplingContinuousEDM, sampling=kind, sigma_max=80.0, sigma_min=0.01)
            found[f"ModelSamplingContinuousEDM {kind}"] = node
        found["ContextWindowsManual"] = hung(
            windows.ContextWindowsManualNode,
            context_length=4,
            context_overlap=2,
            context_schedule="standard_static",
            context_stride=1,
            closed_loop=False,
            fuse_method="pyramid",
            dim=3,
            freenoise=False,
        )
        continuous = hung(advanced.ModelSamplingContinuousV, sampling="v_prediction", sigma_max=100.0, sigma_min=0.03)
        found["ModelSamplingContinuousV"] = continuous
    else:
        found["ModelSamplingSD3"] = lambda model: advanced.ModelSamplingSD3().patch(model, 5.0)[0]
        found["ModelSamplingAuraFlow"] = lambda model: advanced.ModelSamplingAuraFlow().patch_aura(model, 1.7)[0]
        sizes = {"max_shift": 1.15, "base_shift": 0.5, "width": 64, "height": 64}
        found["ModelSamplingFlux"] = hung(advanced.ModelSamplingFlux, **sizes)
    return found


def prompts(twins, name, model):
    """By what they are called: (positive, negative)."""
    plain, other, third = (twins.prompt(model, seed) for seed in (1, 2, 3))
    mask = torch.zeros(1, 64, 48)
    mask[:, :30, :20] = 1.0
    area = call(nodes.ConditioningSetArea, conditioning=plain, width=32, height=48, x=8, y=8, strength=0.8)
    ranged = call(nodes.ConditioningSetTimestepRange, conditioning=other, start=0.0, end=0.3)
    zero = call(nodes.ConditioningZeroOut, conditioning=other)
    combine = nodes.ConditioningCombine
    found = {
        "ConditioningSetArea": (call(combine, conditioning_1=area, conditioning_2=third), other),
        "ConditioningSetMask": (
            call(nodes.ConditioningSetMask, conditioning=plain, mask=mask, set_cond_area="default", strength=0.7),
            other,
        ),
        "ConditioningCombine": (call(combine, conditioning_1=plain, conditioning_2=third), other),
        "ConditioningConcat": (call(nodes.ConditioningConcat, conditioning_to=plain, conditioning_from=third), other),
        "ConditioningAverage": (
            nodes.ConditioningAverage().addWeighted(plain, third, 0.4)[0],
            other,
        ),
        "ConditioningZeroOut": (plain, zero),
        # The prompt itself, with nothing beside it.
        "ConditioningSetTimestepRange": (
            call(nodes.ConditioningSetTimestepRange, conditioning=plain, start=0.4, end=1.0),
            other,
        ),
        "ConditioningSetTimestepRange of all steps": (
            plain,
            call(nodes.ConditioningSetTimestepRange, conditioning=third, start=0.0, end=1.0),
        ),
        # As in the official SD3 workflow.
        "the official SD3 negative": (
            plain,
            call(
                combine,
                conditioning_1=call(nodes.ConditioningSetTimestepRange, conditioning=zero, start=0.3, end=1.0),
                conditioning_2=ranged,
            ),
        ),
        "ReferenceLatent": (
            call(edit.ReferenceLatent, conditioning=plain, latent={"samples": twins.latent(model)}),
            other,
        ),
    }
    if name == "sdxl":
        sizes = {"width": 512, "height": 448, "crop_w": 8, "crop_h": 0, "target_width": 640, "target_height": 640}
        found["CLIPTextEncodeSDXL's sizes"] = (
            [[plain[0][0], plain[0][1] | sizes]],
            [[other[0][0], other[0][1] | sizes | {"width": 100}]],
        )
    return found


def advanced_sampler(twins, sampler, sigmas_of, noise_seed=3, basic=False):
    """SamplerCustomAdvanced's latent."""

    def run(model, **_):
        positive, negative = twins.prompt(model, 1), twins.prompt(model, 2)
        if basic:
            guider = call(custom.BasicGuider, model=model, conditioning=positive)
        else:
            guider = call(custom.CFGGuider, model=model, positive=positive, negative=negative, cfg=3.0)
        noise = call(custom.RandomNoise, noise_seed=noise_seed) if noise_seed else call(custom.DisableNoise)
        out = custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas_of(model), twins_latent(twins, model))
        return torch.cat([out.result[0]["samples"], out.result[1]["samples"]])

    return run


def twins_latent(twins, model):
    return {"samples": twins.latent(model)}


def masked(twins, model):
    mask = torch.zeros(1, 1, 8, 6)
    mask[..., 2:6, 1:4] = torch.rand(4, 3, generator=torch.Generator().manual_seed(2))
    return mask


def inpainted(twins):
    """KSampler's latent on InpaintModelConditioning's prompts, for models that were not trained for them."""

    def run(model, **settings):
        prompts = []
        for seed in (1, 2):
            (tensor, options) = twins.prompt(model, seed)[0]
            more = {"concat_latent_image": twins.latent(model), "concat_mask": torch.ones(1, 1, 64, 48)}
            prompts.append([[tensor, options | more]])
        mask = masked(twins, model)
        return twins.sample(model, positive=prompts[0], negative=prompts[1], noise_mask=mask, **settings)

    return run


def told(twins):
    """The latents that a pack's callback sees, which is no plain function."""

    def run(model, **settings):
        seen = []
        twins.sample(
            model, callback=functools.partial(lambda seen, _, x0, *rest: seen.append(x0.cpu()), seen), **settings
        )
        return torch.cat(seen)

    return run


def replaced(twins, owner, name, wrapper=lambda own: lambda other: other, sampler="euler"):
    """KSampler's latent while a pack has its own function in ComfyUI's place."""

    def run(model, **settings):
        own = getattr(owner, name)

        @wrapper(own)
        def other(*args, **kwargs):
            return own(*args, **kwargs) * 0.95

        with patch.object(owner, name, other):
            return twins.sample(model, sampler=sampler, **settings)

    return run


def around_what_it_gives(own):
    """Of a function that gives a function: what that one gives is changed."""

    def wrapper(_):
        def other(*args, **kwargs):
            made = own(*args, **kwargs)
            return lambda *given: made(*given) * 0.5

        return other

    return wrapper


def with_object(name):
    """With an object patch in the place of one of the model's methods, whose tensors it multiplies."""

    def change(model):
        own, changed = model.get_model_object(name), model.clone()
        changed.add_object_patch(name, lambda *args, **kwargs: multiplied(own(*args, **kwargs)))
        return changed

    return change


def multiplied(given):
    if isinstance(given, torch.Tensor):
        return given * 1.5
    return {key: type(value)(value.cond * 1.5) for key, value in given.items()}


def same(model):
    return model


def cases(twins):
    for name, files in MODELS.items():
        local, _ = twins.pair(name, *files)
        for case in (*hung_cases(twins, name, local), *sampling_cases(twins, local), *custom_cases(twins)):
            yield name, *case


def hung_cases(twins, name, model):
    """Nodes on the MODEL and on CONDITIONING, and what packs put in place of ComfyUI's own."""
    changes = model_nodes(twins, name)
    for case, change in changes.items():
        yield case, change, {}
    for case, (positive, negative) in prompts(twins, name, model).items():
        yield case, same, {"positive": positive, "negative": negative}
    yield "InpaintModelConditioning", same, {"of": inpainted(twins)}
    yield "a pack's callback", same, {"of": told(twins)}
    for owner, function in ((comfy.samplers, "sampling_function"), (core_samplers, "sample_euler")):
        yield f"a pack's {function}", same, {"of": replaced(twins, owner, function)}
    own_sampler = replaced(twins, core_samplers, "sample_euler", functools.wraps)
    yield "a pack's sampler around core's", same, {"of": own_sampler}
    churned = functools.partial(core_samplers.sample_euler, s_churn=10.0)
    yield (
        "a pack's partial of core's sampler",
        same,
        {"of": replaced(twins, core_samplers, "sample_euler", lambda _: lambda _: churned)},
    )
    own_noise = replaced(twins, core_samplers, "default_noise_sampler", around_what_it_gives, "euler_ancestral")
    yield "a pack's default_noise_sampler", same, {"of": own_noise}
    own_model = replaced(twins, comfy.model_base.BaseModel, "apply_model", functools.wraps)
    yield "a pack's apply_model", same, {"of": own_model}
    for put in ("extra_conds", "process_latent_out"):
        yield f"a pack's object patch {put}", with_object(put), {}
    yield "DifferentialDiffusion, a mask", changes["DifferentialDiffusion"], {"noise_mask": masked(twins, model)}


def sampling_cases(twins, model):
    """What KSampler and KSamplerAdvanced are told."""
    yield "SetLatentNoiseMask", same, {"noise_mask": masked(twins, model)}
    whole = {"denoise": 1.0}
    yield "KSamplerAdvanced, start and end", same, {"start_step": 1, "last_step": 3, "steps": 5, **whole}
    no_noise = {"disable_noise": True, "start_step": 1, "steps": 3, "force_full_denoise": True, "last_step": 2}
    yield "KSamplerAdvanced, no noise", same, {**no_noise, **whole}
    yield "denoise 0", same, {"denoise": 0.0}
    yield "cfg 1", same, {"cfg": 1.0}
    for sampler in ("dpmpp_2m_sde", "dpmpp_2m_sde_gpu", "ddim", "uni_pc_bh2", "dpm_fast", "euler_cfg_pp"):
        yield f"sampler {sampler}", same, {"sampler": sampler, "steps": 3}


def custom_cases(twins):
    """Custom sampling."""

    def basic(model):
        return call(custom.BasicScheduler, model=model, scheduler="karras", steps=3, denoise=0.7)

    def flipped(model):
        return call(custom.FlipSigmas, sigmas=basic(model))

    select = call(custom.KSamplerSelect, sampler_name="dpmpp_2m")
    fast = call(custom.KSamplerSelect, sampler_name="dpm_fast")  # which step is its last nobody knows
    ancestral = call(custom.SamplerEulerAncestral, eta=1.0, s_noise=1.0)
    damped = call(custom.SamplerEulerAncestral, eta=0.5, s_noise=1.0)
    yield "SamplerCustomAdvanced", same, {"of": advanced_sampler(twins, select, basic)}
    yield "SamplerCustomAdvanced, BasicGuider", same, {"of": advanced_sampler(twins, fast, basic, basic=True)}
    yield "SamplerCustomAdvanced, DisableNoise", same, {"of": advanced_sampler(twins, select, basic, noise_seed=0)}
    yield "SamplerEulerAncestral", same, {"of": advanced_sampler(twins, ancestral, basic)}
    yield "SamplerEulerAncestral, eta 0.5", same, {"of": advanced_sampler(twins, damped, basic)}
    yield "FlipSigmas", same, {"of": advanced_sampler(twins, select, flipped)}
