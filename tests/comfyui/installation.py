"""Where a real ComfyUI is, and the Python that runs it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class ComfyInstallation:
    folder: Path
    python: str


def find_installation() -> ComfyInstallation | str:
    """$COMFYUI_PATH, else comfy-cli's default place; a sentence that says so where there is none.

    Its Python is $COMFYUI_PYTHON, else that of a .venv or venv inside it, else the one that runs the tests.
    """
    folder = Path(os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI")).expanduser()
    if not (folder / "main.py").is_file():
        return f"no ComfyUI at {folder}"
    candidates = [
        os.environ.get("COMFYUI_PYTHON", ""),
        *(str(folder / v / "bin" / "python") for v in (".venv", "venv")),
    ]
    return ComfyInstallation(folder, next((c for c in candidates if c and Path(c).is_file()), sys.executable))
