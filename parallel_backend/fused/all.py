"""All kernels of our own."""

from .gated_gelu import GATED_GELU
from .group_norm import MESSAGE, MOMENTS, NORM
from .joint_heads import JOIN, PART
from .merged_attention import MERGE
from .modulated_norm import MODULATED_NORM

FUSED = (MOMENTS, MESSAGE, NORM, GATED_GELU, MODULATED_NORM, JOIN, PART, MERGE)
