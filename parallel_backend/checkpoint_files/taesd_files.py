"""TAESD's pairs of files, by the names that ComfyUI's vae_approx folder has them."""

from __future__ import annotations

from pathlib import Path

# By channels of their latents: SD3's and SDXL's.
FAMILIES = {16: "taesd3", 4: "taesdxl"}
ENCODER, DECODER = "_encoder.safetensors", "_decoder.safetensors"


def taesd_files(folder: Path, name: str) -> tuple[Path, Path]:
    """The encoder's and the decoder's; `name` as in taesd3."""
    return folder / f"{name}{ENCODER}", folder / f"{name}{DECODER}"
