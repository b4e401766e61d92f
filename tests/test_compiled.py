"""Compiled blocks give the pictures of those that are not, whatever ranks send each other meanwhile."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import parallel_backend
from parallel_backend import Backend, Conditioning, MeshSpec
from parallel_backend.errors import ConfigError
from parallel_backend.models.compiled import MARKED, check_compiler, compile_blocks
from parallel_backend.small_checkpoints.mmdit import small_config, write_mmdit
from parallel_backend.small_checkpoints.prompts import random_prompt, random_sdxl_prompt
from parallel_backend.small_checkpoints.unet import CONFIGS, write_unet

# Displaced jobs have synchronous steps too; guidance has two branches where the mesh has no cfg axis.
CASES = {
    "mmdit": [(MeshSpec(tp=2), {})],
    "unet": [(MeshSpec(patch=2), {"warmup_steps": 1}), (MeshSpec(patch=2, sliced=True), {"warmup_steps": 1})],
}


@pytest.mark.parametrize("family", ["mmdit", "unet"])
def test_compiled_pictures_are_those_of_eager_blocks(family: str, backend2: Backend, models: Path) -> None:
    if family == "mmdit":  # a block with a second attention, and the last one
        path = models / "diffusion_models" / "compiled-mmdit.safetensors"
        write_mmdit(path, small_config("sd3.5-medium", depth=2))
        latent, prompt = (1, 16, 18, 12), random_prompt
    else:
        path = write_unet(models / "diffusion_models" / "compiled.safetensors", CONFIGS["tiny"], "single file")
        latent, prompt = (1, 4, 20, 12), random_sdxl_prompt

    def sampled(mesh: MeshSpec, compiled: bool, **settings: Any) -> Tensor:
        model = backend2.load_model(path, mesh, "float32", compile=compiled)
        prompts = Conditioning(*prompt(1)), Conditioning(*prompt(2))
        return model.sample(torch.zeros(latent), *prompts, steps=3, seed=3, cfg_scale=4.0, **settings)

    for mesh, settings in CASES[family]:
        eager = sampled(mesh, False, **settings)
        compiled = sampled(mesh, True, **settings)
        assert not torch.equal(compiled, eager), "the compiler's sums are of another order"
        assert (compiled - eager).abs().max() <= 1e-4 * eager.abs().max(), mesh.describe()
        names = [state.model for state in backend2.status().models]
        assert any(name.endswith("/compiled") for name in names)
        backend2.unload()


def test_all_that_breaks_graphs_is_kept_out_of_them() -> None:
    code = "\n".join(file.read_text() for file in Path(parallel_backend.__file__).parent.rglob("*.py"))
    marked = re.findall(r"@breaks_graph\s+def (\w+)", code)
    kept_out = {name for owner in MARKED for name, value in vars(owner).items() if hasattr(value, "breaks_graph")}
    assert len(marked) == 6 and set(marked) == kept_out


class Block(nn.Module):
    def __init__(self, place: int) -> None:
        super().__init__()
        self.place, self.linear = place, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.silu(self.linear(x)) + x


@torch.inference_mode()
def test_blocks_share_their_code() -> None:
    torch._dynamo.reset()
    counters.clear()
    blocks = nn.Sequential(*map(Block, range(12)))
    eager = blocks(torch.ones(2, 8))
    compile_blocks(blocks, Block)
    assert torch.allclose(blocks(torch.ones(2, 8)), eager, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1


def test_without_a_compiler_it_is_refused_by_name() -> None:
    torch._dynamo.reset()
    nowhere = torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)})
    with nowhere, torch._inductor.utils.fresh_cache(), pytest.raises(ConfigError, match="turn compile off"):
        check_compiler(torch.device("cpu"))
    check_compiler(torch.device("cpu"))
