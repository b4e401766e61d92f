"""T-Gate by its pack's own nodes, for twins.py: it changes networks for good, so that these MODELs are of this module alone."""

import os

import meshes
import packs
import torch
from region_cases import parallel_alone
from twins import call

FOLDER = os.environ["TGATE_PATH"]
NAME = "ComfyUI_TGate"
MODELS = {f"{name}, gated": files for name, files in meshes.models().items() if name.startswith("sdxl")}
STEPS = {"steps": 5, "denoise": 1.0}
# On all meshes.
EVERYWHERE = ("cross-attention", "self-attention first")


def gated(node, **inputs):
    return lambda model: call(getattr(packs.part_of_pack(FOLDER, "TGate"), node), model=model, **inputs)


def cases(twins):
    """All on the first mesh of 2 ranks, of others those that differ by mesh."""
    for number, name in enumerate(MODELS):
        for case, change, settings in every(twins):
            if (meshes.WORLD == 2 and number == 0) or case in EVERYWHERE:
                yield name, f"{NAME}: {case}", change, STEPS | settings


def every(twins):
    odd = {"latent": torch.randn(2, 4, 21, 13, generator=torch.Generator().manual_seed(9))}
    advanced = "TGateApplyAdvanced"
    yield "cross-attention", gated("TGateApplySimple", start_at=0.5), odd
    both = gated(advanced, start_at=0.7, self_attn_start_at=0.3, only_cross_attention=False, use_cpu_cache=True)
    yield "self-attention first", both, odd
    late = gated(advanced, start_at=0.3, self_attn_start_at=0.7, only_cross_attention=False)
    yield "self-attention later", late, {"sampler": "heun"}
    longer = {"negative": [[torch.randn(1, 48, 2048), {"pooled_output": torch.randn(1, 1280)}]]}
    yield "prompts of two lengths", both, longer
    yield "cfg 1", both, {"cfg": 1.0}
    yield "from the first step", gated(advanced, start_at=0.1), {"denoise": 0.6}
    yield "two samplers, cleared between", both, odd | {"of": in_two(twins, "karras", 3)}
    yield "two samplers", both, {"of": parallel_alone(twins, run=in_two(twins, "simple", 4))}
    yield "other blocks", unlike(advanced), {"of": parallel_alone(twins)}
    yield "TGateApply", gated("TGateApply", start_at=0.5), {"of": parallel_alone(twins)}


def in_two(twins, scheduler, start):
    """KSampler to its end and KSamplerAdvanced from a step on, on the same nodes: the second one begins below both gates."""

    def run(model, steps, **settings):
        first = twins.sample(model, steps=steps, scheduler=scheduler, **settings)
        settings["latent"] = first
        return twins.sample(model, steps=steps, scheduler=scheduler, start_step=start, **settings)

    return run


def unlike(node):
    """Where another pack has put back one block's own forward."""

    def change(model):
        changed = gated(node, start_at=0.5)(model)
        del model.model.diffusion_model.middle_block[1].transformer_blocks[0].forward
        return changed

    return change
