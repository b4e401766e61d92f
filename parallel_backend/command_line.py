"""How a person runs a command of this pack, for remedies: a line that works as written, in any folder and any shell."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

SCRIPT = "parallel-mmdit"
_PACK = Path(__file__).parents[1]
# Where backends are looked for; another shell may not have it.
_FOLDER = "PARALLEL_MMDIT_RUNTIME_DIR"


def command_line(*arguments: str) -> str:
    """The line that runs `parallel-mmdit` with these arguments: its script where that is found, else this clone with this Python."""
    folder = [f"{_FOLDER}={shlex.quote(os.environ[_FOLDER])}"] if os.environ.get(_FOLDER) else []
    if shutil.which(SCRIPT):
        return " ".join([*folder, SCRIPT, shlex.join(arguments)])
    run = shlex.join([sys.executable, "-m", "parallel_backend", *arguments])
    return f"cd {shlex.quote(str(_PACK))} && {' '.join([*folder, run])}"
