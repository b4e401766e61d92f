"""A file gets two lines of a progress, however many ticks it has; a terminal gets a bar."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

ROOT = Path(__file__).parents[1]
SAID = """
from parallel_backend.demo.progress import each, progress
print("before")
with progress("waiting") as bar:
    for _ in range(50):
        bar.refresh()
for _ in each(range(40), "drawing"):
    pass
with progress("quiet", 3, shown=False) as bar:
    bar.update()
print("after")
"""


def test_a_file_gets_a_first_and_a_last_line_in_their_place() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SAID], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    )
    lines = [re.sub(r"\d+\.\d s", "N s", line) for line in done.stdout.split("\n")]
    assert lines == ["before", "waiting ...", "waiting: N s", "drawing ...", "drawing: N s", "after", ""]


def test_a_terminal_gets_a_bar() -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        child = subprocess.Popen([sys.executable, "-c", SAID], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs)
        os.close(theirs)
        said = b""
        try:
            while block := terminal.read(4096):
                said += block
        except OSError:
            pass  # Linux's word for a terminal whose last writer has gone
        assert child.wait(timeout=60) == 0
    assert b"drawing: 100%" in said and b"40/40" in said and b"quiet" not in said and b"drawing ..." not in said
