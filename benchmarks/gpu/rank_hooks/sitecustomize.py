"""In a rank that torchrun starts with this folder on its PYTHONPATH: a host of its own for NCCL, and two signals.

Python imports this before all else, and only the rank's number tells it from other processes.
SIGUSR1: the thread that computes sleeps for ever before its next line. SIGUSR2: the GPU has no more memory for this rank.
"""

from __future__ import annotations

import os
import signal
import time

SPARE_BYTES = 16 * 2**20


def _sleep(*_: object) -> None:
    time.sleep(10**6)


def _no_more_memory(*_: object) -> None:
    import torch

    held, total = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (held + SPARE_BYTES) / total))


if "RANK" in os.environ and "LOCAL_RANK" in os.environ:
    os.environ["NCCL_HOSTID"] = f"rank{os.environ['RANK']}"
    signal.signal(signal.SIGUSR1, _sleep)
    signal.signal(signal.SIGUSR2, _no_more_memory)
