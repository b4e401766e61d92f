"""ControlNet files as users have them, in every type and layout, and what ComfyUI computes with a MODEL's own weights, for twins.py.

Files lie in folders named after the models that they are for. Of one that core can't open as it is meant, its values lie in a file
of the same name in a folder `values` beside it: these are a local MODEL's.
"""

import functools
import importlib
import os
import shutil
from contextlib import contextmanager

import comfy.controlnet
import comfy.hooks
import comfy.latent_formats
import comfy.ldm.flux.controlnet
import comfy.ldm.flux.model
import comfy.model_detection
import comfy.ops
import folder_paths
import torch
from comfy_extras.nodes_controlnet import SetUnionControlNetType
from control_cases import VAE, applied, image, made, mahiro, same, with_lora
from patch_cases import lora_file as lora_of_weights
from refusals import named
from twins import call

MODELS = {
    "sdxl": ("unet-layers.safetensors", {"patch": 2}),
    "union": ("unet-320.safetensors", {"patch": 2}),
    "sd3": ("sd3-medium.safetensors", {"tp": 2}),
    "sd3.5-large": ("sd3.5-large.safetensors", {"ulysses": 2}),
    "sdxl in fp8": ("unet-layers-fp8.safetensors", {"cfg": 2}),
    "sdxl in scaled fp8": ("unet-layers-scaled.safetensors", {"patch": 2}),
}
QUANTISED = ("sdxl in fp8", "sdxl in scaled fp8")


@contextmanager
def known_to_core(model):
    """Core knows SDXL's ControlNets in diffusers' layout at their full size alone; now at this model's too."""
    detect = comfy.model_detection.unet_config_from_diffusers_unet
    config = dict(model.model.model_config.unet_config, out_channels=4)
    comfy.model_detection.unet_config_from_diffusers_unet = lambda *_, **__: dict(config)
    try:
        yield
    finally:
        comfy.model_detection.unet_config_from_diffusers_unet = detect


def opened(model, path, of=None):
    """As core's loaders open it: in the type that core chooses."""
    with known_to_core(model):
        return comfy.controlnet.load_controlnet(path, of)


def is_parallel(twins, model):
    return isinstance(model, twins.remote_model.RemotePatcher)


def with_file(twins, model, path, is_meant=True, **more):
    """KSampler's latent with the ControlNet of that file, on a local MODEL with that of its values if there is one.

    Args:
        is_meant: else ComfyUI opens the file itself.
    """
    values = os.path.join(os.path.dirname(path), "values", os.path.basename(path))
    is_local = not is_parallel(twins, model)
    control = opened(model, values if is_meant and is_local and os.path.exists(values) else path)
    return twins.sample(model, **used(twins, model, control), **more)


def used(twins, model, control, hint=None, **more):
    """Prompts with it; a union is told that its picture is of depths."""
    if getattr(getattr(control, "control_model", None), "task_embedding", None) is not None:
        control = call(SetUnionControlNetType, control, "depth")
    is_sd3 = type(model.model).__name__ == "SD3"
    hint = image() if hint is None else hint
    return applied(twins, model, (control, 0.8, 0.0, 1.0, hint), **(VAE if is_sd3 else {}), **more)


def file_cases(twins, name):
    folder = os.path.join(twins.folder, name)
    for file in sorted(file for file in os.listdir(folder) if "." in file):
        run = functools.partial(with_file, twins, path=os.path.join(folder, file))
        yield file.removesuffix(".safetensors"), same, {"of": run}
        if file == "scaled fp8.safetensors":
            yield "as ComfyUI opens it, scaled fp8", same, {"of": functools.partial(run, is_meant=False)}
            yield f"{file.removesuffix('.safetensors')}, step by step", mahiro, {"of": run}


def with_weights_cases(twins, name):
    """What ComfyUI makes of the MODEL's own weights, with all that lies on them."""
    folder = os.path.join(twins.folder, "of weights")
    for file, what in (("difference.safetensors", "DiffControlNet"), ("lora.safetensors", "Control-LoRA")):
        for case, change in (("", same), (" with a LoRA", with_lora)):
            run = functools.partial(laid_on, twins, os.path.join(folder, file))
            yield f"{what}{case}", functools.partial(of_values, twins, name, change), {"of": run}


def laid_on(twins, path, model):
    """KSampler's latent with that file's ControlNet, which core's DiffControlNetLoader loads with the MODEL."""
    return twins.sample(model, **used(twins, model, opened(model, path, model)))


