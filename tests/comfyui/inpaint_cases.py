"""Inpainting, editing and EDM UNets, and the nodes for inpainting and editing on these and on plain models, for twins.py."""

import functools
import importlib
import os
import pathlib

import comfy_extras.nodes_custom_sampler as custom
import comfy_extras.nodes_differential_diffusion as differential
import comfy_extras.nodes_ip2p as ip2p
import comfy_extras.nodes_model_merging as merging
import patch_cases
import torch
from refusals import named
from twins import call

import nodes

MODELS = {
    "inpainting": ("unet-inpainting.safetensors", {"cfg": 2}),
    "inpainting, bands": ("unet-inpainting.safetensors", {"patch": 2}),
    "inpainting, single": ("unet-inpainting.safetensors", {"dp": 2}),
    "editing": ("unet-editing.safetensors", {"patch": 2, "sliced": True}),
    "EDM v editing": ("unet-cosxl-edit.safetensors", {"cfg": 2}),
    "EDM v": ("unet-cosxl.safetensors", {"patch": 2}),
    "Playground": ("unet-playground.safetensors", {"cfg": 2}),
    "plain": ("unet-tiny.safetensors", {"patch": 2}),
    "sd3": ("sd3-medium.safetensors", {"cfg": 2}),
}
ROWS, COLUMNS = 8, 6
# Those that get all that workflows do, and those that heed a picture no more than before.
IN_FULL, HEEDLESS = ("inpainting", "editing"), ("plain", "sd3")
STEP_BY_STEP = "euler_cfg_pp"


class Encoder:
    """A VAE as nodes ask it, which takes no time: the means of squares of 8 pixels, mixed."""

    downscale_ratio = 8  # as older cores ask

    def __init__(self, model):
        self.channels = model.model.latent_format.latent_channels

    def spacial_compression_encode(self):
        return 8

    def encode(self, pixels):
        means = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        mix = torch.randn(self.channels, 3, generator=torch.Generator().manual_seed(4))
        return 4 * torch.einsum("ck,bkyx->bcyx", mix, means)


def picture(rows=ROWS, columns=COLUMNS, batch=1, beyond=0):
    """Pixels and a mask; `beyond` whole cells."""
    generator = torch.Generator().manual_seed(6)
    height, width = 8 * rows + beyond, 8 * columns + beyond
    mask = torch.zeros(batch, height, width)
    mask[:, height // 4 : -height // 4, width // 3 :] = 1
    return torch.rand(batch, height, width, 3, generator=generator), mask


def prompts(twins, model):
    return {"positive": twins.prompt(model, 1), "negative": twins.prompt(model, 2)}


def inpainted(twins, model, noise_mask=True, **size):
    """InpaintModelConditioning's prompts and latent."""
    pixels, mask = picture(**size)
    given = prompts(twins, model)
    positive, negative, latent = nodes.InpaintModelConditioning().encode(
        **given, pixels=pixels, vae=Encoder(model), mask=mask, noise_mask=noise_mask
    )
    return {"positive": positive, "negative": negative, **as_sampled(latent)}


def edited(twins, model, **size):
    """InstructPixToPixConditioning's prompts and latent."""
    pixels, _ = picture(**size)
    given = prompts(twins, model)
    positive, negative, latent = ip2p.InstructPixToPixConditioning.execute(
        **given, pixels=pixels, vae=Encoder(model)
    ).result
    return {"positive": positive, "negative": negative, "denoise": 1.0, **as_sampled(latent)}


def encoded(twins, model, **size):
    """VAEEncodeForInpaint's latent."""
    pixels, mask = picture(**size)
    return as_sampled(call(nodes.VAEEncodeForInpaint, vae=Encoder(model), pixels=pixels, mask=mask, grow_mask_by=6))


def masked(twins, model, batch=1):
    """SetLatentNoiseMask's latent."""
    latent = {"samples": twins.latent(model).repeat(batch, 1, 1, 1)}
    return as_sampled(call(nodes.SetLatentNoiseMask, samples=latent, mask=picture()[1]))


def as_sampled(latent):
    return {"latent": latent["samples"]} | {key: latent[key] for key in ("noise_mask",) if key in latent}


def one_sided(twins, model):
    """The positive prompt alone knows of the picture."""
    return edited(twins, model) | {"negative": twins.prompt(model, 2)}


def other_size(twins, model):
    """The picture is half as large as what is drawn, and one for two."""
    latent = torch.randn(2, twins.latent(model).shape[1], 15, 11, generator=torch.Generator().manual_seed(8))
    given = {key: value for key, value in inpainted(twins, model).items() if key != "noise_mask"}
    return given | {"latent": latent}


def several(twins, model):
    """Two prompts that share the picture: the core's own loop mixes them."""
    given = inpainted(twins, model)
    area = call(nodes.ConditioningSetArea, given["positive"], width=32, height=32, x=8, y=16, strength=0.7)
    return given | {"positive": [*given["positive"], *area]}


def sampled(twins, prepare, more, model):
    return twins.sample(model, **prepare(twins, model), **more)


def dual_guided(twins, model):
    """As edit models are sampled: SamplerCustomAdvanced with DualCFGGuider."""
    given = edited(twins, model)
    pair = {"cond1": given["positive"], "cond2": given["negative"], "negative": twins.prompt(model, 3)}
    guider = call(
        custom.DualCFGGuider, model=model, **pair, cfg_conds=4.0, cfg_cond2_negative=1.5, **known_style(custom)
    )
    return advanced(model, guider, given["latent"])


def known_style(module):
    inputs = {found.id for found in module.DualCFGGuider.define_schema().inputs}
    return {"style": "regular"} if "style" in inputs else {}


def guided(twins, model):
    """SamplerCustomAdvanced with CFGGuider."""
    given = inpainted(twins, model)
    pair = {"positive": given["positive"], "negative": given["negative"]}
    return advanced(model, call(custom.CFGGuider, model=model, **pair, cfg=3.0), given["latent"])


def advanced(model, guider, latent):
    sigmas = call(custom.BasicScheduler, model=model, scheduler="karras", steps=2, denoise=1.0)
    sampler, noise = call(custom.KSamplerSelect, sampler_name="euler"), call(custom.RandomNoise, noise_seed=3)
    out = custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, {"samples": latent})
    return torch.cat([out.result[0]["samples"], out.result[1]["samples"]])


