"""ControlNets of every kind that core makes, on the prompts of a local MODEL and of its parallel twin, for twins.py."""

import functools
import importlib
import os
import shutil
from pathlib import Path

import comfy.cldm.cldm
import comfy.cldm.dit_embedder
import comfy.cldm.mmdit
import comfy.controlnet
import comfy.hooks
import comfy.latent_formats
import comfy.ops
import comfy.samplers
import comfy.t2i_adapter.adapter
import comfy.utils
import comfy_extras.nodes_model_advanced as advanced
import torch
from comfy_extras.nodes_controlnet import SetUnionControlNetType
from comfy_extras.nodes_mahiro import Mahiro
from control_changes import CHANGES, turning, with_tensor
from patch_cases import lora_file as lora_of_weights
from safetensors.torch import save_file
from twins import call

import nodes

# By the number of ranks.
WORLDS = {
    1: {"sdxl": ("unet-layers.safetensors", {}), "sd3.5-large": ("sd3.5-large.safetensors", {})},
    2: {
        "sdxl, cfg": ("unet-layers.safetensors", {"cfg": 2}),
        "sdxl, patch": ("unet-layers.safetensors", {"patch": 2}),
        "sdxl, dp": ("unet-layers.safetensors", {"dp": 2}),
        "sdxl, sliced": ("unet-layers.safetensors", {"patch": 2, "sliced": True}),
        "union": ("unet-320.safetensors", {"patch": 2}),
        "sd3": ("sd3-medium.safetensors", {"tp": 2}),
        "sd3.5-large, ulysses": ("sd3.5-large.safetensors", {"ulysses": 2}),
        "sd3.5-large, ring": ("sd3.5-large.safetensors", {"ring": 2}),
        "sd3.5-large, pp": ("sd3.5-large.safetensors", {"pp": 2}),
    },
    3: {"sdxl": ("unet-layers.safetensors", {"patch": 3}), "sd3.5-large": ("sd3.5-large.safetensors", {"ring": 3})},
    4: {
        "sdxl": ("unet-layers.safetensors", {"cfg": 2, "patch": 2}),
        "sd3.5-large": ("sd3.5-large.safetensors", {"cfg": 2, "ulysses": 2}),
    },
}
WORLD = int(os.environ["TWINS_WORLD"])
MODELS = WORLDS[WORLD]
# On meshes beside the common ones: of each kind the case that asks the most of it.
FEW = {
    *(
        "file of a Control-LoRA",
        "file, an odd size",
        "two files with ranges",
        "file, a batch of 3 step by step",
        "file, on one prompt",
    ),
    *("ControlNet, an odd size", "ControlNet, two hints for two latents", "Control-LoRA"),
    *(
        "InstantX's file, a range by the MODEL's own shift",
        "InstantX's file, an odd size",
        "file of stability",
        "file of stability, double",
    ),
    *("InstantX's ControlNet, an odd size", "Stability's ControlNet, True", "Stability's ControlNet, False"),
}
# On the one of two UNet meshes that shares out rows: with those, what is not alike in all rows.
OF_ROWS = FEW | {
    *("file", "file, cfg 1", "file, a batch of 3 with hints", "file, on one prompt step by step", "file in an area"),
    *("ControlNet, a batch of 3", "ControlNet, prompts of two lengths", "ControlNets of areas", "T2I-Adapter"),
}
SOME = {
    "sdxl, cfg": OF_ROWS,
    **dict.fromkeys(("sdxl, dp", "sdxl, sliced", "sd3.5-large, ring", "sd3.5-large, pp"), FEW),
}
CPU = torch.device("cpu")