def of_values(twins, name, change, model):
    """The change on the MODEL; in place of a local one of a quantised file on one of its values."""
    file = MODELS[name][0]
    if not is_parallel(twins, model) and os.path.exists(values := os.path.join(twins.folder, "values", file)):
        model = twins.local(values)
    return change(model)


def hint_cases(twins, name):
    """Pictures that don't fit the latent, as users give them."""
    run = functools.partial(with_hint, twins, os.path.join(twins.folder, name, "fp16.safetensors"))
    if name == "sd3":
        run = functools.partial(with_hint, twins, os.path.join(twins.folder, name, "fp16, instantx.safetensors"))
    two = torch.zeros(2, 4 if name == "sdxl" else 16, 8, 6)
    for words, hint, more in (
        ("of another size", image(104, 72), {}),
        ("that are too small", image(16, 24), {}),
        ("in a batch of 3 for 2 latents", image(batch=3), {"latent": two}),
        ("in a batch of 2 for 1 latent", image(batch=2), {}),
    ):
        for case, change in (("", same), (", step by step", mahiro)):
            yield f"hints {words}{case}", change, {"of": functools.partial(run, hint, more)}


def with_hint(twins, path, hint, more, model):
    return twins.sample(model, **used(twins, model, opened(model, path), hint), **more)


def refusal_cases(twins, name):
    """What no rank can take, and ComfyUI neither: its name, words of the error, and what is tried."""
    hint_on = functools.partial(
        functools.partial, with_hint, twins, os.path.join(twins.folder, "sdxl", "fp16.safetensors")
    )

    def of_file(*parts):
        return functools.partial(with_file, twins, path=os.path.join(twins.folder, *parts))

    if name == "sd3":
        words = "is a ControlNet of a UNet", "Choose a ControlNet of SD3", "either"
        yield "SDXL's", words, of_file("sdxl", "fp16.safetensors")
        words = "flux.safetensors is a ControlNet of another family", "flux.controlnet", "either"
        yield "Flux's", words, functools.partial(flux_on, twins)
        return
    yield "one channel", ("has 1 channels; this ControlNet takes 3", "kind of image"), hint_on(image()[..., :1], {})
    four = torch.cat([image(), image()[..., :1]], -1)
    yield "four channels", ("has 4 channels; this ControlNet takes 3",), hint_on(four, {})
    words = "sd1.safetensors is a ControlNet without", "Choose an SDXL ControlNet", "either"
    yield "SD1's", words, of_file("other", "sd1.safetensors")
    words = "holds no ControlNet of a UNet", "Choose an SDXL ControlNet", "either"
    yield "SD3's", words, of_file("sd3", "fp16, instantx.safetensors")
    yield "Stability's of SD3.5", words, of_file("sd3.5-large", "fp16, stability.safetensors")
    words = "it has a prompt of its own", "leaves the scales of its weights out", "fp8 without scales"
    yield "scaled fp8 with a prompt of its own", words, functools.partial(with_prompt_of_its_own, twins)
    words = "lora.safetensors is made of the MODEL's weights, which hooks", "lay the LoRA on the MODEL"
    yield "a Control-LoRA where hooks patch", words, functools.partial(control_lora_and_hooks, twins)
    by_ours = functools.partial(functools.partial, by_our_loader, twins)
    words = "The ranks can't compute sd1.safetensors", "Choose an SDXL ControlNet. Or load it with ComfyUI's"
    yield "SD1's by Load Parallel ControlNet", words, by_ours("sd1.safetensors")
    words = "The ranks can't compute going.safetensors: There is no file", "Check the name"
    yield "a file that goes, by Load Parallel ControlNet", words, functools.partial(file_that_goes, twins, by_ours=True)
    words = "is a DiffControlNet", "Use a whole ControlNet. Or load it"
    yield "a DiffControlNet by Load Parallel ControlNet", words, by_ours("difference.safetensors")
    for file, what in (("gguf.gguf", "a GGUF file"), ("nvfp4.safetensors", "quantised as nvfp4")):
        words = f"{file} is {what}", "half precision"
        yield f"{file} by ComfyUI's loader", words, of_file("other", file)
    words = "it has a prompt of its own", "Use its .safetensors file in half precision or fp8"
    run = functools.partial(by_our_loader_with_a_prompt, twins, "gguf.gguf")
    yield "gguf.gguf by Load Parallel ControlNet with a prompt of its own", words, run