def by_parallel_sampler(twins, model):
    given = inpainted(twins, model)
    latent = {"samples": given["latent"], "noise_mask": given["noise_mask"]}
    return twins.by_parallel_sampler(model, latent, given["positive"], given["negative"])


def beside_a_plain_latent(model):
    """By a wrapper, as packs for other models do: channels that this one has no weights for."""
    model = model.clone()

    def wrapper(apply_model, given):
        extra = torch.zeros_like(given["input"])
        return apply_model(given["input"], given["timestep"], **given["c"] | {"c_concat": extra})

    model.set_model_unet_function_wrapper(wrapper)
    return model


def refused(twins, words, change, given, model):
    """Where the parallel MODEL names what it can't take; a local one fails in a layer."""
    return named(
        twins, (words,), lambda model: twins.sample(change(model), positive=twins.prompt(model, 1, **given)), model
    )


def in_core(model):
    """What ComfyUI takes the file for, as numbers: its class, what it puts beside a latent, its latents and its sigmas."""
    found, latent = model.model, torch.ones(1, model.model.latent_format.latent_channels, 2, 2)
    kind, keys = type(found).__name__, " ".join(found.concat_keys)
    sampling = " ".join(base.__name__ for base in type(found.model_sampling).__bases__)
    told = [sum(map(ord, words)) / 100 for words in (kind, keys, sampling, type(found.latent_format).__name__)]
    ends = torch.tensor([found.model_sampling.sigma_max, found.model_sampling.sigma_min]).log()
    numbers = torch.tensor([*told, found.diffusion_model.in_channels, found.model_sampling.sigma_data])
    return torch.cat([numbers, ends, found.process_latent_in(latent).flatten()])


def recognised(twins, name, model):
    """`in_core`; the pack takes the file and the MODEL for a UNet of SDXL's."""
    family = importlib.import_module("pack.nodes.family")
    path = pathlib.Path(twins.folder, MODELS[name][0])
    assert family.kind_of_file(path) == family.kind_of_model(model.model) == "unet"
    # As if it were a latent: what the twins are compared by.
    told = in_core(model)
    return torch.cat([told, told.new_zeros(-len(told) % 4)]).view(1, 4, -1, 1)


def parallelized(twins, name, model):
    """Parallelize Model on the local MODEL, in place of the parallel one."""
    if not isinstance(model, twins.remote_model.RemotePatcher):
        return model
    names = ("nodes.parallel_mesh", "nodes.loader_file", "parallel_backend.config")
    pack = {part: importlib.import_module(f"pack.{part}") for part in names}
    spec = pack["parallel_backend.config"].BackendSpec(twins.backend.spec.name, 2)
    mesh = pack["nodes.parallel_mesh"].ParallelMesh(spec, {"cfg": 2, "patch": 1}, "float32", "auto")
    mesh._backend = twins.backend
    local, _ = twins.pair(name, *MODELS[name])
    if pack["nodes.loader_file"].left(local) is None:  # an older core, where Everywhere leaves it
        args = (os.path.join(twins.folder, MODELS[name][0]), {"dtype": torch.float32})
        pack["nodes.loader_file"].leave(local, twins.comfy.sd.load_diffusion_model, args)
    return importlib.import_module("pack.nodes.parallelize").parallelized(local, mesh)[0]


