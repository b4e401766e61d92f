"""Guidance beside classifier-free guidance, in numbers, and their checks. They travel as they are."""

from __future__ import annotations

from math import inf, isfinite

import msgspec

from ..errors import ConfigError


class APG(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Adaptive projected guidance, as ComfyUI's node has it.

    Source: Sadat et al. 2024 (arXiv 2410.02416).

    Args:
        eta: what the part of guidance along cond counts; at 1 all of it, as without.
        norm_threshold: guidance that is longer is cut to this length; 0 cuts none.
        momentum: what the guidance of the evaluations before counts; below 0 it is taken away.
    """

    eta: float = 1.0
    norm_threshold: float = 5.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        _check_finite("APG", eta=self.eta, norm_threshold=self.norm_threshold, momentum=self.momentum)
        if self.norm_threshold < 0:
            raise ConfigError(
                f"norm_threshold={self.norm_threshold} of APG is no length.", "Use 0 for none, or more; 5 is usual."
            )


class AwayFromWeaker(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Guidance away from what a weaker model makes of cond: guided + (cond - weaker) * scale.

    Source: perturbed-attention guidance (Ahn et al. 2024, arXiv 2403.17377), equation 9.

    Args:
        scale: above 0.
        start, end: sigmas between which it acts, both included; None from the first, or to the last.
        rescale: how far the result is brought back to the spread of cond, over the whole batch.
    """

    scale: float = 3.0
    start: float | None = None
    end: float | None = None
    rescale: float = 0.0

    def __post_init__(self) -> None:
        _check_finite("Guidance away from a weaker model", scale=self.scale, rescale=self.rescale)
        if self.scale <= 0:
            raise ConfigError(f"scale={self.scale} leads to no weaker model.", "Use more than 0; 3 is usual.")
        start, end = self._range
        if not start >= end:
            raise ConfigError(
                f"Guidance away from a weaker model acts from sigma {start} to {end}.", "Give the greater sigma first."
            )

    def is_at(self, sigma: float) -> bool:
        """Whether it acts there."""
        start, end = self._range
        return end <= sigma <= start

    @property
    def _range(self) -> tuple[float, float]:
        return inf if self.start is None else self.start, 0.0 if self.end is None else self.end


def check_neg_scale(neg_scale: float | None) -> None:
    """Raises: ConfigError: it is no number."""
    _check_finite("Perp-Neg", neg_scale=neg_scale or 0.0)


def _check_finite(what: str, **numbers: float) -> None:
    for name, number in numbers.items():
        if not isfinite(number):
            raise ConfigError(f"{name}={number} of {what} is not a number.", "Use a finite number.")
