"""Core's token merging, for twins.py: on SDXL it merges nothing, and on a UNet with attention at the latent's own size it does."""

import comfy_extras.nodes_tomesd as tomesd
import torch
from node_cases import hung

MODELS = {"sdxl": ("unet-tiny.safetensors", {"patch": 2}), "sdxl, fine": ("unet-fine.safetensors", {"patch": 2})}
# Sides at which rounding might tell another scale.
SIZES = ((16, 12), (21, 13), (3, 3), (2, 3), (1, 5))


def cases(twins):
    merged = hung(tomesd.TomePatchModel, ratio=1.0)
    for rows, columns in SIZES:
        latent = torch.randn(2, 4, rows, columns, generator=torch.Generator().manual_seed(9))
        # A sampler that draws: the node must not draw for it.
        yield "sdxl", f"{rows} x {columns}", merged, {"latent": latent, "sampler": "euler_ancestral"}
    yield "sdxl, fine", "16 x 12", merged, {}
    yield "sdxl, fine", "16 x 12, ratio 0", hung(tomesd.TomePatchModel, ratio=0.0), {}
