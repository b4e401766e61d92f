"""ControlNets of ComfyUI-Advanced-ControlNet, by its own nodes, on a local MODEL and on its parallel twin, for twins.py."""

import functools
import importlib
import os

import comfy.model_detection
import folder_paths
import torch
from control_cases import (
    SmallVAE,
    image,
    loaded,
    lora_file,
    mahiro,
    random_weights,
    same,
    sdxl_control,
    shifted,
    t2i_adapter,
    union_control,
    with_lora,
)
from packs import part_of_pack
from refusals import refused
from safetensors.torch import load_file, save_file
from twins import call

import nodes

FILES = {"sdxl": "unet-layers.safetensors", "union": "unet-320.safetensors"}
FILES |= {name: f"{name}.safetensors" for name in ("sd3-medium", "sd3.5-large")}
# By the number of ranks.
WORLDS = {
    1: {"sdxl": {}, "sd3.5-large": {}},
    2: {
        "sdxl, cfg": {"cfg": 2},
        "sdxl, patch": {"patch": 2},
        "union": {"patch": 2},
        "sd3-medium": {"tp": 2},
        "sd3.5-large": {"ulysses": 2},
    },
}
WORLD = int(os.environ["TWINS_WORLD"])
MODELS = {name: (FILES[name.split(",")[0]], mesh) for name, mesh in WORLDS[WORLD].items()}
PACK = "ComfyUI-Advanced-ControlNet"
# On meshes beside the first, and on one rank: of each kind the case that asks the most of it.
FEW = {
    *("mask, an odd size", "keyframes of all kinds, a batch of 2", "between files of the ranks", "Control-LoRA"),
    *("T2I-Adapter", "InstantX's, mask and keyframes", "stability, mask and keyframes", "stability, double"),
}
LLLITE = "can't honour the ControlNet ControlLLLiteAdvanced of "
LONG = {"steps": 4, "denoise": 1.0}


def of(part):
    return part_of_pack(os.environ["ADVANCED_CONTROLNET_PATH"], f"adv_control.{part}")


# Packs are there before MODELs are.
of("nodes_main")


def load(name, **keyframes):
    return call(of("nodes_main").ControlNetLoaderAdvanced, cnet=name, **keyframes)


def apply(twins, model, control, strength=0.8, start=0.0, end=1.0, hint=None, **more):
    """Prompts by Apply Advanced ControlNet; `positive` and `negative` may have ControlNets already."""
    pair = more.pop("positive", None) or twins.prompt(model, 1), more.pop("negative", None) or twins.prompt(model, 2)
    hint = image() if hint is None else hint
    out = of("nodes_main").AdvancedControlNetApply.execute(*pair, control, hint, strength, start, end, **more).result
    return {"positive": out[0], "negative": out[1]}


def apply_core(twins, model, control, pair=None, **more):
    """Prompts by core's own node."""
    pair = pair or {"positive": twins.prompt(model, 1), "negative": twins.prompt(model, 2)}
    out = nodes.ControlNetApplyAdvanced().apply_controlnet(
        **pair, control_net=control, image=image(seed=8), strength=0.6, start_percent=0.0, end_percent=0.7, **more
    )
    return {"positive": out[0], "negative": out[1]}


def mask(batch=1):
    generator = torch.Generator().manual_seed(10)
    return torch.rand(batch, 64, 48, generator=generator).round()


def keyframes(**more):
    """Three, of falling strength."""
    node = of("nodes_keyframes").TimestepKeyframeNode
    first = call(node, start_percent=0.0, strength=1.0, guarantee_steps=1, **more)
    second = call(node, start_percent=0.3, strength=0.6, prev_timestep_kf=first, guarantee_steps=1)
    return call(node, start_percent=0.7, strength=0.2, prev_timestep_kf=second, guarantee_steps=1)


def soft_weights():
    return call(of("nodes_weight").ScaledSoftUniversalWeights, base_multiplier=0.7, uncond_multiplier=0.4)


def masked_weights():
    settings = {"min_base_multiplier": 0.2, "max_base_multiplier": 0.9, "uncond_multiplier": 0.5}
    return call(of("nodes_weight").ScaledSoftMaskedUniversalWeights, mask=mask(), **settings)


def own_weights():
    settings = {f"output_{number}": 0.3 + 0.05 * number for number in range(12)}
    extras = call(of("nodes_weight").ExtrasMiddleMultNode, middle_mult=0.5)
    return call(of("nodes_weight").CustomControlNetWeightsSD15, **settings, middle_0=0.8, cn_extras=extras)


def latent_keyframes():
    node = of("nodes_keyframes").LatentKeyframeNode
    return call(node, batch_index=1, strength=0.9, prev_latent_kf=call(node, batch_index=0, strength=0.3))


