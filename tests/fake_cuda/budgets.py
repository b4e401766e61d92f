"""What an evaluation may cost at most: the one table of launches, exchanges and memory.

Each number is what was measured when it was set, with little slack: a change that lowers one lowers it here.
"""

from __future__ import annotations

from typing import NamedTuple

from parallel_backend.config import MeshSpec

from .networks import Config, from_scratch, large, medium, sdxl


class Budget(NamedTuple):
    """Of one evaluation of a picture of `pixels` squared with guidance, on `rank` of `mesh`, in bf16.

    Args:
        launches: kernels, each part of a composite counted; an SDPA or RMS norm is one.
        exchanges: collectives and neighbour exchanges that are started.
        mib: the most that it holds beside weights and what it is given.
    """

    config: Config
    mesh: MeshSpec
    rank: int
    pixels: int
    displaced: bool
    launches: int
    exchanges: int
    mib: int


BUDGETS = {
    "SD3.5-Large, one rank": Budget(large(), MeshSpec(), 0, 1024, False, 0, 0, 0),
    "SD3.5-Large, cfg=2 ulysses=4": Budget(large(), MeshSpec(cfg=2, ulysses=4), 1, 1024, False, 0, 0, 0),
    "SD3.5-Large, cfg=2 ring=4": Budget(large(), MeshSpec(cfg=2, ring=4), 1, 1024, False, 0, 0, 0),
    "SD3.5-Large, cfg=2 ring=4, displaced": Budget(large(), MeshSpec(cfg=2, ring=4), 1, 1024, True, 0, 0, 0),
    "SD3.5-Large, tp=4": Budget(large(), MeshSpec(tp=4), 1, 1024, False, 0, 0, 0),
    "SD3.5-Medium, one rank": Budget(medium(), MeshSpec(), 0, 1024, False, 0, 0, 0),
    "SD3 from scratch, one rank": Budget(from_scratch(), MeshSpec(), 0, 1024, False, 0, 0, 0),
    "SDXL, cfg=2": Budget(sdxl(), MeshSpec(cfg=2), 0, 1024, False, 0, 0, 0),
    "SDXL, cfg=2 patch=4": Budget(sdxl(), MeshSpec(cfg=2, patch=4), 1, 1024, False, 0, 0, 0),
    "SDXL, cfg=2 patch=4, displaced": Budget(sdxl(), MeshSpec(cfg=2, patch=4), 1, 1024, True, 0, 0, 0),
}
