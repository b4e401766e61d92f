"""Where a run's random numbers come from: the same draws as ComfyUI's for the same seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .brownian import BrownianPath, DrawingThread, Interval


def initial_noise(shape: Sequence[int], seed: int, batch_index: Sequence[int] | None = None) -> Tensor:
    """Standard normal noise, fp32 on the CPU; row i is draw number batch_index[i] of the seed's stream.

    Without batch_index the whole batch is one draw.
    """
    generator = torch.Generator().manual_seed(seed)
    if batch_index is None:
        return torch.randn(*shape, generator=generator)
    draws = [torch.randn(1, *shape[1:], generator=generator) for _ in range(max(batch_index) + 1)]
    return torch.cat([draws[i] for i in batch_index])


class Noise(Protocol):
    """What samplers draw. Sigmas are on the CPU."""

    def gaussian(self) -> Tensor: ...
    def foresee(self, intervals: Sequence[Interval]) -> None:
        """All that the sampler will ask of `brownian`, in this order."""
        ...

    def brownian(self, sigma_from: Tensor, sigma_to: Tensor) -> Tensor: ...


class StepNoise:
    """Noise that samplers add between steps, of the shape and device of `like`. Leaving it ends what it has started.

    Args:
        sigmas: the run's sigmas; they bound the Brownian path.
        share: makes a tensor equal on all ranks. A GPU's generator gives other numbers on a GPU of another size,
            so what is drawn on a GPU is rank 0's.
        ahead: whether a thread draws what a sampler foresees, while the device computes.
    """

    def __init__(
        self, like: Tensor, sigmas: Tensor, seed: int, share: Callable[[Tensor], Tensor], *, ahead: bool
    ) -> None:
        self._like, self._sigmas, self._seed, self._share = like, sigmas, seed, share
        # On a CPU the start noise was drawn from the seed's own stream; the next seed keeps these draws apart.
        own_seed = (seed + 1) % 2**64 if like.device.type == "cpu" else seed
        self._generator = torch.Generator(like.device).manual_seed(own_seed)
        self._path: BrownianPath | None = None
        self._thread = DrawingThread() if ahead else None

    def __enter__(self) -> StepNoise:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.end()

    def gaussian(self) -> Tensor:
        """A fresh standard normal draw."""
        noise = torch.randn(
            self._like.shape, dtype=self._like.dtype, device=self._like.device, generator=self._generator
        )
        return noise if self._like.device.type == "cpu" else self._share(noise)

    def foresee(self, intervals: Sequence[Interval]) -> None:
        if self._thread is not None:
            self._thread.draw(self._increment, intervals)

    def brownian(self, sigma_from: Tensor, sigma_to: Tensor) -> Tensor:
        """The increment of a Brownian path between two sigmas, at unit variance: smaller steps sum to larger ones."""
        interval = (sigma_from, sigma_to)
        drawn = self._increment(interval) if self._thread is None else self._thread.take(interval)
        if self._like.device.type == "cpu":
            return drawn.to(self._like)
        return drawn.pin_memory().to(self._like.device, self._like.dtype, non_blocking=True)

    def _increment(self, interval: Interval) -> Tensor:
        """Drawn on the CPU, where it is the same on every rank."""
        if self._path is None:
            low, high = self._sigmas[self._sigmas > 0].min(), self._sigmas.max()
            self._path = BrownianPath(self._like.shape, low, high, self._seed)
        return self._path.increment(interval)


class SharedNoise:
    """Noise of the whole image, drawn once for samplers that each have some rows of it."""

    def __init__(self, whole: Noise) -> None:
        self._whole = whole
        self._draws: list[Tensor] = []
        self._increment: tuple[tuple[float, float], Tensor] | None = None
        self._foreseen = False

    def of(self, rows: slice) -> Noise:
        """For the sampler of these rows of latent."""
        return _RowsOfNoise(self, rows)

    def draw_ahead(self, steps: int) -> None:
        """Makes the draws of a run of so many steps now, while all ranks are together to share them.

        A sampler that draws at all has done so in its first step.
        """
        if self._draws:
            self.gaussian(steps - 1)

    def gaussian(self, number: int) -> Tensor:
        while len(self._draws) <= number:
            self._draws.append(self._whole.gaussian())
        return self._draws[number]

    def foresee(self, intervals: Sequence[Interval]) -> None:
        """Every patch's sampler will ask for the same; the first one says so."""
        if not self._foreseen:
            self._foreseen = True
            self._whole.foresee(intervals)

    def brownian(self, sigma_from: Tensor, sigma_to: Tensor) -> Tensor:
        bounds = (float(sigma_from), float(sigma_to))
        if self._increment is None or self._increment[0] != bounds:
            self._increment = bounds, self._whole.brownian(sigma_from, sigma_to)
        return self._increment[1]


class _RowsOfNoise:
    def __init__(self, shared: SharedNoise, rows: slice) -> None:
        self._shared, self._rows, self._next = shared, rows, 0

    def gaussian(self) -> Tensor:
        self._next += 1
        return self._shared.gaussian(self._next - 1)[:, :, self._rows]

    def foresee(self, intervals: Sequence[Interval]) -> None:
        self._shared.foresee(intervals)

    def brownian(self, sigma_from: Tensor, sigma_to: Tensor) -> Tensor:
        return self._shared.brownian(sigma_from, sigma_to)[:, :, self._rows]
