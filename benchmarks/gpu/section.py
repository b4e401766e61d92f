"""One section in this process: python -m benchmarks.gpu.section MODULE --device cuda --scratch FOLDER [--tiny]."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from pathlib import Path

from .options import ROOT, Options
from .report import Report


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("--device", required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinds, as an interrupt does
    # The runner reads what comes through here; whatever else is printed, by libraries too, goes to the log.
    report = Report(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)
    sys.path.insert(0, str(ROOT / "tests"))  # the tests' oracles and ranks serve here too
    section = importlib.import_module(args.module)
    section.run(report, Options(args.device, args.tiny, args.scratch))
    report.done()
    sys.stderr.flush()
    os._exit(0)  # libraries of GPUs can hang at an exit; what is left is the runner's to end


if __name__ == "__main__":
    main()
