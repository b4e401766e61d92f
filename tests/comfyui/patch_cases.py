"""Patches of weights of every kind that ComfyUI's core knows, for twins.py."""

import functools
import weakref

import comfy.hooks
import comfy.model_management as management
import comfy.model_patcher
import comfy.utils
import comfy_extras.nodes_model_advanced as advanced
import comfy_extras.nodes_model_merging as merging
import torch
from comfy_extras.nodes_hooks import PairConditioningSetProperties
from twins import call

MODELS = {
    "sd3": ("sd3-medium.safetensors", {"tp": 2}),
    "sd3.5-medium": ("sd3.5-medium.safetensors", {"pp": 2}),
    "sd3.5-large": ("sd3.5-large.safetensors", {"cfg": 2}),
    "sdxl": ("unet-tiny.safetensors", {"patch": 2, "sliced": True}),
}
RANK = 3


def noise(*shape, seed=0, scale=0.1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


_SHAPES = weakref.WeakKeyDictionary()


def weights(model):
    """Shapes of the model's weights by ComfyUI's names, which each case asks for several times."""
    if (network := model.model.diffusion_model) not in _SHAPES:
        _SHAPES[network] = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    return _SHAPES[network]


def chosen(model, dims):
    """Some layers' weights of so many dims, spread over the model: their names without the ending."""
    names = [
        n for n, shape in weights(model).items() if len(shape) == dims and n.endswith(".weight") and min(shape) > 0
    ]
    return [name.removesuffix(".weight") for name in names[:: max(1, len(names) // 6)]]


def kohya(name):
    return "lora_unet_" + name.replace(".", "_")


def lora_file(model, kind, seed=0, scale=0.3):
    """A file's tensors of that kind for some of the model's layers."""
    shapes, tensors = weights(model), {}
    for number, name in enumerate(chosen(model, 2) + (chosen(model, 4) if kind in ("lora", "locon", "dora") else [])):
        rows, columns, *kernel = shapes[name + ".weight"]
        key, make = kohya(name), functools.partial(noise, seed=seed + number, scale=scale)
        tensors |= KINDS[kind](key, rows, columns, kernel, make)
    return tensors


def lora(key, rows, columns, kernel, make):
    ones = [1] * len(kernel)
    up, down = make(rows, RANK, *ones), make(RANK, columns, *kernel)
    return {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(2.0)}


def locon(key, rows, columns, kernel, make):
    if not kernel:
        return lora(key, rows, columns, kernel, make)
    return {
        f"{key}.lora_up.weight": make(rows, RANK, 1, 1),
        f"{key}.lora_down.weight": make(RANK, columns, 1, 1),
        f"{key}.lora_mid.weight": make(RANK, RANK, *kernel),
        f"{key}.alpha": torch.tensor(1.0),
    }


def dora(key, rows, columns, kernel, make):
    return lora(key, rows, columns, kernel, make) | {f"{key}.dora_scale": 1 + make(rows, 1, *[1] * len(kernel)).abs()}


def loha(key, rows, columns, kernel, make):
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    shapes = ((rows, RANK), (RANK, columns)) * 2
    return {f"{key}.{n}": make(*shape) for n, shape in zip(names, shapes, strict=True)} | {
        f"{key}.alpha": torch.tensor(3.0)
    }


def lokr(key, rows, columns, kernel, make):
    return {f"{key}.lokr_w1": make(2, 2), f"{key}.lokr_w2": make(rows // 2, columns // 2)}


def glora(key, rows, columns, kernel, make):
    # By its rank ComfyUI tells the two orders of these four apart.
    return {
        f"{key}.a1.weight": make(RANK, columns),
        f"{key}.a2.weight": make(columns, RANK),
        f"{key}.b1.weight": make(RANK, columns),
        f"{key}.b2.weight": make(rows, RANK),
        f"{key}.alpha": torch.tensor(float(RANK)),
    }


def oft(key, rows, columns, kernel, make):
    return {f"{key}.oft_blocks": make(rows // 16, 16, 16), f"{key}.alpha": torch.tensor(1.0)}


def boft(key, rows, columns, kernel, make):
    return {f"{key}.oft_blocks": make(2, rows // 4, 4, 4), f"{key}.alpha": torch.tensor(1.0)}


def diff(key, rows, columns, kernel, make):
    return {f"{key}.diff": make(rows, columns), f"{key}.diff_b": make(rows)}


def set_weight(key, rows, columns, kernel, make):
    return {f"{key}.set_weight": make(rows, columns)}


KINDS = {
    "lora": lora,
    "locon": locon,
    "dora": dora,
    "loha": loha,
    "lokr": lokr,
    "glora": glora,
    "oft": oft,
    "boft": boft,
    "diff": diff,
    "set_weight": set_weight,
}


def diffusers_lora(model, seed=0):
    """A LoRA under diffusers' names: q, k and v of SD3 each on a third of a joined weight."""
    shapes, tensors = weights(model), {}
    if "joint_blocks.0.x_block.attn.qkv.weight" in shapes:
        width = shapes["joint_blocks.0.x_block.attn.proj.weight"][0]
        parts = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj")
        found = [f"transformer.transformer_blocks.{block}.attn.{part}" for block in (0, 2) for part in parts]
        sizes, up, down = dict.fromkeys(found, (width, width)), ".lora_B.weight", ".lora_A.weight"
    else:
        names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
        found = [name for name in names if name.endswith("to_k.weight") and names[name] in shapes][:6]
        sizes = {f"unet.{name[:-7].replace('.to_', '.processor.to_')}": shapes[names[name]] for name in found}
        up, down = "_lora.up.weight", "_lora.down.weight"
    for number, (name, (rows, columns)) in enumerate(sizes.items()):
        tensors[name + down] = noise(RANK, columns, seed=seed + number, scale=0.3)
        tensors[name + up] = noise(rows, RANK, seed=seed + 70 + number, scale=0.3)
    return tensors


def speed_lora(model):
    """As those are laid out that let SDXL draw in a few steps: kohya's keys of diffusers' names, kernels and embeddings too."""
    shapes, tensors = weights(model), {}
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    found = [n for n in names if n.endswith(".weight") and len(shapes.get(names[n], ())) in (2, 4)]
    for number, name in enumerate(found[:: max(1, len(found) // 12)]):
        rows, columns, *kernel = shapes[names[name]]
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        tensors |= lora(key, rows, columns, kernel, functools.partial(noise, seed=number, scale=0.15))
    return tensors


# Of LoRAs for a few steps: what their authors say to sample with.
FEW_STEPS = {
    "Lightning": {"sampler": "euler", "scheduler": "sgm_uniform", "steps": 4, "cfg": 1.0},
    "Hyper": {"sampler": "ddim", "scheduler": "sgm_uniform", "steps": 8, "cfg": 1.0},
    "DMD2": {"sampler": "lcm", "scheduler": "simple", "steps": 4, "cfg": 1.0},
    "LCM": {"sampler": "lcm", "scheduler": "sgm_uniform", "steps": 6, "cfg": 1.5},
}


def for_lcm(twins):
    loaded = with_lora(twins, (speed_lora, 1.0))
    return lambda model: call(advanced.ModelSamplingDiscrete, model=loaded(model), sampling="lcm", zsnr=False)


def with_lora(twins, *files_and_strengths):
    def change(model):
        for make, strength in files_and_strengths:
            model = twins.comfy.sd.load_lora_for_models(model, None, make(model), strength, 0)[0]
        return model

    return change


def custom_function(model):
    """As Fooocus's inpainting and others do: a patch with a function of its own, on a part of a weight."""
    model, name = model.clone(), chosen(model, 2)[0] + ".weight"
    rows, columns = weights(model)[name]
    key = ("diffusion_model." + name, (0, 1, rows // 2), lambda change: change * 0.5)
    model.add_patches({key: ("diff", (noise(rows // 2, columns, seed=3),))}, 0.9, 0.8)
    return model


def merged(model, seed):
    """Another model: this one with some of its weights moved."""
    other = model.clone()
    moved = {f"diffusion_model.{name}.weight": weights(model)[name + ".weight"] for name in chosen(model, 2)}
    other.add_patches({key: ("diff", (noise(*shape, seed=seed),)) for key, shape in moved.items()})
    return other


def half_merged(model):
    return call(merging.ModelMergeSimple, model, merged(model, 1), ratio=0.3)


def difference_added(model):
    return call(merging.ModelAdd, model, call(merging.ModelSubtract, merged(model, 2), model, multiplier=1.0))


def blocks_merged(twins):
    def change(model):
        other = with_lora(twins, (functools.partial(lora_file, kind="lora", seed=40), 1.0))(model)
        return call(merging.ModelMergeBlocks, model, other, input=0.3, middle=0.5, out=0.9)

    return change


def by_a_packs_patcher(twins, *, hanging=False):
    """KSampler's latent of a patcher that is made around a MODEL's model once that is loaded, as packs that tile or unsample do.

    Args:
        hanging: a LoRA hangs on that one, which a parallel MODEL says that it can't honour, and makes no step.
    """

    def run(model, **settings):
        management.load_models_gpu([model])
        devices = {"load_device": management.get_torch_device(), "offload_device": management.unet_offload_device()}
        patcher, steps, told = comfy.model_patcher.ModelPatcher(model.model, **devices), [], ""
        patcher.wrappers = model.wrappers
        if not hanging:
            return twins.sample(patcher, **settings)
        if isinstance(model, twins.remote_model.RemotePatcher):
            patcher.patches = with_lora(twins, (functools.partial(lora_file, kind="lora"), 0.7))(model).patches
            try:
                twins.sample(patcher, callback=lambda *step: steps.append(step), **settings)
            except Exception as error:  # noqa: BLE001 - its words are looked at
                told = str(error)
        assert not steps, len(steps)
        out = twins.sample(model, **settings)  # the MODEL is as it was
        twins.said.append(told)
        return out

    return run


def hooked(twins, keyframes=False, both=False, other=None):
    """KSampler's latent where LoRAs, or another model's weights, hang on the prompts as hooks.

    Args:
        keyframes: with a strength that changes by step.
    """

    def run(model, **settings):
        if other is None:
            hooks = comfy.hooks.create_hook_lora(lora_file(model, "lora", seed=7), strength_model=0.8, strength_clip=0)
        else:
            hooks = comfy.hooks.create_hook_model_as_lora(other, None, strength_model=0.8, strength_clip=0)
        if keyframes:
            frames = comfy.hooks.HookKeyframeGroup()
            for strength, start in ((1.0, 0.0), (0.2, 0.4)):
                frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
            hooks.set_keyframes_on_hooks(frames)
        positive, negative = twins.prompt(model, 1), twins.prompt(model, 2)
        if both:
            positive, negative = PairConditioningSetProperties().set_properties(
                positive, negative, 1.0, "default", hooks=hooks
            )
        else:
            positive, _ = PairConditioningSetProperties().set_properties(
                positive, negative, 1.0, "default", hooks=hooks
            )
        return twins.sample(model, positive=positive, negative=negative, **settings)

    return run


def cases(twins):
    for kind, settings in FEW_STEPS.items():
        change = for_lcm(twins) if kind == "LCM" else with_lora(twins, (speed_lora, 1.0))
        yield "sdxl", f"{kind} LoRA", change, settings
    of = functools.partial(functools.partial, lora_file)
    for name in MODELS:
        whole = name in ("sd3.5-large", "sdxl")  # what is not sliced by rows is the same on every mesh
        for kind in KINDS if whole else ("lora", "dora", "diff"):
            yield name, kind, with_lora(twins, (of(kind=kind, scale=0.15), 0.8)), {}
        yield name, "diffusers' names", with_lora(twins, (diffusers_lora, 1.1)), {}
        two = with_lora(twins, (of(kind="lora"), 0.7), (diffusers_lora, -0.6), (of(kind="loha", seed=4), 0.5))
        yield name, "three at once", two, {}
        if whole:
            yield name, "strength 0", with_lora(twins, (of(kind="lora"), 0.0)), {}
            none = {"lora_unet_nothing.lora_up.weight": noise(4, 4)}
            yield name, "no key fits", with_lora(twins, (lambda model, none=none: none, 1.0)), {}
            yield name, "a function of its own", custom_function, {}
            yield name, "ModelMergeSimple", half_merged, {}
            yield name, "ModelMergeSubtract, ModelMergeAdd", difference_added, {}
            yield name, "ModelMergeBlocks", blocks_merged(twins), {}
            yield name, "a pack's patcher, with a LoRA", two, {"of": by_a_packs_patcher(twins)}
            patched = {"of": by_a_packs_patcher(twins, hanging=True)}
            yield name, "a pack's patcher, patched", lambda model: model, patched
            yield name, "hook on one prompt", lambda model: model, {"of": hooked(twins)}
            local = twins.pair(name, *MODELS[name])[0].model.diffusion_model.state_dict()
            other = {f"diffusion_model.{key}": tensor * 1.1 for key, tensor in local.items()}
            yield name, "hook of a model", lambda model: model, {"of": hooked(twins, other=other)}
            keyframes = {"of": hooked(twins, keyframes=True, both=True), "steps": 4}
            yield name, "hook with keyframes", lambda model: model, keyframes
            lora_and_hook = with_lora(twins, (of(kind="lora", seed=30), 0.4))
            yield name, "LoRA and hook", lora_and_hook, {"of": hooked(twins, both=True)}
