"""ControlNets of SD3 and SD3.5 against a real ComfyUI's: the same files, the same tensors for each block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui.core_run import run_script
from comfyui.installation import ComfyInstallation
from local_network import control_residuals, evaluated, local_control, local_network
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallel_backend import MeshSpec
from parallel_backend.distributed.mesh import build_mesh
from parallel_backend.distributed.stale import EXACT
from parallel_backend.small_checkpoints.mmdit import small_config, write_mmdit
from parallel_backend.small_checkpoints.mmdit_control import DOUBLE, INPAINTING, INSTANTX, STABILITY, write_control
from parallel_backend.small_checkpoints.prompts import random_prompt

# The kind, the family of its main model, its blocks beside that one's six, and the latent's height and width.
CASES = {
    "instantx": (INSTANTX, "sd3-medium", 2, (9, 15)),
    "instantx, blocks that don't divide": (INSTANTX, "sd3.5-large", 4, (12, 8)),
    "instantx, every block": (INSTANTX, "sd3-medium", 6, (8, 8)),
    "instantx of sd3.5-medium": (INSTANTX, "sd3.5-medium", 3, (12, 7)),
    "inpainting": (INPAINTING, "sd3-medium", 5, (8, 12)),
    "stability": (STABILITY, "sd3.5-large", 3, (9, 15)),
    "stability, blocks that don't divide": (STABILITY, "sd3.5-large", 4, (20, 6)),
    "stability, one row": (STABILITY, "sd3.5-large", 2, (2, 8)),
    "double": (DOUBLE, "sd3.5-large", 2, (11, 14)),
}
PARTS = ("x", "timesteps", "context", "pooled", "hint")


def inputs(kind: str, height: int, width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(height)
    x = torch.randn(2, 16, height, width, generator=generator)
    hint = torch.randn(2, 17 if kind == INPAINTING else 16, height, width, generator=generator)
    timesteps = torch.rand(2, generator=generator) * 1000
    return dict(zip(PARTS, (x, timesteps, *random_prompt(3, 81, 2), hint), strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("control")
    for name, (kind, family, blocks, _) in CASES.items():
        config = small_config(family, depth=6, pos_embed_size=24)
        write_control(folder / f"{name}.safetensors", kind, config, blocks)
        write_mmdit(folder / f"{family}.safetensors", config)
    return folder


@pytest.fixture(scope="module")
def of_core(comfy: ComfyInstallation, folder: Path) -> dict[str, Tensor]:
    given, results = folder / "cases", folder / "results"
    tensors, cases = {}, {}
    for name, (kind, family, _, size) in CASES.items():
        tensors |= {f"{name}/{part}": tensor for part, tensor in inputs(kind, *size).items()}
        cases[name] = {"control": f"{folder / name}.safetensors", "main": f"{folder / family}.safetensors"}
    save_file(tensors, given, metadata={"cases": json.dumps(cases)})
    run_script(comfy, "control_reference.py", given, results, seconds=600)
    return load_file(results)


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.inference_mode()
@pytest.mark.parametrize("name", CASES)
def test_residuals_and_the_steered_velocity_equal_cores(name: str, folder: Path, of_core: dict[str, Tensor]) -> None:
    kind, family, _, size = CASES[name]
    mesh = build_mesh(MeshSpec())
    main: Any = local_network(folder / f"{family}.safetensors", mesh)
    *given, hint = inputs(kind, *size).values()
    network = local_control(folder / f"{name}.safetensors", main, mesh)
    ours = control_residuals(network, *given, network.prepare(hint), EXACT).output
    theirs = [of_core[f"{name}/{i}"] for i in range(sum(key.startswith(f"{name}/") for key in of_core) - 1)]
    # Core's main model looks at no more of them than it has blocks.
    assert 0 < len(ours) == min(len(theirs), main.config.depth)
    for out, expected in zip(ours, theirs, strict=False):
        assert out is not None and difference(out, expected) <= 1e-5
    steered = of_core[f"{name}/velocity"]
    assert difference(evaluated(main, *given, EXACT), steered) > 1e-2
    for block, added in zip(main.model.joint_blocks.values(), ours, strict=False):
        block.register_forward_hook(lambda module, given, out, added=added: (out[0], out[1] + added))
    assert difference(evaluated(main, *given, EXACT), steered) <= 1e-5
