"""ComfyUI's own step caches, for twins.py: the latent, and the share of evaluations that were made."""

import comfy_extras.nodes_easycache as caches
import meshes
import torch
from comfy.patcher_extension import WrappersMP
from node_cases import hung

MODELS = meshes.models()
STEPS = 8
EASY = hung(caches.EasyCacheNode, reuse_threshold=0.6, start_percent=0.1, end_percent=0.95, verbose=False)
LAZY = hung(caches.LazyCacheNode, reuse_threshold=0.6, start_percent=0.1, end_percent=0.95, verbose=False)


def cases(twins):
    """On every mesh."""
    for name in MODELS:
        if name.startswith("sdxl"):
            yield name, "EasyCache", EASY, {"of": with_share(twins, WrappersMP.DIFFUSION_MODEL)}
        else:  # ComfyUI's own network of SD3 calls no wrapper
            yield name, "EasyCache on SD3", EASY, {}
        yield name, "LazyCache", LAZY, {"of": with_share(twins, WrappersMP.APPLY_MODEL)}


def with_share(twins, counted_at):
    """KSampler's latent, and below it another of one number: how many of the rows were evaluated, as a share of all."""

    def run(model):
        rows = []

        def counted(executor, x, *args, **kwargs):
            rows.append(len(x))
            return executor(x, *args, **kwargs)

        model.add_wrapper_with_key(counted_at, "counted", counted)
        latent = twins.sample(model, steps=STEPS, denoise=1.0)
        share = sum(rows) / (2 * STEPS)
        assert 0 < share < 1, f"{share} of the rows were evaluated"
        return torch.cat([latent, torch.full_like(latent, share)])

    return run
