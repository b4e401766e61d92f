"""Where a run's random numbers come from: the same draws as ComfyUI's for the same seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torchsde
from torch import Tensor


def initial_noise(shape: Sequence[int], seed: int, batch_index: Sequence[int] | None = None) -> Tensor:
    """Standard normal noise, fp32 on the CPU; row i is draw number batch_index[i] of the seed's stream.

    Without batch_index the whole batch is one draw.
    """
    generator = torch.Generator().manual_seed(seed)
    if batch_index is None:
        return torch.randn(*shape, generator=generator)
    draws = [torch.randn(1, *shape[1:], generator=generator) for _ in range(max(batch_index) + 1)]
    return torch.cat([draws[i] for i in batch_index])


class StepNoise:
    """Noise that samplers add between steps, of the shape and device of `like`.

    Args:
        sigmas: the run's sigmas; they bound the Brownian path.
        share: makes a tensor equal on all ranks. A GPU's generator gives other numbers on a GPU of another size,
            so what is drawn on a GPU is rank 0's.
    """

    def __init__(self, like: Tensor, sigmas: Tensor, seed: int, share: Callable[[Tensor], Tensor]) -> None:
        self._like, self._share = like, share
        # On a CPU the start noise was drawn from the seed's own stream; the next seed keeps these draws apart.
        own_seed = (seed + 1) % 2**64 if like.device.type == "cpu" else seed
        self._generator = torch.Generator(like.device).manual_seed(own_seed)
        self._bounds = (sigmas[sigmas > 0].min().cpu(), sigmas.max().cpu())
        self._seed = seed
        self._path: torchsde.BrownianTree | None = None

    def gaussian(self) -> Tensor:
        """A fresh standard normal draw."""
        noise = torch.randn(
            self._like.shape, dtype=self._like.dtype, device=self._like.device, generator=self._generator
        )
        return noise if self._like.device.type == "cpu" else self._share(noise)

    def brownian(self, sigma_from: Tensor, sigma_to: Tensor) -> Tensor:
        """The increment of a Brownian path between two sigmas, at unit variance: smaller steps sum to larger ones."""
        if self._path is None:
            low, high = self._bounds
            self._path = torchsde.BrownianTree(
                low, torch.zeros_like(self._like, device="cpu"), high, entropy=self._seed
            )
        start, stop = sigma_from.cpu().float(), sigma_to.cpu().float()
        low, high, sign = (start, stop, 1) if start < stop else (stop, start, -1)
        increment = self._path(low, high).to(self._like) * sign
        return increment / (stop - start).abs().sqrt().to(self._like.device)
