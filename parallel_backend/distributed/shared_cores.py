"""What CPU ranks are to each other on the cores that they share."""

from __future__ import annotations

import os
from contextlib import suppress


def wait_for_a_core() -> None:
    """Whatever wakes this thread, or one that it starts later, it waits until a core is free: Linux's SCHED_BATCH.

    Ranks wake each other some hundred times a step. If the woken one pushes the waker off its core, both lose: a fifth to a
    third of a step where ranks outnumber cores, a tenth where each has its own (benchmarks/RESULTS.md).
    """
    with suppress(OSError):  # sandboxes may forbid it: ranks are slower then, and compute the same
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
