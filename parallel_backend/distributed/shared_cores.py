"""How CPU ranks share the cores of a machine."""

from __future__ import annotations

import os
from contextlib import suppress


def never_preempt() -> None:
    """From now on this thread, and those that it starts, take no core from a running thread when they are woken.

    Ranks wake each other hundreds of times a step. A woken rank that pushes its waker off a core costs both of them: up to
    a third of a step where ranks outnumber cores, up to a tenth where they don't (benchmarks/RESULTS.md).
    Source: SCHED_BATCH of sched(7).
    """
    with suppress(OSError):  # sandboxes may forbid it; ranks are slower then, and compute the same
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
