"""ComfyUI-InstantX-IPAdapter-SD3's own code on a local MODEL and its parallel twin, with a small random adapter, for twins.py."""

import functools
import os
import types

import comfy_extras.nodes_mahiro as mahiro
import comfy_extras.nodes_slg as slg
import meshes
import packs
import torch
from refusals import named
from twins import call

FOLDER = os.environ["INSTANTX_IPADAPTER_SD3_PATH"]
SEEN, TOKENS = 24, 5
SKIPPED = {"double_layers": "1", "single_layers": "", "start_percent": 0.0, "end_percent": 1.0}
MODELS = {name: model for name, model in meshes.models().items() if name.startswith("sd3")}
if meshes.WORLD == 2:
    MODELS["sd3.5-medium"] = "sd3.5-medium.safetensors", {"ring": 2}


def adapter(twins, model, wider=0):
    """What the pack's loader gives, of the model's width: it knows SD3.5-Large's alone. `wider`: made for another model."""
    jointblock = packs.part_of_pack(FOLDER, "models.jointblock")
    resampler = packs.part_of_pack(FOLDER, "models.resampler")
    blocks = model.model.diffusion_model.joint_blocks
    width = blocks[0].x_block.attn.num_heads * 64 + wider
    torch.manual_seed(3)
    procs = [jointblock.IPAttnProcessor(width, width, width, width, 64, 48) for _ in blocks]
    for proc in procs:
        for norm in (proc.norm_q, proc.norm_k, proc.norm_ip_k):
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    # As many heads as its width has: the pack leaves others out.
    own = resampler.TimeResampler(
        48, 2, 16, 3, TOKENS, SEEN, width, 2, timestep_in_dim=32, timestep_flip_sin_to_cos=True, timestep_freq_shift=0
    )
    modules = torch.nn.ModuleList([own, *procs]).eval().requires_grad_(False)
    return types.SimpleNamespace(device="cpu", resampler=modules[0], procs=modules[1:])


def applied(twins, seed=4, wider=0, **settings):
    """The node on a MODEL, but in fp32: it takes its image in half precision."""

    def change(model):
        nodes = packs.part_of_pack(FOLDER, "nodes")
        new, made = model.clone(), adapter(twins, model, wider)
        seen = torch.randn(1, 7, SEEN, generator=torch.Generator().manual_seed(seed))
        nodes.patch(new, made.procs, made.resampler, torch.cat([seen, torch.zeros_like(seen)]), **settings)
        return new

    return change


def stepwise(change):
    """And something that only ComfyUI's own loop can heed: one request for each evaluation."""
    return lambda model: call(mahiro.Mahiro, model=change(model))


def cases(twins):
    for name in MODELS:
        odd = {"latent": torch.randn(2, 16, 9, 7, generator=torch.Generator().manual_seed(2))}
        some = applied(twins, start=0.3, end=0.8)
        yield name, "SD3 IP-Adapter, two latents of an odd size", applied(twins, weight=0.7), odd
        yield name, "SD3 IP-Adapter, step by step", stepwise(applied(twins, weight=0.7)), odd
        if name == "sd3.5-large" and meshes.WORLD == 2:
            yield name, "SD3 IP-Adapter, some steps", some, {"steps": 4, "denoise": 1.0}
            yield name, "SD3 IP-Adapter, some steps, step by step", stepwise(some), {"steps": 4, "denoise": 1.0}
            between = {"sampler": "dpm_2", "steps": 3, "denoise": 1.0}
            yield name, "SD3 IP-Adapter, between sigmas, step by step", applied(twins, start=0.05, end=0.8), between
            below_one = {"sampler": "dpmpp_2m_sde", "steps": 3, "denoise": 1.0}
            yield name, "SD3 IP-Adapter, below sigma 1, step by step", applied(twins), below_one
            skipped = lambda model: call(slg.SkipLayerGuidanceDiTSimple, model=applied(twins)(model), **SKIPPED)  # noqa: E731
            yield name, "SD3 IP-Adapter and skipped layers, step by step", skipped, {}
            weaker = lambda model: call(slg.SkipLayerGuidanceDiT, model=applied(twins)(model), scale=2.0, **SKIPPED)  # noqa: E731
            yield name, "SD3 IP-Adapter beside skip-layer guidance, step by step", stepwise(weaker), odd
            wider = applied(twins, wider=64)
            words = ("wide came to a model whose blocks are", "Choose an adapter for this model")
            refused = functools.partial(named, twins, words, lambda model, change=wider: twins.sample(change(model)))
            yield name, "SD3 IP-Adapter, of a wider model", lambda model: model, {"of": refused}
            yield name, "SD3 IP-Adapter, no guidance", applied(twins), {"cfg": 1.0}
