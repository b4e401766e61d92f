"""What an evaluation may cost at most: the one table of launches, exchanges and memory.

They are what was counted when they were set, launches rounded up to ten and memory to five: a change that lowers one lowers
it here.
"""

from __future__ import annotations

from typing import NamedTuple

from parallel_backend.config import MeshSpec

from .networks import Config, from_scratch, large, medium, sdxl


class Budget(NamedTuple):
    """Of one evaluation of a picture of `pixels` squared with guidance, on `rank` of `mesh`, in bf16.

    Args:
        launches: kernels, each part of a composite counted; an SDPA or RMS norm is one.
            An exact one is the first of its job, and makes the keys and values of the prompt: 70 launches of SDXL's.
        exchanges: collectives and neighbour exchanges that are started.
        mib: the most that it holds beside weights, what it is given and what the job has kept before.
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
    "SD3.5-Large, one rank": Budget(large(), MeshSpec(), 0, 1024, False, 1660, 0, 925),
    "SD3.5-Large, cfg=2 ulysses=4": Budget(large(), MeshSpec(cfg=2, ulysses=4), 1, 1024, False, 2040, 78, 125),
    "SD3.5-Large, cfg=2 ring=4": Budget(large(), MeshSpec(cfg=2, ring=4), 1, 1024, False, 2340, 116, 125),
    "8 blocks of it, cfg=2 ring=4, displaced": Budget(large(8), MeshSpec(cfg=2, ring=4), 1, 1024, True, 390, 10, 515),
    "SD3.5-Large, tp=4": Budget(large(), MeshSpec(tp=4), 1, 1024, False, 1660, 151, 435),
    "SD3.5-Medium, one rank": Budget(medium(), MeshSpec(), 0, 1024, False, 1190, 0, 730),
    "SD3 from scratch, one rank": Budget(from_scratch(), MeshSpec(), 0, 1024, False, 1670, 0, 530),
    "SDXL, cfg=2": Budget(sdxl(), MeshSpec(cfg=2), 0, 1024, False, 1640, 1, 210),
    "SDXL, cfg=2 patch=4": Budget(sdxl(), MeshSpec(cfg=2, patch=4), 1, 1024, False, 3040, 157, 90),
    "SDXL, cfg=2 patch=4, displaced": Budget(sdxl(), MeshSpec(cfg=2, patch=4), 1, 1024, True, 3710, 24, 555),
}


# GiB that a decode of 2048 pixels squared by SD3's VAE holds at most beside its weights, by ranks, in half precision; fp32
# takes twice as much. Encoding takes 5.07 and 2.54.
DECODES = {1: 6.01, 2: 3.01, 4: 1.51, 8: 0.76}
