"""How long a call takes, on the device and on the host, and how busy the GPU was meanwhile."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")
Call = Callable[[], object]


@dataclass(frozen=True)
class Timed:
    """Milliseconds, medians: from the start to the end of all its work, and until the call returned to Python."""

    whole: float
    host: float


def timed(call: Call, device: torch.device, warm_up: int, repeats: int) -> Timed:
    """`call` after some that don't count. Each begins with an idle device, so that the host's time is its own."""
    for _ in range(warm_up):
        call()
    rounds = [_once(call, device) for _ in range(repeats)]
    return Timed(*(statistics.median(column) for column in zip(*rounds, strict=True)))


def _once(call: Call, device: torch.device) -> tuple[float, float]:
    synchronize(device)
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        spent = (time.perf_counter() - start) * 1000
        return spent, spent
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start = time.perf_counter()
    before.record()
    call()
    after.record()
    host = (time.perf_counter() - start) * 1000
    after.synchronize()
    return before.elapsed_time(after), host


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Profile:
    """Of one call. `busy` is milliseconds in which a kernel ran; `slowest` the kernels that took most of them."""

    kernels: int
    copies: int
    busy: float
    slowest: list[tuple[str, float]]


def profile(call: Call, device: torch.device) -> Profile:
    """What a call runs on the GPU. `call` must have been warmed up."""
    synchronize(device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        synchronize(device)
    spans: list[tuple[float, float]] = []
    by_name: Counter[str] = Counter()
    copies = 0
    for event in profiler.events():
        if event.device_type != torch.autograd.DeviceType.CUDA or getattr(event, "is_user_annotation", False):
            continue
        if event.name.startswith(("Memcpy", "Memset")):
            copies += 1
        spans.append((event.time_range.start, event.time_range.end))
        by_name[event.name] += event.time_range.end - event.time_range.start
    slowest = [(name, spent / 1000) for name, spent in by_name.most_common(6)]
    return Profile(len(spans) - copies, copies, covered(spans) / 1000, slowest)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of what these spans cover together."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def captured(call: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A CUDA graph of a call and the result that each replay writes. The tensors that it reads must stay where they are."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set themselves up here, which a capture forbids
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = call()
    return graph, result
