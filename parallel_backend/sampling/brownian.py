"""The Brownian path whose increments SDE samplers add, and the thread that draws them ahead.

An increment takes a CPU tens of milliseconds, as long as a step on several GPUs: it is drawn while they compute.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torchsde
from torch import Tensor

# (sigma from, sigma to), 0-dim on the CPU.
Interval = tuple[Tensor, Tensor]

# Draws that wait to be taken; more would only hold memory.
AHEAD = 4


class BrownianPath:
    """A path of the seed's between two sigmas, of tensors of `shape`, fp32 on the CPU."""

    def __init__(self, shape: Sequence[int], low: Tensor, high: Tensor, seed: int) -> None:
        self._tree = torchsde.BrownianTree(low, torch.zeros(*shape), high, entropy=seed)

    def increment(self, interval: Interval) -> Tensor:
        """At unit variance."""
        start, stop = (sigma.float() for sigma in interval)
        low, high, sign = (start, stop, 1) if start < stop else (stop, start, -1)
        return self._tree(low, high) * sign / (stop - start).abs().sqrt()


class DrawingThread:
    """Draws what was foreseen, in that order, a few ahead of whoever takes them."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="brownian")
        self._drawn: deque[tuple[Interval, Future[Tensor]]] = deque()
        self._coming: Iterator[tuple[Interval, Future[Tensor]]] = iter(())

    def draw(self, draw: Callable[[Interval], Tensor], intervals: Sequence[Interval]) -> None:
        """`draw` runs in the thread, and nowhere else from now on."""
        in_thread = torch.inference_mode()(draw)  # the caller's own is not the thread's
        self._coming = ((interval, self._pool.submit(in_thread, interval)) for interval in intervals)
        self._keep_ahead()

    def take(self, interval: Interval) -> Tensor:
        """The next draw, which is that of `interval`. Raises: what drawing it has raised."""
        foreseen, future = self._drawn.popleft()
        assert foreseen == interval, f"{interval} is asked for, {foreseen} was foreseen"
        self._keep_ahead()
        return future.result()

    def end(self) -> None:
        """The thread has ended; what it hasn't begun is not drawn."""
        self._pool.shutdown(cancel_futures=True)

    def _keep_ahead(self) -> None:
        while len(self._drawn) < AHEAD and (following := next(self._coming, None)) is not None:
            self._drawn.append(following)
