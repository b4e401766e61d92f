"""How busy a GPU is in an evaluation, and with what."""

from __future__ import annotations

import torch

from parallel_backend.bench.device_time import Call, Profile, Timed, profile

from .report import NO_GPU, Report, Value

COLUMNS = ("evaluation", "ms", "of the host", "kernels", "copies and fills", "ms in which one runs", "busy share")


def busy_row(name: str, spent: Timed, call: Call, device: torch.device) -> tuple[list[Value], Profile | None]:
    """A row under COLUMNS. Kernels are the profiler's, times were taken without it: it slows what comes after it."""
    if device.type != "cuda":
        return [name, spent.whole, spent.host, NO_GPU], None
    seen = profile(call, device)
    return [name, spent.whole, spent.host, seen.kernels, seen.copies, seen.busy, seen.busy / spent.whole], seen


def tell_slowest(report: Report, what: str, seen: Profile | None) -> None:
    """Which kernels take most of a call."""
    report.table(f"Slowest kernels of {what}", "kernel", "ms")
    for name, milliseconds in seen.slowest if seen is not None else [(NO_GPU, None)]:
        report.row(name[:70].replace("|", "/"), milliseconds)