def with_difference(twins, model):
    """As inpainting models of finetunes are made: what these changed on the plain model is added to the inpainting one."""
    plain = twins.pair("plain", *MODELS["plain"])[isinstance(model, twins.remote_model.RemotePatcher)]
    change = call(merging.ModelSubtract, patch_cases.merged(plain, 2), plain, multiplier=1.0)
    return call(merging.ModelAdd, model, change)


def under_diffusers_names(twins, name, model):
    """Of a file in that layout, in place of the parallel one."""
    if not isinstance(model, twins.remote_model.RemotePatcher):
        return model
    path = pathlib.Path(twins.folder, "renamed", MODELS[name][0])
    remote = twins.backend.load_model(path, twins.mesh(patch=2), "float32")
    renamed = twins.remote_model.remote_patcher(remote, path, 1)
    assert torch.equal(in_core(renamed), in_core(model))
    return renamed


def of_model(name):
    """What is done to a MODEL of each kind: by name, the settings, and what KSampler is told beside them."""
    yield "InpaintModelConditioning", inpainted, {}
    yield "InpaintModelConditioning, no noise mask", functools.partial(inpainted, noise_mask=False), {}
    yield "VAEEncodeForInpaint", encoded, {}
    yield "SetLatentNoiseMask", masked, {}
    yield "InstructPixToPixConditioning", edited, {}
    yield "one prompt with the picture", one_sided, {}
    yield "a picture of another size, two latents", other_size, {}
    yield "no picture", prompts, {}
    yield "no picture, an empty latent", lambda twins, model: {"latent": torch.zeros_like(twins.latent(model))}, {}
    yield "odd size", functools.partial(inpainted, rows=11, columns=7, beyond=5), {"sampler": "dpmpp_2m"}
    yield "batch of 2", functools.partial(inpainted, batch=2), {"sampler": "uni_pc", "steps": 3}
    if name in HEEDLESS:
        return
    yield "cfg 1", inpainted, {"cfg": 1.0, "sampler": "dpmpp_2m"}
    yield "step by step", functools.partial(inpainted, batch=2), {"sampler": STEP_BY_STEP}
    yield "two prompts", several, {}


def cases(twins):
    for name in MODELS:
        yield from in_full(twins, name) if name in (*IN_FULL, *HEEDLESS) else in_short(twins, name)
    for case, change, given in (
        ("c_concat by a wrapper", beside_a_plain_latent, {}),
        ("c_concat on CONDITIONING", same, {"noise_concat": torch.zeros(1, 4, ROWS, COLUMNS)}),
    ):
        words = "this model takes the latent's 4 alone"
        yield "plain", case, same, {"of": functools.partial(refused, twins, words, change, given)}


def same(model):
    return model


def in_full(twins, name):
    for case, prepare, more in of_model(name):
        yield name, case, same, {"of": functools.partial(sampled, twins, prepare, more)}
    diffused = functools.partial(call, differential.DifferentialDiffusion, strength=0.8)
    of_prompts = functools.partial(sampled, twins, inpainted, {})
    yield name, "DifferentialDiffusion", lambda model: diffused(model=model), {"of": of_prompts}
    if name not in HEEDLESS:
        yield name, "DualCFGGuider", same, {"of": functools.partial(dual_guided, twins)}
        yield name, "CFGGuider", same, {"of": functools.partial(guided, twins)}
        yield name, "Parallel Sampler", same, {"of": functools.partial(by_parallel_sampler, twins)}
        yield name, "Parallelize Model", functools.partial(parallelized, twins, name), {"of": of_prompts}
        yield name, "what ComfyUI takes it for", same, {"of": functools.partial(recognised, twins, name)}
        renamed = functools.partial(under_diffusers_names, twins, name)
        yield name, "under diffusers' names", renamed, {"of": of_prompts}
        lora = functools.partial(patch_cases.lora_file, kind="lora")
        yield name, "LoRA", patch_cases.with_lora(twins, (lora, 0.8)), {"of": of_prompts}
    if name == "inpainting":
        yield name, "ModelMergeAdd of a plain model's", functools.partial(with_difference, twins), {"of": of_prompts}


def in_short(twins, name):
    prepare = edited if "editing" in name else inpainted
    for sampler in ("uni_pc", STEP_BY_STEP):
        more = {"sampler": sampler, "steps": 3, "scheduler": "karras"}
        yield name, sampler, same, {"of": functools.partial(sampled, twins, prepare, more)}
    batch = functools.partial(prepare, rows=9, columns=5, batch=2)
    odd = {"steps": 3, "cfg": 1.0, "sampler": "dpmpp_2m"}
    yield name, "two of odd size", same, {"of": functools.partial(sampled, twins, batch, odd)}
    yield name, "text to image", same, {"latent": torch.zeros(1, 4, 8, 6), "denoise": 1.0, "scheduler": "normal"}
    yield name, "what ComfyUI takes it for", same, {"of": functools.partial(recognised, twins, name)}
