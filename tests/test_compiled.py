"""Compiled blocks give the pictures of those that are not, whatever ranks send each other meanwhile."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from compiled_pictures import CASES, Compared
from torch import Tensor, nn
from torch._dynamo.utils import counters

import parallel_backend
from parallel_backend.errors import ConfigError
from parallel_backend.models.compiled import MARKED, check_compiler, compile_blocks


@pytest.mark.parametrize("case", CASES)
def test_compiled_pictures_are_those_of_eager_blocks(case: str, ran_beside: dict[str, Compared]) -> None:
    eager, compiled = ran_beside[case].eager, ran_beside[case].compiled
    assert not torch.equal(compiled, eager), "the compiler's sums are of another order"
    assert (compiled - eager).abs().max() <= 1e-4 * eager.abs().max()
    assert any(name.endswith("/compiled") for name in ran_beside[case].models)


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
