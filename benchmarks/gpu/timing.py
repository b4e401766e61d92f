"""Where a call makes the host wait for the GPU; the times themselves are parallel_backend/bench/device_time.py's."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from pathlib import Path

import torch

from parallel_backend.bench.device_time import Call


def synchronizations(call: Call) -> dict[str, int]:
    """Where a call makes the host wait for the GPU: file and line, and how often."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [w for w in caught if "called a synchronizing" in str(w.message)]
    return dict(Counter(f"{os.path.join(*Path(w.filename).parts[-2:])}:{w.lineno}" for w in found))
