"""All kernels of our own."""

from .gated_gelu import GATED_GELU
from .group_norm import MESSAGE, MOMENTS, NORM

FUSED = (MOMENTS, MESSAGE, NORM, GATED_GELU)
