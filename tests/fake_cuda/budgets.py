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
            An exact one is the second of its job, a displaced one the third: what is made of the prompt and of the timesteps of
            the schedule is there.
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
    "SD3.5-Large, one rank": Budget(large(), MeshSpec(), 0, 1024, False, 810, 0, 565),
    "SD3.5-Large, cfg=2 ulysses=4": Budget(large(), MeshSpec(cfg=2, ulysses=4), 1, 1024, False, 840, 78, 85),
    "SD3.5-Large, cfg=2 ring=4": Budget(large(), MeshSpec(cfg=2, ring=4), 1, 1024, False, 1110, 116, 100),
    "8 blocks of it, cfg=2 ring=4, displaced": Budget(large(8), MeshSpec(cfg=2, ring=4), 1, 1024, True, 210, 10, 105),
    "SD3.5-Large, tp=4": Budget(large(), MeshSpec(tp=4), 1, 1024, False, 810, 150, 305),
    "SD3.5-Medium, one rank": Budget(medium(), MeshSpec(), 0, 1024, False, 590, 0, 405),
    "SD3 from scratch, one rank": Budget(from_scratch(), MeshSpec(), 0, 1024, False, 1000, 0, 465),
    "SDXL, cfg=2": Budget(sdxl(), MeshSpec(cfg=2), 0, 1024, False, 1480, 1, 140),
    "SDXL, cfg=2 patch=4": Budget(sdxl(), MeshSpec(cfg=2, patch=4), 1, 1024, False, 1690, 192, 40),
    "SDXL, cfg=2 patch=4, displaced": Budget(sdxl(), MeshSpec(cfg=2, patch=4), 1, 1024, True, 1680, 15, 40),
}


# GiB that a decode of 2048 pixels squared by SD3's VAE holds at most beside its weights, by ranks, in half precision; fp32
# takes twice as much. Encoding takes 5.07 and 2.54.
DECODES = {1: 6.01, 2: 3.01, 4: 1.51, 8: 0.76}
