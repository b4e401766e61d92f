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
    folder = Path(file).parent
    for above in (folder, *list(folder.parents)[:2]):
        project = above / "pyproject.toml"
        if project.is_file():
            text = project.read_text(encoding="utf-8", errors="replace")
            found = [match[1] for field in ("name", "version") if (match := re.search(_FIELD.format(field), text))]
            return " ".join(found) or above.name
    return folder.name
