"""What a ComfyUI core needs to start beside a CPU build of torch: its own imports of torchvision and torchaudio.

PyPI has no CPU build of either; the core imports them and, for what is tested here, never calls them.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

import torch


def install() -> None:
    """Before the first import of comfy."""
    _declare_torchvision_ops()
    if not _importable("torchaudio"):
        for name in ("torchaudio", "torchaudio.functional", "torchaudio.transforms"):
            _stand_in(name)


def start_core(folder: str) -> None:
    """A core's modules can be imported from now on, as after the first lines of its main.py; it computes on the CPU."""
    install()
    sys.path.insert(0, os.path.abspath(folder))
    sys.argv = ["main.py", "--cpu"]
    import_module("comfy.options").enable_args_parsing()
    # Before nodes.py of older cores, behind which `utils` is another module.
    import_module("utils.extra_config")


def narrow_sdxl(supported_models: ModuleType) -> list[type]:
    """Asked last: SDXL at widths that ComfyUI's loaders know no name for, which its code computes all the same; edit models first."""
    config = {"context_dim": 2048, "adm_in_channels": 2816, "use_temporal_attention": False}
    kinds = {supported_models.SDXL_instructpix2pix: config | {"in_channels": 8}, supported_models.SDXL: config}
    return [type(f"Narrow{kind.__name__}", (kind,), {"unet_config": known}) for kind, known in kinds.items()]


def _declare_torchvision_ops() -> None:
    """Where torchvision's compiled part doesn't load beside this torch; where it does, it declares them itself."""
    try:
        __import__("torchvision")
        return
    except (ImportError, OSError, RuntimeError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    arguments = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    for op in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, op):
            torch.library.define(f"torchvision::{op}", arguments)


def _importable(name: str) -> bool:
    if find_spec(name) is None:
        return False
    try:
        __import__(name)
    except (ImportError, OSError):
        return False
    return True


def _stand_in(name: str) -> None:
    module = ModuleType(name)
    parent, _, leaf = name.rpartition(".")
    module.__spec__ = ModuleSpec(name, None, is_package=not parent)
    if parent:
        setattr(sys.modules[parent], leaf, module)
    else:
        module.__path__ = []
    sys.modules[name] = module
