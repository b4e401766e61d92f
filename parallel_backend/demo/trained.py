"""The demo's trained checkpoints: a ComfyUI models folder of its own, inside this package."""

from __future__ import annotations

from pathlib import Path

MODELS = Path(__file__).parent / "models"
# A folder of its own in each of ComfyUI's, so that no file takes the name of a real one.
OWN = "parallel_demo"
MMDIT = MODELS / "diffusion_models" / OWN / "mmdit.safetensors"
AUTOENCODER = MODELS / "vae_approx" / OWN
TAESD3 = (AUTOENCODER / "taesd3_encoder.safetensors", AUTOENCODER / "taesd3_decoder.safetensors")
