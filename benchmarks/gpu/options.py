"""How one section is run. Knows nothing of torch, so that a section starts at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Options:
    """`scratch` is a folder that all sections share and that is removed in the end."""

    device: str
    tiny: bool
    scratch: Path
