"""Pictures of compiled blocks beside those of eager ones, on a backend of their own: what the compiler leaves in ranks is much."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel_backend import Backend, Conditioning, MeshSpec, StepCache
from parallel_backend.rpc.messages import Progress
from parallel_backend.small_checkpoints.mmdit import small_config, write_mmdit
from parallel_backend.small_checkpoints.prompts import random_prompt, random_sdxl_prompt
from parallel_backend.small_checkpoints.unet import CONFIGS, write_unet

# Displaced jobs have synchronous steps too; guidance has two branches where the mesh has no cfg axis.
CASES: dict[str, tuple[str, MeshSpec, dict[str, Any]]] = {
    "attention in the graph": ("mmdit", MeshSpec(cfg=2), {}),
    "attention between graphs": ("mmdit", MeshSpec(ulysses=2), {}),
    "bands": ("unet", MeshSpec(patch=2), {"warmup_steps": 1}),
    "sliced bands": ("unet", MeshSpec(patch=2, sliced=True), {"warmup_steps": 1}),
    "a step cache": ("mmdit", MeshSpec(ulysses=2), {"step_cache": StepCache("first_block", 1e9, 2, 1, 0)}),
    "a step cache of bands": ("unet", MeshSpec(patch=2), {"step_cache": StepCache("deepcache", 0.0, 2, 1, 0)}),
}


@dataclass(frozen=True)
class Compared:
    """One job, computed both ways, the names of the models that were resident then, and what the compiled one told meanwhile."""

    eager: Tensor
    compiled: Tensor
    models: list[str]
    told: list[Progress]


def run_compiled() -> dict[str, Compared]:
    backend = Backend(2, "cpu", "compiled")
    try:
        with tempfile.TemporaryDirectory(prefix="pmc-") as folder:
            # A block with a second attention, and the last one.
            mmdit = write_mmdit(Path(folder) / "mmdit.safetensors", small_config("sd3.5-medium", depth=2))
            unet = write_unet(Path(folder) / "unet.safetensors", CONFIGS["tiny"], "single file")
            return {
                name: _compared(backend, mmdit if family == "mmdit" else unet, family, mesh, settings)
                for name, (family, mesh, settings) in CASES.items()
            }
    finally:
        backend.stop()


def _compared(backend: Backend, path: Path, family: str, mesh: MeshSpec, settings: dict[str, Any]) -> Compared:
    latent, prompt = ((1, 16, 18, 12), random_prompt) if family == "mmdit" else ((1, 4, 20, 12), random_sdxl_prompt)
    prompts = Conditioning(*prompt(1)), Conditioning(*prompt(2))

    def sampled(compiled: bool) -> Tensor:
        model = backend.load_model(path, mesh, "float32", compile=compiled)
        return model.sample(torch.zeros(latent), *prompts, steps=3, seed=3, cfg_scale=4.0, **settings)

    eager, told = sampled(False), list[Progress]()
    backend.on_progress = told.append
    compiled = sampled(True)
    models = [state.model for state in backend.status().models]
    backend.unload()
    backend.on_progress = None
    return Compared(eager, compiled, models, told)
