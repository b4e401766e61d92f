"""The from-scratch repository's own model, where a clone of it is at hand, in fp32 and without its optional packages."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


def find_clone() -> Path | str:
    """$SD3_FROM_SCRATCH_PATH, else a clone in the home folder; a sentence that says so where there is none."""
    named = os.environ.get("SD3_FROM_SCRATCH_PATH", "~/Stable-Diffusion-3-From-Scratch")
    folder = Path(named).expanduser()
    return folder if (folder / "src" / "models").is_dir() else f"no clone of SD3 from scratch at {folder}"


class _SwiGLU(nn.Module):
    """What xformers' fused SwiGLU computes, under its names."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(inputs, 2 * hidden), nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(nn.functional.silu(gate) * value)


class _Fp32Torch(ModuleType):
    """torch, in which bfloat16 is float32: the reference computes attention in bf16, too coarse to compare with."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def reference_model(clone: Path, **settings: Any) -> nn.Module:
    """Its `diff_model` with random weights."""
    stubs = {
        "xformers": {},
        "xformers.ops": {},
        "xformers.ops.swiglu_op": {"SwiGLU": _SwiGLU},
        "colorama": {"Fore": None},
        "src.helpers.VAE_T5_CLIP_inference": {"VAE_T5_CLIP_inference": None},
    }
    for name, content in stubs.items():
        module = ModuleType(name)
        vars(module).update(content)
        sys.modules.setdefault(name, module)
    sys.path.insert(0, str(clone))
    try:
        diff_model = importlib.import_module("src.models.diff_model").diff_model
        attention = importlib.import_module("src.blocks.Attention")
    finally:
        sys.path.remove(str(clone))
    attention.torch = _Fp32Torch("torch")
    return diff_model(device="cpu", checkpoint_MLP=False, checkpoint_attn=False, **settings)