def with_prompt_of_its_own(twins, model):
    path = os.path.join(twins.folder, "sdxl", "scaled fp8.safetensors")
    positive = twins.prompt(model, 1, cross_attn_controlnet=twins.prompt(model, 5)[0][0])
    return twins.sample(model, **used(twins, model, opened(model, path), positive=positive))


def by_our_loader_with_a_prompt(twins, file, model):
    """Sent to the loader of core's, which reads no such file, a user would be sent back."""
    positive = twins.prompt(model, 1, cross_attn_controlnet=twins.prompt(model, 5)[0][0])
    return twins.sample(model, **used(twins, model, loaded_by_ours(twins, file), positive=positive))


def control_lora_and_hooks(twins, model):
    prompts = used(twins, model, opened(model, os.path.join(twins.folder, "of weights", "lora.safetensors")))
    hooks = comfy.hooks.create_hook_lora(
        lora=lora_of_weights(model, "lora", seed=4), strength_model=1.0, strength_clip=0.0
    )
    prompts["positive"] = comfy.hooks.set_hooks_for_conditioning(prompts["positive"], hooks)
    return twins.sample(model, **prompts)


def by_our_loader(twins, file, model):
    """Of what core reads no ControlNet from, a local MODEL's is of its values."""
    values = os.path.join(twins.folder, "other", "values", f"{file}.safetensors")
    if not is_parallel(twins, model) and os.path.exists(values):
        return with_file(twins, model, values)
    return twins.sample(model, **used(twins, model, loaded_by_ours(twins, file)))


def loaded_by_ours(twins, file):
    folders = [os.path.join(twins.folder, name) for name in ("other", "of weights")]
    folder_paths.folder_names_and_paths["controlnet"] = (folders, {".safetensors"})
    loader = importlib.import_module("pack.nodes.load_controlnet").LoadParallelControlNet
    assert loader.validate_inputs(file) is True
    return loader.execute(file).result[0]


# As small as can be: no file that core opens has these sizes.
FLUX = {"in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 128}
FLUX |= {"mlp_ratio": 4.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 0, "axes_dim": [16, 24, 24]}
FLUX |= {"theta": 10_000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True}


def flux_on(twins, model):
    place = {"operations": comfy.ops.disable_weight_init, "device": torch.device("cpu"), "dtype": torch.float32}
    newer = {"txt_ids_dims": []} if "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__annotations__ else {}
    network = comfy.ldm.flux.controlnet.ControlNetFlux(latent_input=True, **FLUX, **newer, **place)
    more = {"compression_ratio": 1, "latent_format": comfy.latent_formats.Flux(), "extra_conds": ["y", "guidance"]}
    control = made(network, seed=3, **more)
    path = importlib.import_module("pathlib").Path(twins.folder, "other", "flux.safetensors")
    importlib.import_module("pack.nodes.controlnet_files").leave_file(control, path)
    return twins.sample(model, **used(twins, model, control))


def file_that_goes(twins, model, by_ours=False):
    """Deleted when the loader has read it, before it is sampled with."""
    path = os.path.join(twins.folder, "other", "going.safetensors")
    shutil.copy(os.path.join(twins.folder, "sdxl", "fp16.safetensors"), path)
    control = loaded_by_ours(twins, os.path.basename(path)) if by_ours else opened(model, path)
    prompts = used(twins, model, control)
    os.remove(path)
    return twins.sample(model, **prompts)


def cases(twins):
    importlib.import_module("pack.nodes.controlnet_files").remember_files()
    for name in MODELS:
        found = []
        if name not in QUANTISED:
            found.append(file_cases(twins, name))
        if name.startswith("sdxl"):
            found.append(with_weights_cases(twins, name))
        if name in ("sdxl", "sd3"):
            # What follows a refusal is as if nothing had been.
            refusals = (
                (f"refused: {case}", same, {"of": functools.partial(named, twins, words, run)})
                for case, words, run in refusal_cases(twins, name)
            )
            found += [refusals, hint_cases(twins, name)]
        if name == "sdxl":
            found.append([("a file that goes", same, {"of": functools.partial(file_that_goes, twins)})])
            files = ("gguf.gguf", "nvfp4.safetensors")
            found.append(
                [(f"our loader: {file}", same, {"of": functools.partial(by_our_loader, twins, file)}) for file in files]
            )
        for group in found:
            yield from ((name, *case) for case in group)
