"""torch.compile of a model's repeated blocks, one block at a time: all blocks of a kind share the compiled code.

What ranks send each other is left out of it: see the functions marked with `breaks_graph`. Where they send nothing within a block,
the block is one graph, its attention included.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..config import CELL, MeshSpec
from ..distributed import collectives
from ..distributed.band_attention import BandSelfAttention, CachedCrossAttention
from ..distributed.band_norm import BandGroupNorm
from ..distributed.graph_breaks import keep_out_of_graphs
from ..errors import ConfigError, in_a_line
from .checkpoint import TensorSource, is_quantised
from .transformer import Attend

# A block's code is made again for each of: branch of the guidance, kind of step, shape; torch's own limit is 8.
MOST_VARIANTS = 64
# All that has functions with the mark.
MARKED = (collectives, collectives.Handle, BandSelfAttention, CachedCrossAttention, BandGroupNorm, Attend)


class FirstTimes:
    """Tells of a model's first evaluation of each kind, while its blocks are compiled.

    Args:
        tell: (what is under way, how many of 1 are done).
    """

    def __init__(self, tell: Callable[[str, int], object]) -> None:
        self._tell = tell
        self._known: set[Hashable] = set()

    @contextmanager
    def told(self, x: Tensor, *kind: Hashable) -> Iterator[None]:
        """An evaluation of the latent `x`, (B, C, Y, X); `kind` is what else makes it of another kind."""
        if (x.shape, kind) in self._known:
            yield
            return
        what = (
            f"first step of {x.shape[3] * CELL} x {x.shape[2] * CELL}: compiling its blocks may take a minute or more"
        )
        self._tell(what, 0)
        yield
        self._tell(what, 1)
        self._known.add((x.shape, kind))


def check_compiler(device: torch.device) -> None:
    """Raises: ConfigError: torch.compile can't make code for that device here."""
    try:
        torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.ones(8, device=device))
    except Exception as error:
        raise ConfigError(
            f"torch.compile doesn't work here: {in_a_line(error)}",
            "Install a C++ compiler (on GPUs also triton), or turn compile off.",
        ) from error


def refuse_quantised(source: TensorSource) -> None:
    """Raises: ConfigError: its weights are quantised; their values are made in Python, which breaks every graph."""
    if is_quantised(source):
        raise ConfigError(
            f"{source.path.name} is quantised or to be held in fp8, and compile is for weights of half precision or float32.",
            "Turn compile off in Mesh Config, or use the half-precision file without fp8.",
        )


def refuse_tensor_parallel(spec: MeshSpec) -> None:
    """Raises: ConfigError: its sums break every block's graph in a dozen pieces, whose calls cost more than compiling wins."""
    if spec.tp > 1:
        raise ConfigError(
            f"compile is for ranks that have whole layers; here is {spec.describe()}.",
            "Turn compile off in Mesh Config, or use cfg, ulysses or pp in place of tp.",
        )


def compile_blocks(module: nn.Module, kind: type[nn.Module]) -> None:
    """Every block of that kind below `module` runs as compiled code from now on; hooks on them stay as they are.

    Compiling takes its time when a block first runs, and again for each new kind of shape.
    """
    keep_out_of_graphs(*MARKED)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_VARIANTS)
    for block in module.modules():
        if isinstance(block, kind):
            block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