def cases(twins):
    importlib.import_module("pack.nodes.controlnet_files").remember_files()
    folder_paths.folder_names_and_paths["controlnet"] = ([twins.folder], {".safetensors"})
    for number, name in enumerate(MODELS):
        model, kind = twins.pair(name, *MODELS[name])[0], name.split(",")[0]
        found = {"sdxl": sdxl_cases, "union": union_cases}.get(kind, functools.partial(sd3_cases, name=name))(
            twins, model
        )
        some = None if WORLD == 2 and (number == 0 or kind != "sdxl") else FEW
        yield from ((name, f"{PACK}: {case}", *more) for case, *more in found if some is None or case in some)


def sdxl_cases(twins, model):
    one, apply_to = load("control-one.safetensors"), functools.partial(apply, twins, model)
    yield "strength", same, apply_to(one)
    yield "cfg 1", same, apply_to(one) | {"cfg": 1.0}
    yield "range", same, apply_to(one, start=0.2, end=0.7) | LONG
    yield "mask", same, apply_to(one, mask_optional=mask())
    yield "mask, an odd size", same, apply_to(one, mask_optional=mask()) | {"latent": twins.latent(model, 11, 7)}
    yield "keyframes", same, apply_to(one, timestep_kf=keyframes()) | LONG
    yield (
        "keyframes of the loader, dpmpp_2s_ancestral",
        same,
        apply_to(load("control-two.safetensors", _tk_opt=keyframes())) | LONG | {"sampler": "dpmpp_2s_ancestral"},
    )
    between = {"start_percent": 0.0, "end_percent": 1.0, "strength_start": 1.0, "strength_end": 0.1}
    node = of("nodes_keyframes").TimestepKeyframeInterpolationNode
    many = call(node, **between, interpolation="ease-in", intervals=10)
    yield "interpolated keyframes", same, apply_to(one, timestep_kf=many) | LONG
    yield "soft weights", same, apply_to(one, weights_override=soft_weights())
    yield "masked weights", same, apply_to(one, weights_override=masked_weights())
    yield "own weights", same, apply_to(one, weights_override=own_weights())
    two = {"latent": torch.zeros(2, 4, 8, 6)}
    yield "latent keyframes, a batch of 2", same, apply_to(one, latent_kf_override=latent_keyframes()) | two
    of_all = keyframes(
        cn_weights=soft_weights(),
        latent_keyframe=latent_keyframes(),
        mask_optional=mask(),
        null_latent_kf_strength=0.2,
    )
    given = apply_to(one, timestep_kf=of_all, mask_optional=mask(2), hint=image(batch=2))
    yield "keyframes of all kinds, a batch of 2", same, given | two | LONG
    by_node = functools.partial(twins.by_parallel_sampler, latent={"samples": twins.latent(model)})
    yield "by Parallel Sampler", same, {"of": functools.partial(by_node, **apply_to(one, mask_optional=mask()))}
    yield from kinds(twins, model, apply_to)
    yield from chains(twins, model, apply_to, one)
    yield from in_blocks(twins, model)


def kinds(twins, model, apply_to):
    lora_file(twins, model)
    lora = load("control-lora.safetensors")
    weighted = {"mask_optional": mask(), "timestep_kf": keyframes(), "weights_override": soft_weights()}
    yield "Control-LoRA", same, apply_to(lora, **weighted) | LONG
    yield (
        "T2I-Adapter",
        same,
        apply_to(t2i_adapter(model), hint=image(96, 64), **weighted) | LONG | {"latent": twins.latent(model, 12, 8)},
    )
    difference = functools.partial(of_difference, twins, apply_to, weighted)
    yield "a file of differences", same, {"of": difference}
    yield "a file of differences, on a MODEL with a LoRA", with_lora, {"of": difference}
    yield "core's, without a file", same, apply_to(sdxl_control(model), **weighted)


def of_difference(twins, apply_to, weighted, model):
    """Of what is added to the MODEL's own weights when it is loaded."""
    tensors = load_file(os.path.join(twins.folder, "control-two.safetensors"))
    save_file(tensors | {"difference": torch.zeros(1)}, os.path.join(twins.folder, "control-difference.safetensors"))
    node = of("nodes_main").DiffControlNetLoaderAdvanced
    control = call(node, model=model, cnet="control-difference.safetensors")
    return twins.sample(model, **apply_to(control, **weighted), **LONG)


def chains(twins, model, apply_to, one):
    """Of core's ControlNets, which the ranks compute, and this pack's."""
    core = loaded(twins, "control-two.safetensors")
    before = apply_core(twins, model, core)
    weighted = {"mask_optional": mask(), "weights_override": soft_weights()}
    yield "after a file of the ranks", same, apply_to(one, **before, **weighted) | LONG
    yield "before a file of the ranks", same, apply_core(twins, model, core, apply_to(one, **weighted)) | LONG
    middle = apply_to(one, **before, **weighted, timestep_kf=keyframes())
    between = apply_core(twins, model, loaded(twins, "control-one.safetensors"), middle)
    yield "between files of the ranks", same, between | LONG
    yield "between files of the ranks, mahiro", mahiro, between | LONG
    twice = apply_to(load("control-two.safetensors"), **apply_to(one, **weighted), timestep_kf=keyframes())
    yield "two", same, twice | LONG
    yield "core's loader", same, apply_to(core, **weighted)
    yield "core's Apply", same, apply_core(twins, model, one)
    single = of("nodes_main").AdvancedControlNetApplySingle
    given = {"control_net": one, "image": image(), "strength": 0.7, "start_percent": 0.0, "end_percent": 1.0}
    yield "Apply to one", same, {"positive": call(single, conditioning=twins.prompt(model, 1), **given, **weighted)}
    yield "on one prompt", same, {"positive": apply_to(one, **weighted)["positive"]}
    area = call(nodes.ConditioningSetArea, before["positive"], 32, 48, 0, 0, 0.9)
    yield "of areas", same, apply_to(one, positive=area + twins.prompt(model, 3), **weighted)


