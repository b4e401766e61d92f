"""Which pack a function is of, and which version of it, for errors that name it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

_FIELD = r"""(?m)^{}\s*=\s*["']([^"']+)["']"""


def pack_and_version(function: Any) -> str:
    """As its pyproject.toml says; the folder's name where there is none."""
    file = getattr(sys.modules.get(function.__module__), "__file__", None)
    if file is None:
        return str(function.__module__)
    folder = _own_folder(Path(file).parent)
    project = folder / "pyproject.toml"
    if not project.is_file():
        return folder.name
    text = project.read_text(encoding="utf-8", errors="replace")
    found = [match[1] for field in ("name", "version") if (match := re.search(_FIELD.format(field), text))]
    return " ".join(found) or folder.name


def _own_folder(folder: Path) -> Path:
    """The pack's, of one of its folders: the outermost that is a package."""
    while (folder.parent / "__init__.py").is_file():
        folder = folder.parent
    return folder
