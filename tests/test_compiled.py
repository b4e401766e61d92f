"""Compiled blocks give the pictures of those that are not, whatever ranks send each other meanwhile."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from compiled_pictures import CASES, Compared
from torch import Tensor, nn
from torch._dynamo.utils import counters

import parallel_backend
from parallel_backend.config import MeshSpec
from parallel_backend.distributed.graph_breaks import keep_out_of_graphs
from parallel_backend.distributed.mesh import build_mesh
from parallel_backend.distributed.stale import EXACT
from parallel_backend.errors import ConfigError
from parallel_backend.models.compiled import MARKED, check_compiler, compile_blocks, refuse_tensor_parallel
from parallel_backend.models.mmdit import MMDiT
from parallel_backend.models.network import TokenNetwork
from parallel_backend.small_checkpoints.mmdit import small_config


@pytest.mark.parametrize("case", CASES)
def test_compiled_pictures_are_those_of_eager_blocks(case: str, ran_beside: dict[str, Compared]) -> None:
    eager, compiled = ran_beside[case].eager, ran_beside[case].compiled
    assert not torch.equal(compiled, eager), "the compiler's sums are of another order"
    assert (compiled - eager).abs().max() <= 1e-4 * eager.abs().max()
    assert any(name.endswith("/compiled") for name in ran_beside[case].models)


@pytest.mark.parametrize("case", CASES)
def test_what_is_compiled_is_told_before_and_after(case: str, ran_beside: dict[str, Compared]) -> None:
    told = [(event.what, event.done) for event in ran_beside[case].told if "compiling" in event.what]
    size = "96 x 144" if CASES[case][0] == "mmdit" else "96 x 160"
    what = f"first step of {size}: compiling its blocks may take a minute or more"
    kinds = len(told) // 2  # of prompts and phases, on rank 0
    assert told == [(what, 0), (what, 1)] * kinds and 1 <= kinds <= 4


def test_all_that_breaks_graphs_is_kept_out_of_them() -> None:
    code = "\n".join(file.read_text() for file in Path(parallel_backend.__file__).parent.rglob("*.py"))
    marked = re.findall(r"@breaks_graph\s+def (\w+)", code)
    kept_out = {name for owner in MARKED for name, value in vars(owner).items() if hasattr(value, "breaks_graph")}
    assert len(marked) == 11 and set(marked) == kept_out


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


def test_tensor_parallel_blocks_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="compile is for ranks that have whole layers; here is cfg=2 tp=2"):
        refuse_tensor_parallel(MeshSpec(cfg=2, tp=2))
    refuse_tensor_parallel(MeshSpec(cfg=2, ulysses=2))


@torch.inference_mode()
def test_a_block_that_sends_nothing_is_one_graph() -> None:
    torch._dynamo.reset()
    counters.clear()
    with torch.device("meta"):
        model = MMDiT(small_config("sd3.5-medium", depth=3), build_mesh(MeshSpec()), "native")
    model = model.to_empty(device="cpu")
    network = TokenNetwork(model, NoPositions())
    x, prepared = torch.zeros(1, 16, 4, 4), network.prepare(torch.zeros(1, 3, 4096), torch.zeros(1, 2048))
    with torch._dynamo.config.patch(suppress_errors=False):
        for block in model.joint_blocks.values():
            block.forward = torch.compile(block.forward, backend="eager", fullgraph=True)
        keep_out_of_graphs(*MARKED)
        network(x, torch.ones(1), prepared, EXACT)
    assert counters["stats"]["unique_graphs"] == 3, "with a second attention, without, and the last"


class NoPositions:
    def rows(self, rows: int, columns: int, ranges: Sequence[tuple[int, int]]) -> Tensor:
        return torch.zeros(())
