"""Both MODELs of a file, a local one and a parallel one, for network.py: how they are made, sampled, changed by nodes, and saved."""

import importlib
import tempfile
from types import SimpleNamespace

import torch

MMDIT, UNET, NARROW = "sd3.5-medium", "sdxl-koala", "unet-tiny"
FAMILIES = {"sd3-medium": "sd3", MMDIT: "sd3", "sd3.5-large": "sd3", UNET: "sdxl", NARROW: "sdxl"}


def local_model(ours, name):
    """ComfyUI's own MODEL of a file; None at widths that it has no name for."""
    import comfy.sd

    path = str(ours.folder / f"{name}.safetensors")
    return None if name == NARROW else comfy.sd.load_diffusion_model(path, model_options={"dtype": torch.float32})


def parallel_model(ours, name, local):
    """A parallel MODEL of the same file, whose requests are counted."""
    path = ours.folder / f"{name}.safetensors"
    backend = SimpleNamespace(generation="", spec=SimpleNamespace(name="default", address=""))
    load, loaded = SimpleNamespace(dtype="float32", path=str(path)), SimpleNamespace(model=name, family=FAMILIES[name])
    remote = ours.remote(backend, load, loaded)
    remote.requests = 0

    def forward(x, timesteps, context, pooled, **_):
        remote.requests += 1
        return local.model.diffusion_model(x, timesteps, context=context, y=pooled, transformer_options={})

    remote.forward, remote.ensure_loaded, remote.is_held = forward, lambda *_, **__: None, lambda *_: True
    patcher = ours.patcher(remote, path, 1)
    patcher.remove_wrappers_with_key("outer_sample", "parallel_mmdit")  # which would hand the whole loop over
    return patcher


def alike(local, parallel):
    """What nodes may ask a MODEL's network for, and how much memory it takes."""
    network = parallel.model.diffusion_model
    tensors = [*network.parameters(), *network.buffers()]
    found = {
        "class": next(kind.__name__ for kind in type(network).__mro__ if kind.__module__.startswith("comfy.")),
        "in_channels": network.in_channels,
        "has": [hasattr(network, name) for name in ("input_blocks", "joint_blocks", "nothing")],
        "default": getattr(network, "nothing", "default"),
        "devices": sorted({tensor.device.type for tensor in tensors}),
        "size": parallel.model_size(),
    }
    if local is not None:
        core = local.model.diffusion_model
        found["instance"] = isinstance(network, type(core))
        found["names and shapes"] = shapes(network.state_dict()) == shapes(core.state_dict())
        found["modules"] = [name for name, _ in network.named_modules()] == [name for name, _ in core.named_modules()]
    return found


def lazy(ours, local):
    """As `alike`, as it is on most GPUs: ComfyUI's layers then start without weights. Older cores have no such layers."""
    try:
        memory = importlib.import_module("comfy.memory_management")
    except ModuleNotFoundError as missing:
        return f"skipped: {missing}"
    memory.aimdo_enabled = True
    return alike(local, parallel_model(ours, MMDIT, None))


def shapes(tensors):
    return {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()}


def from_diffusers(ours, name):
    """Whether the same model under diffusers' names is known as the same, and has the same names and shapes."""
    import comfy.utils

    meta = ours.core.meta_state_dict(ours.folder / f"{name}.safetensors")
    config, _ = ours.core.detected(meta, sdxl=True)
    sizes = config.unet_config
    if FAMILIES[name] == "sd3":
        names = comfy.utils.mmdit_to_diffusers({"depth": sizes["depth"], "num_blocks": sizes["depth"]})
    else:
        names = {k: v for k, v in comfy.utils.unet_to_diffusers(sizes).items() if "class_embedding" not in k}
    theirs = {}
    for diffusers, core in names.items():
        core, part = (core, None) if isinstance(core, str) else core[:2]
        if core in meta:
            theirs[diffusers] = meta[core] if part is None else meta[core].narrow(*part)
    known, tensors = ours.core.detected(theirs, sdxl=True)
    return [type(known) is type(config), shapes(tensors) == shapes(meta), theirs.keys() != meta.keys()]


def sample(model, width=4096, pooled=2048, channels=16, steps=2, cfg=3.0):
    """KSampler's latent."""
    import comfy.sample

    generator = torch.Generator().manual_seed(1)
    prompts = [
        [
            [
                torch.randn(1, 7, width, generator=generator),
                {"pooled_output": torch.randn(1, pooled, generator=generator)},
            ]
        ]
        for _ in range(2)
    ]
    noise = torch.randn(1, channels, 8, 8, generator=generator)
    empty = torch.zeros_like(noise)
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, steps, cfg, "euler", "simple", *prompts, empty, disable_pbar=True, seed=1
        )


def patched(node, model, **settings):
    """What a node of ComfyUI's own makes of a MODEL; settings that are not given are its defaults."""
    module, _, name = node.partition(".")
    node = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
    if hasattr(node, "define_schema"):
        given = {entry.id: getattr(entry, "default", None) for entry in node.define_schema().inputs}
        return node.execute(
            **{name: value for name, value in given.items() if value is not None} | settings, model=model
        )[0]
    given = {name: spec[1].get("default") for name, spec in node.INPUT_TYPES()["required"].items() if len(spec) > 1}
    return getattr(node(), node.FUNCTION)(**given | settings | {"model": model})[0]


EMPTY = [[torch.zeros(1, 7, 4096), {"pooled_output": torch.ones(1, 2048)}]]
# Nodes whose functions leave the model's blocks alone.
GUIDANCE = {
    "nodes_apg.APG": {"norm_threshold": 5.0, "eta": 0.5, "momentum": 0.2},
    "nodes_cfg.CFGNorm": {},
    "nodes_cfg.CFGZeroStar": {},
    "nodes_eps.TemporalScoreRescaling": {},
    "nodes_fresca.FreSca": {},
    "nodes_lumina2.RenormCFG": {"cfg_trunc": 100.0, "renorm_cfg": 1.0},
    "nodes_mahiro.Mahiro": {},
    "nodes_model_advanced.ModelComputeDtype": {"dtype": "fp32"},
    "nodes_model_advanced.ModelSamplingSD3": {"shift": 5.0},
    "nodes_model_advanced.RescaleCFG": {},
    "nodes_perpneg.PerpNeg": {"empty_conditioning": EMPTY},
    "nodes_tcfg.TCFG": {},
}


def difference(ours, sides, node):
    """Of the latent of a local MODEL and of a parallel one, with the same node on both."""
    local, parallel = (sample(patched(node, side, **GUIDANCE[node])) for side in sides)
    return float((local - parallel).abs().max() / local.abs().max())


def saved(local, parallel):
    """Names, and how far the weights of two saved checkpoints are apart, each of a MODEL with a patch on it."""
    import comfy.sd
    import comfy.utils

    key = next(key for key in local.model_state_dict() if key.endswith(".weight"))
    patch = torch.randn(local.model_state_dict()[key].shape, generator=torch.Generator().manual_seed(1))
    files = []
    for model in (local, parallel):
        patched = model.clone()
        assert patched.add_patches({key: (patch,)}, 0.5) == [key]
        with tempfile.TemporaryDirectory() as folder:
            comfy.sd.save_checkpoint(f"{folder}/saved.safetensors", patched)
            files.append(comfy.utils.load_torch_file(f"{folder}/saved.safetensors"))
    own, theirs = files
    return [shapes(own) == shapes(theirs), max(float((own[name] - theirs[name]).abs().max()) for name in own)]
