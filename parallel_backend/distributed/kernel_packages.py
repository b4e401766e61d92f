"""Packages of attention kernels, imported before diffusers does.

One that was built for another torch raises when it is imported; diffusers 0.36 goes down with it, and every rank too.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from importlib.util import find_spec

from ..errors import in_a_line

PACKAGES = {"flash": "flash_attn", "flash3": "flash_attn_interface", "sage": "sageattention"}


def hide_broken(packages: Iterable[str]) -> dict[str, str]:
    """Those that are there and can't be imported are from now on as if they were not there; what each raised."""
    broken = {}
    for package in packages:
        if sys.modules.get(package) is not None or find_spec(package) is None:
            continue
        try:
            importlib.import_module(package)
        except Exception as error:  # noqa: BLE001 - whatever it is, a rank can do without the package
            broken[package] = in_a_line(error)
            sys.modules[package] = None  # type: ignore[assignment]
    return broken


BROKEN = hide_broken(PACKAGES.values())