def random_weights(module, seed):
    """Activations stay near 1, and what starts at zero in training does not."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        wide = parameter.ndim > 1
        # The zero convolutions' and linear layers' outputs are what is added: as large as what they are added to.
        parameter.data = values / parameter[0].numel() ** 0.5 if wide else float("norm" in name) + 0.05 * values
    for buffer in module.buffers():  # core makes a ControlNet's places of memory that nobody has written
        if buffer.is_floating_point():
            buffer.copy_(0.05 * torch.randn(buffer.shape, generator=generator))
    return module.eval().requires_grad_(False)


def made(control_model, seed, **settings):
    return comfy.controlnet.ControlNet(random_weights(control_model, seed), load_device=CPU, **settings)


def unet_config(model):
    config = {key: value for key, value in model.model.model_config.unet_config.items() if key != "out_channels"}
    return config | {"hint_channels": 3, "dtype": torch.float32, "operations": comfy.ops.disable_weight_init}


def sdxl_control(model, seed=1, **more):
    return made(comfy.cldm.cldm.ControlNet(**unet_config(model) | more), seed)


def t2i_adapter(model, seed=2):
    config = model.model.model_config.unet_config
    widths = [config["model_channels"] * multiple for multiple in config["channel_mult"]]
    adapter = comfy.t2i_adapter.adapter.Adapter(
        cin=768, channels=[*widths, widths[-1]], nums_rb=2, ksize=1, sk=True, use_conv=False, xl=True
    )
    return comfy.controlnet.T2IAdapter(random_weights(adapter, seed), adapter.input_channels, 8, "nearest-exact")


def control_lora(model, seed=3, rank=4):
    """What such a file holds: the hint's own layers and the zero convolutions whole, of the others pairs of low rank."""
    network = random_weights(comfy.cldm.cldm.ControlNet(**unet_config(model)), seed)
    generator, own = torch.Generator().manual_seed(seed), set(model.model.diffusion_model.state_dict())
    tensors = {"lora_controlnet": torch.tensor([])}
    for name, weight in network.state_dict().items():
        if name not in own:
            tensors[name] = weight
        elif name.endswith(".weight") and weight.ndim > 1:
            rows, columns, *kernel = weight.shape
            stem = name.removesuffix(".weight")
            tensors[stem + ".up"] = 0.1 * torch.randn(rows, rank, *[1] * len(kernel), generator=generator)
            tensors[stem + ".down"] = 0.1 * torch.randn(rank, columns, *kernel, generator=generator)
    return comfy.controlnet.ControlLora(tensors)


def sd3_control(model, seed=4, blocks=2):
    """InstantX's."""
    place = {"operations": comfy.ops.disable_weight_init, "device": CPU, "dtype": torch.float32}
    config = model.model.model_config.unet_config
    config = {key: value for key, value in config.items() if key not in (*place, "image_model")}
    control_model = comfy.cldm.mmdit.ControlNet(num_blocks=blocks, **place, **config)
    latent_format = comfy.latent_formats.SD3()
    latent_format.shift_factor = 0
    return made(control_model, seed, compression_ratio=1, latent_format=latent_format)


def sd35_control(model, seed=5, blocks=2, double=True):
    """Stability's."""
    heads = model.model.diffusion_model.x_embedder.proj.weight.shape[0] // 64
    control_model = comfy.cldm.dit_embedder.ControlNetEmbedder(
        img_size=None,
        patch_size=2,
        in_chans=16,
        num_layers=blocks,
        main_model_double=heads,
        double_y_emb=double,
        attention_head_dim=64,
        num_attention_heads=heads,
        adm_in_channels=2048,
        device=CPU,
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    return comfy.controlnet.ControlNetSD35(
        random_weights(control_model, seed),
        compression_ratio=1,
        latent_format=comfy.latent_formats.SD3(),
        load_device=CPU,
        preprocess_image=lambda image: image * 255 * 0.5 + 0.5,
    )


class SmallVAE:
    """As far as a ControlNet asks a VAE: cells of 8 pixels, 16 channels."""

    def spacial_compression_encode(self):
        return 8

    def encode(self, pixels):
        cells = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1).clamp(0, 2), 8)
        return torch.cat([cells.roll(number, 1) * (number - 7.5) / 8 for number in range(16)], dim=1)[:, :16]


VAE = {"vae": SmallVAE()}


def image(rows=64, columns=48, batch=1, seed=6):
    return torch.rand(batch, rows, columns, 3, generator=torch.Generator().manual_seed(seed))


def applied(twins, model, *controls, **prompts):
    """Prompts with these ControlNets: each (object, strength, start, end, image)."""
    pair = [prompts.get("positive") or twins.prompt(model, 1), prompts.get("negative") or twins.prompt(model, 2)]
    for control, strength, start, end, hint in controls:
        node = nodes.ControlNetApplyAdvanced()
        pair = node.apply_controlnet(*pair, control, hint, strength, start, end, vae=prompts.get("vae"))
    return {"positive": pair[0], "negative": pair[1]}


