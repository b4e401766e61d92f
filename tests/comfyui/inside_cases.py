"""ComfyUI's own nodes that patch attention and blocks, for twins.py."""

import comfy_extras.nodes_pag as pag
import comfy_extras.nodes_slg as slg
import meshes
from node_cases import hung

MODELS = meshes.models()


def cases(twins):
    """On every mesh."""
    for name in MODELS:
        of_family = of_unet if name.startswith("sdxl") else of_transformer
        yield from ((name, *case) for case in of_family())


def of_transformer():
    skipped = {"double_layers": "1, 2", "single_layers": "7", "start_percent": 0.0, "end_percent": 1.0}
    yield "SkipLayerGuidanceDiT", hung(slg.SkipLayerGuidanceDiT, scale=2.0, **skipped), {"steps": 3}
    late = skipped | {"start_percent": 0.5}
    rescaled = hung(slg.SkipLayerGuidanceDiT, scale=2.0, rescaling_scale=0.4, **late)
    yield "SkipLayerGuidanceDiT, some steps", rescaled, {"steps": 4}
    yield "SkipLayerGuidanceDiTSimple", hung(slg.SkipLayerGuidanceDiTSimple, **skipped), {}


def of_unet():
    yield "PerturbedAttentionGuidance", hung(pag.PerturbedAttentionGuidance, scale=3.0), {}
