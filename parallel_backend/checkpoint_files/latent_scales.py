"""A VAE's latent becomes the model's by (latent - shift) * scale. Sources: the configurations of SD3's and SDXL's VAE."""

from __future__ import annotations

SD3_SCALE, SD3_SHIFT = 1.5305, 0.0609
SDXL_SCALE, SDXL_SHIFT = 0.13025, 0.0