def same(model):
    return model


def cases(twins):
    importlib.import_module("pack.nodes.controlnet_files").remember_files()
    for name in MODELS:
        model, found = twins.pair(name, *MODELS[name])[0], []
        if name == "union":
            found = [union_cases(twins, model)]
        elif name.startswith("sdxl"):
            found = [sharded_cases(twins, model), sdxl_cases(twins, model)]
        else:
            found = [sharded_sd3_cases(twins, model, name), sd3_cases(twins, model, name)]
        some = SOME.get(name) if WORLD == 2 else FEW
        for group in found:
            yield from ((name, *case) for case in group if some is None or case[0] in some)


def loaded(twins, name):
    """As a loader of core's gives it: the ranks find its file."""
    return comfy.controlnet.load_controlnet(os.path.join(twins.folder, name), model_options={"dtype": torch.float32})


def lora_file(twins, model):
    path = os.path.join(twins.folder, "control-lora.safetensors")
    save_file(control_lora(model, seed=11).control_weights, path)
    return comfy.controlnet.load_controlnet(path)


def sharded_cases(twins, model):
    """Of files that the ranks know."""
    lora = lora_file(twins, model)
    used = applied(twins, model, (lora, 0.8, 0.0, 1.0, image()))
    yield "file of a Control-LoRA", same, used
    yield "file of a Control-LoRA on a MODEL with a LoRA", with_lora, used
    first, second = loaded(twins, "control-one.safetensors"), loaded(twins, "control-two.safetensors")
    whole = applied(twins, model, (first, 0.8, 0.0, 1.0, image()))
    yield "file", same, whole
    yield "file, an odd size", same, whole | {"latent": twins.latent(model, 11, 7)}
    two = applied(twins, model, (first, 0.7, 0.0, 0.6, image()), (second, 0.5, 0.3, 1.0, image(seed=8)))
    yield "two files with ranges", same, two | {"steps": 4, "denoise": 1.0}
    yield "two files, step by step", mahiro, two | {"steps": 4, "denoise": 1.0}
    hints = applied(twins, model, (first, 1.0, 0.0, 1.0, image(batch=3)))
    yield "file, a batch of 3 with hints", same, hints | {"latent": torch.zeros(3, 4, 8, 6)}
    yield "file, a batch of 3 step by step", mahiro, hints | {"latent": torch.zeros(3, 4, 8, 6)}
    one_side = {"positive": whole["positive"]}
    yield "file, on one prompt", same, one_side
    yield "file, on one prompt step by step", mahiro, one_side
    of_its_own = {"cross_attn_controlnet": twins.prompt(model, 5)[0][0]}
    prompted = applied(twins, model, (first, 0.8, 0.0, 1.0, image()), positive=twins.prompt(model, 1, **of_its_own))
    yield "file, then a prompt of its own", same, prompted
    by_node = functools.partial(twins.by_parallel_sampler, latent={"samples": twins.latent(model)}, **whole)
    yield "file, by Parallel Sampler", same, {"of": by_node}
    stock = applied(twins, model, (sdxl_control(model), 0.8, 0.0, 1.0, image()))
    by_node = functools.partial(twins.by_parallel_sampler, latent={"samples": twins.latent(model)}, **stock)
    yield "a ControlNet without a file, by Parallel Sampler", same, {"of": by_node}
    yield "file, cfg 1", same, whole | {"cfg": 1.0}
    yield "file, heun", same, two | {"sampler": "heun", "steps": 3}
    for case, change in CHANGES.items():
        yield f"file, {case}, step by step", same, {"of": functools.partial(with_changed, twins, change)}
    yield "file, whose picture a node turns, step by step", turning, two
    yield "file, a tensor among the MODEL's options, step by step", with_tensor, whole
    alone = control_lora(model)
    mixed = applied(twins, model, (first, 0.7, 0.0, 1.0, image()), (alone, 0.5, 0.3, 1.0, image(seed=8)))
    yield "file, then a Control-LoRA", same, mixed | {"steps": 3}
    below = applied(twins, model, (sdxl_control(model), 0.7, 0.0, 1.0, image()), (first, 0.5, 0.0, 1.0, image()))
    yield "a ControlNet without a file, then a file", same, below
    positive = call(nodes.ControlNetApply, twins.prompt(model, 1), first, image(), 0.8)
    yield "file by ControlNetApply", same, {"positive": positive}
    area = call(nodes.ConditioningSetArea, whole["positive"], 32, 48, 0, 0, 0.9)
    yield "file in an area", same, {"positive": area + twins.prompt(model, 3), "negative": whole["negative"]}


