"""What there is to tell of one thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import BackendError

Verdict = Literal["wrong", "note", "ok"]


@dataclass(frozen=True)
class Finding:
    """`remedy` is one command or action, about a note or what is wrong; `details` are what else was said of it, as in errors.py."""

    verdict: Verdict
    what: str
    remedy: str = ""
    details: str = ""


def wrong(error: BackendError, before: str = "") -> Finding:
    """An error as a finding; `before` begins its sentence."""
    return Finding("wrong", before + error.message, error.remedy, error.details)