def in_blocks(twins, model):
    """What this pack calls ControlNets as well, and what works inside the blocks: each is refused before the first step."""
    apply_to = functools.partial(apply, twins, model)
    reference = call(of("nodes_reference").ReferenceControlNetNode, "reference_attn+adain", 0.5, 1.0)
    hint = of("control_reference").ReferencePreprocWrapper(twins.latent(model))
    lllite(twins, model)
    patches = load("control-lllite.safetensors")
    one = load("control-one.safetensors")
    after = apply_core(twins, model, loaded(twins, "control-two.safetensors"), apply_to(patches, start=0.2))
    for case, words, given in (
        ("Reference ControlNet", "adv_control.control_reference", apply_to(reference, hint=hint)),
        (
            "Reference ControlNet on another",
            "adv_control.control_reference",
            apply_to(reference, **apply_to(one), hint=hint),
        ),
        ("ControlLLLite", LLLITE, apply_to(patches)),
        ("ControlLLLite from the second step on", LLLITE, apply_to(patches, start=0.2)),
        ("ControlLLLite, then another", LLLITE, apply_to(one, **apply_to(patches, start=0.2))),
        ("ControlLLLite, then a file of the ranks", LLLITE, after),
    ):
        yield (
            case,
            same,
            {"of": functools.partial(refused, twins, words, lambda model, given=given: (model, given | LONG))},
        )


def lllite(twins, model):
    """A file of such patches, for one attention."""
    name = "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    width = model.model.diffusion_model.input_blocks[4][1].transformer_blocks[0].attn1.to_q.in_features
    module = of("control_lllite").LLLiteModule(name, is_conv2d=False, in_dim=width, depth=2, cond_emb_dim=16, mlp_dim=8)
    tensors = random_weights(module, 12).state_dict()
    save_file(
        {f"{name}.{key}": tensor for key, tensor in tensors.items()},
        os.path.join(twins.folder, "control-lllite.safetensors"),
    )


def sd3_cases(twins, model, name):
    family = {"sd3-medium": "sd3"}.get(name, name)
    vae, control = VAE(), load(f"control-{family}-instantx.safetensors")
    apply_to = functools.partial(apply, twins, model, vae_optional=vae)
    weighted = {"mask_optional": mask(), "timestep_kf": keyframes(), "weights_override": soft_weights()}
    yield "InstantX's", same, apply_to(control)
    yield "InstantX's, mask and keyframes", same, apply_to(control, **weighted) | LONG
    yield "InstantX's, an odd size", same, apply_to(control, **weighted) | {"latent": twins.latent(model, 10, 14)}
    yield "InstantX's, a range by the MODEL's own shift", shifted, apply_to(control, end=0.5, **weighted) | LONG
    core = loaded(twins, f"control-{family}-instantx.safetensors")
    chained = apply_core(twins, model, core, apply_to(control, **weighted), vae=vae)
    yield "InstantX's, before a file of the ranks", same, chained | LONG
    if family == "sd3":
        return
    for kind in ("stability", "stability, double"):
        control = load(f"control-{family}-{kind}.safetensors")
        yield f"{kind}", same, apply_to(control)
        yield f"{kind}, mask and keyframes", same, apply_to(control, **weighted) | LONG
        chained = apply_to(control, **apply_core(twins, model, core, vae=vae), **weighted)
        yield f"{kind}, after a file of the ranks", same, chained | LONG


class VAE(SmallVAE):
    """As this pack asks one too."""

    downscale_ratio = 8


def union_cases(twins, model):
    """ControlNet++; core finds no other sizes than the true ones in such a file."""
    union_control(twins, model)
    config, detection = model.model.model_config.unet_config, comfy.model_detection
    found = detection.unet_config_from_diffusers_unet
    detection.unet_config_from_diffusers_unet = lambda *_, **__: dict(config)
    try:
        single = of("nodes_plusplus").PlusPlusLoaderSingle
        control = call(single, name="control-union.safetensors", control_type="depth")
    finally:
        detection.unet_config_from_diffusers_unet = found
    weighted = {"mask_optional": mask(), "timestep_kf": keyframes(), "weights_override": soft_weights()}
    yield "ControlNet++", same, apply(twins, model, control, **weighted) | LONG