def with_changed(twins, change, model):
    path = os.path.join(twins.folder, "control-changed.safetensors")
    shutil.copy(os.path.join(twins.folder, "control-one.safetensors"), path)
    used = applied(twins, model, (loaded(twins, os.path.basename(path)), 0.8, 0.0, 1.0, image()))
    change(used["positive"][0][1]["control"], path)
    return twins.sample(model, **used)


def with_hooks(twins, prompts, model):
    """KSampler's latent, where a LoRA lies on the weights for the positive prompt alone."""
    hooks = comfy.hooks.create_hook_lora(lora=lora_of_embedders(model), strength_model=1.0, strength_clip=0.0)
    positive = comfy.hooks.set_hooks_for_conditioning(prompts["positive"], hooks)
    return twins.sample(model, **prompts | {"positive": positive})


def lora_of_embedders(model):
    """Of the layers that Stability's ControlNets borrow."""
    generator, weights = torch.Generator().manual_seed(1), model.model.diffusion_model.state_dict()
    shapes = {name: weights[f"{name}.weight"].shape for name in ("x_embedder.proj", "y_embedder.mlp.0")}
    return {
        f"diffusion_model.{name}.diff": torch.randn(shape, generator=generator) / shape[1:].numel() ** 0.5
        for name, shape in shapes.items()
    }


def union_control(twins, model, seed=9, types=6):
    """Core's own, and its file in the layout that such files have: core finds no other sizes than the true ones in one."""
    control = sdxl_control(model, seed, union_controlnet_num_control_type=types)
    names = {ours: theirs for theirs, ours in comfy.utils.unet_to_diffusers(unet_config(model)).items()}
    tensors = {}
    for name, tensor in control.control_model.state_dict().items():
        stem, _, leaf = name.rpartition(".")
        number = stem.split(".")[1] if "." in stem else ""
        if stem.startswith("zero_convs."):
            name = f"controlnet_down_blocks.{number}.{leaf}"
        elif stem.startswith("input_hint_block."):
            inner = {"0": "conv_in", "14": "conv_out"}.get(number, f"blocks.{int(number) // 2 - 1}")
            name = f"controlnet_cond_embedding.{inner}.{leaf}"
        elif stem == "middle_block_out.0":
            name = f"controlnet_mid_block.{leaf}"
        tensors[names.get(name, name).replace(".attn.in_proj.", ".attn.in_proj_")] = tensor.contiguous()
    path = os.path.join(twins.folder, "control-union.safetensors")
    save_file(tensors, path)
    importlib.import_module("pack.nodes.controlnet_files").leave_file(control, Path(path))
    return control


def union_cases(twins, model):
    union = union_control(twins, model)
    for kind in ("auto", "depth", "canny/lineart/anime_lineart/mlsd"):
        typed = call(SetUnionControlNetType, union, kind)
        yield f"union, {kind}", same, applied(twins, model, (typed, 0.6, 0.0, 1.0, image()))


def sharded_sd3_cases(twins, model, name):
    family = name.split(",")[0]
    whole = applied(
        twins, model, (loaded(twins, f"control-{family}-instantx.safetensors"), 0.8, 0.0, 1.0, image()), **VAE
    )
    yield "InstantX's file", same, whole
    yield "InstantX's file, an odd size", same, whole | {"latent": twins.latent(model, 11, 7)}
    half = applied(
        twins, model, (loaded(twins, f"control-{family}-instantx.safetensors"), 0.8, 0.0, 0.5, image()), **VAE
    )
    yield "InstantX's file, a range by the MODEL's own shift", shifted, half | {"steps": 4, "denoise": 1.0}
    if family == "sd3":
        return
    for kind in ("stability", "stability, double"):
        control = loaded(twins, f"control-{family}-{kind}.safetensors")
        used = applied(twins, model, (control, 0.7, 0.0, 0.8, image()), **VAE)
        yield f"file of {kind}", same, used | {"steps": 3}
        yield f"file of {kind}, hooks step by step", same, {"of": functools.partial(with_hooks, twins, used)}
        yield f"file of {kind}, an odd size step by step", mahiro, used | {"latent": twins.latent(model, 10, 14)}


