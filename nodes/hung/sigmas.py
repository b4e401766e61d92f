"""Sigmas as packs compare them: in fp32."""

from __future__ import annotations

from math import inf

import torch


def in_fp32(sigma: float) -> float:
    """That number as an fp32 tensor holds it."""
    return float(torch.tensor(sigma, dtype=torch.float32))


def above(sigma: float) -> float:
    """The least that is above, for what acts before that one, and not at it."""
    return float(torch.nextafter(torch.tensor(sigma, dtype=torch.float32), torch.tensor(inf)))
