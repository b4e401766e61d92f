"""ComfyUI's own nodes that act between the blocks of a UNet, for twins.py."""

import comfy_extras.nodes_freelunch as freelunch
import comfy_extras.nodes_mahiro as mahiro
import comfy_extras.nodes_model_downscale as downscale
import comfy_extras.nodes_nag as nag
import comfy_extras.nodes_pag as pag
import meshes
import torch
from node_cases import hung

MODELS = {name: files for name, files in meshes.models().items() if name.startswith("sdxl")}
FREE_U = hung(freelunch.FreeU, b1=1.1, b2=1.4, s1=0.9, s2=0.2)
FREE_U_V2 = hung(freelunch.FreeU_V2, b1=1.3, b2=1.4, s1=0.9, s2=0.2)
PAG = hung(pag.PerturbedAttentionGuidance, scale=3.0)
BY_STEPS = hung(mahiro.Mahiro)
# What the first mesh of a world is tried with alone.
WITH_ALL = next(iter(MODELS))


def shrink(block, **changed):
    """The tiny model's input blocks: 0 and 1 of the whole size, 2 and 3 of half of it, 4 and 5 of a quarter."""
    settings = {"downscale_factor": 2.0, "start_percent": 0.0, "end_percent": 1.0, "downscale_after_skip": True}
    settings |= {"downscale_method": "bicubic", "upscale_method": "bicubic"}
    return hung(downscale.PatchModelAddDownscale, block_number=block, **(settings | changed))


def both(*changes):
    def change(model):
        for one in changes:
            model = one(model)
        return model

    return change


def sized(batch, rows, columns):
    return {"latent": torch.randn(batch, 4, rows, columns, generator=torch.Generator().manual_seed(9))}


def cases(twins):
    for name in MODELS:
        yield from ((name, *case) for case in few())
        if name == WITH_ALL and meshes.WORLD == 2:
            yield from ((name, *case) for case in (*more(), *without_effect()))


def few():
    """On every mesh."""
    yield "FreeU", FREE_U, {}
    yield "FreeU_V2", FREE_U_V2, sized(2, 13, 9)
    yield "PatchModelAddDownscale", shrink(3, end_percent=0.5), sized(1, 21, 13) | {"steps": 3, "denoise": 1.0}


def more():
    yield "NAGuidance, shrunk", both(hung(nag.NAGuidance, nag_scale=4.0, nag_alpha=0.5, nag_tau=1.5), shrink(3)), {}
    yield "by steps, a stronger FreeU", both(hung(freelunch.FreeU, b1=0.9, b2=2.0, s1=0.0, s2=3.0), BY_STEPS), {}
    yield "by steps, PAG and FreeU_V2", both(FREE_U_V2, PAG), sized(2, 16, 12)
    yield (
        "shrunk before the skip, by 1.5",
        shrink(3, downscale_factor=1.5, downscale_after_skip=False),
        sized(1, 24, 20),
    )
    by_area = {"downscale_method": "area", "upscale_method": "nearest-exact"}
    yield "shrunk by area, by steps", both(shrink(2, **by_area), BY_STEPS), sized(2, 21, 13)
    slerped = {"downscale_method": "bislerp", "upscale_method": "bislerp", "downscale_factor": 1.4}
    yield "shrunk at the last block, by bislerp", shrink(5, **slerped), sized(1, 24, 20)
    late = {"start_percent": 0.3, "end_percent": 0.9, "upscale_method": "bilinear"}
    yield "shrunk in some steps, with PAG, by steps", both(shrink(4, **late), PAG), sized(1, 16, 12) | {"steps": 4}
    yield "shrunk twice, FreeU between", both(shrink(1, downscale_factor=1.3), FREE_U_V2, shrink(3)), sized(1, 32, 28)
    early = shrink(2, end_percent=0.4, upscale_method="nearest-exact")
    yield "shrunk early and late", both(early, shrink(3, start_percent=0.4)), sized(1, 24, 20) | {"steps": 4}
    yield "FreeU, then shrunk", both(FREE_U_V2, shrink(2)), sized(1, 16, 12)
    yield "larger within", shrink(4, downscale_factor=0.6), sized(1, 16, 12)


def without_effect():
    """A block that the model hasn't, and a range that is none: without effect."""
    yield "shrunk at block 32", shrink(32), {}
    yield "shrunk at no step", shrink(3, start_percent=0.8, end_percent=0.2), {}