def shifted(model):
    return call(advanced.ModelSamplingSD3, model, 12.0)


def with_lora(model):
    tensors = lora_of_weights(model, "lora", seed=4)
    return comfy.sd.load_lora_for_models(model, None, tensors, 0.7, 0.0)[0]


def mahiro(model):
    """Keeps the loop in ComfyUI's process."""
    return call(Mahiro, model)


def sdxl_cases(twins, model):
    full, other = sdxl_control(model), sdxl_control(model, seed=7)
    adapter, lora = t2i_adapter(model), control_lora(model)
    whole = applied(twins, model, (full, 0.8, 0.0, 1.0, image()))
    yield "ControlNet", same, whole
    yield "ControlNet, cfg 1", same, whole | {"cfg": 1.0}
    yield "ControlNet, dpmpp_2m", same, whole | {"sampler": "dpmpp_2m", "steps": 3}
    yield "ControlNet, an odd size", same, whole | {"latent": twins.latent(model, 11, 7)}
    yield "ControlNet, a batch of 3", same, whole | {"latent": torch.zeros(3, 4, 8, 6)}
    hints = applied(twins, model, (full, 1.0, 0.0, 1.0, image(batch=2)))
    yield "ControlNet, two hints for two latents", same, hints | {"latent": torch.zeros(2, 4, 8, 6)}
    two = applied(twins, model, (full, 0.7, 0.0, 0.6, image()), (other, 0.5, 0.3, 1.0, image(seed=8)))
    yield "two ControlNets with ranges", same, two | {"steps": 4, "denoise": 1.0}
    yield (
        "T2I-Adapter",
        same,
        applied(twins, model, (adapter, 0.9, 0.0, 1.0, image(96, 64))) | {"latent": twins.latent(model, 12, 8)},
    )
    mixed = applied(twins, model, (adapter, 0.9, 0.0, 1.0, image(96, 64)), (full, 0.6, 0.0, 1.0, image(96, 64)))
    yield "T2I-Adapter and ControlNet", same, mixed | {"latent": twins.latent(model, 12, 8)}
    yield "Control-LoRA", same, applied(twins, model, (lora, 1.0, 0.0, 1.0, image()))
    after = applied(twins, model, (full, 0.6, 0.0, 1.0, image()), (lora, 0.8, 0.2, 1.0, image(seed=8)))
    yield "Control-LoRA after a ControlNet", same, after | {"steps": 3}
    long = applied(twins, model, (full, 0.8, 0.0, 1.0, image()), positive=twins.prompt(model, 1, tokens=31))
    yield "ControlNet, prompts of two lengths", same, long
    positive = call(nodes.ControlNetApply, twins.prompt(model, 1), full, image(), 0.8)
    yield "ControlNetApply, which reaches the negative by itself", same, {"positive": positive}
    area = call(nodes.ConditioningSetArea, whole["positive"], 32, 48, 0, 0, 0.9)
    combined = area + applied(twins, model, (other, 0.5, 0.0, 1.0, image(seed=8)))["positive"]
    yield "ControlNets of areas", same, {"positive": combined, "negative": whole["negative"]}


def sd3_cases(twins, model, name):
    instantx = sd3_control(model)
    whole = applied(twins, model, (instantx, 0.8, 0.0, 1.0, image()), **VAE)
    yield "InstantX's ControlNet", same, whole
    yield "InstantX's ControlNet, an odd size", same, whole | {"latent": twins.latent(model, 11, 7)}
    if name == "sd3":
        return
    for double in (True, False):
        stability = sd35_control(model, double=double)
        used = applied(twins, model, (stability, 0.7, 0.0, 0.8, image()), **VAE)
        yield f"Stability's ControlNet, {double}", same, used | {"steps": 3}
    two = applied(twins, model, (instantx, 0.7, 0.0, 0.6, image()), (stability, 0.5, 0.3, 1.0, image(seed=8)), **VAE)
    yield "two ControlNets with ranges", same, two | {"steps": 4, "denoise": 1.0}
