"""ComfyUI's own nodes that change self-attentions, for twins.py."""

import comfy_extras.nodes_hypertile as hypertile
import comfy_extras.nodes_nag as nag
import comfy_extras.nodes_sag as sag
import meshes
import torch
from node_cases import hung

MODELS = meshes.models()


def cases(twins):
    """All on the first mesh of 2 ranks, of others those that differ by mesh."""
    for name in MODELS:
        family = of_unet() if name.startswith("sdxl") else of_transformer()
        for case, change, settings in family:
            if (meshes.WORLD == 2 and "," not in name) or "on all" in case:
                yield name, case, change, settings


def of_transformer():
    """Nodes that are made for UNets: their patches hang on it, and nothing calls them."""
    tiles = {"tile_size": 32, "max_depth": 2, "scale_depth": False}
    yield "HyperTile, without effect", hung(hypertile.HyperTile, **tiles, swap_size=2), {}
    yield "NAGuidance, without effect", hung(nag.NAGuidance, nag_scale=4.0, nag_alpha=0.5, nag_tau=1.5), {}


def of_unet():
    def latent(*shape):
        return {"latent": torch.randn(*shape, generator=torch.Generator().manual_seed(9))}

    odd = latent(2, 4, 21, 13)
    guided = {"nag_scale": 4.0, "nag_alpha": 0.5, "nag_tau": 1.5}
    tiles = {"tile_size": 32, "max_depth": 2, "scale_depth": False}
    yield "NAGuidance on all", hung(nag.NAGuidance, **guided), {}
    yield "NAGuidance, odd, on all", hung(nag.NAGuidance, **guided), odd
    yield "NAGuidance, cfg 1", hung(nag.NAGuidance, **guided), {"cfg": 1.0}
    longer = {"negative": _prompt(48), "sampler": "heun"}
    yield "NAGuidance, a longer prompt", hung(nag.NAGuidance, **guided), longer
    yield "SelfAttentionGuidance on all", hung(sag.SelfAttentionGuidance, scale=0.7, blur_sigma=2.0), {}
    yield "SelfAttentionGuidance, odd, on all", hung(sag.SelfAttentionGuidance, scale=0.7, blur_sigma=2.0), odd
    yield "SelfAttentionGuidance, cfg 1", hung(sag.SelfAttentionGuidance, scale=-0.4, blur_sigma=1.0), {"cfg": 1.0}
    picture = latent(2, 4, 40, 24)
    yield "HyperTile on all", hung(hypertile.HyperTile, **tiles, swap_size=2), picture
    yield "HyperTile that draws, on all", hung(hypertile.HyperTile, **tiles, swap_size=5), latent(1, 4, 48, 32)
    yield "HyperTile by depth", hung(hypertile.HyperTile, **tiles | {"scale_depth": True}, swap_size=3), picture
    yield "HyperTile of odd sides", hung(hypertile.HyperTile, **tiles, swap_size=2), odd


def tiled(swap_size=2):
    return hung(hypertile.HyperTile, tile_size=32, swap_size=swap_size, max_depth=2, scale_depth=False)


def _prompt(tokens):
    generator = torch.Generator().manual_seed(2)
    tensor = torch.randn(1, tokens, 2048, generator=generator)
    return [[tensor, {"pooled_output": torch.randn(1, 1280, generator=generator)}]]
