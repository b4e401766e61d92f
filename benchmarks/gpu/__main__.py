"""The first ten minutes on one GPU: tables that grow as they are measured, each section with a time limit of its own.

python -m benchmarks.gpu
python -m benchmarks.gpu --only "ranks on one card" faults --patience 2
python -m benchmarks.gpu --tiny --device cpu        tries all of it where there is no GPU
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

from .options import Options
from .report import summary
from .runner import Section, run_all, write_results

ROOMY_BYTES = 40e9
_HERE = "benchmarks.gpu.sections."
# Estimates are of an H100 whose disk is warm, ten seconds of imports in each. The limits' sum is below nine and a half minutes.
# Faults come last, and take the time that is left: each waits for what a user would wait for.
SECTIONS = (
    Section("machine", _HERE + "machine", 15, 30),
    Section("SD3.5-Large", _HERE + "sd35", 85, 110),
    Section("SDXL", _HERE + "sdxl", 25, 40),
    Section("CUDA graphs", _HERE + "graphs", 25, 40),
    Section("ranks on one card", _HERE + "ranks", 70, 90),
    Section("memory", _HERE + "memory", 32, 40),
    Section("loading", _HERE + "loading", 40, 50),
    Section("allocators", _HERE + "allocators", 40, 50),
    Section("beside others", _HERE + "beside", 50, 60),
    Section("faults", _HERE + "faults", 150, 45),
)
# Where the ten minutes have no room left for them: run when they are named.
BY_NAME = (
    Section("quantised weights", _HERE + "quantised", 40, 90),
    Section("ControlNet", _HERE + "controlnet", 30, 60),
    Section("inside", _HERE + "extras", 60, 120),
    Section("previews", _HERE + "host", 25, 60),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for trying it out")
    usual, names = ([section.name for section in some] for some in (SECTIONS, SECTIONS + BY_NAME))
    parser.add_argument("--only", nargs="+", choices=names, default=usual, metavar="SECTION", help=f"of: {names}")
    parser.add_argument("--patience", type=float, default=1.0, help="times all limits; 1 ends within ten minutes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pmg-", dir=_roomy(), ignore_cleanup_errors=True) as scratch:
        out = Path(os.environ.get("OUT") or scratch)
        out.mkdir(parents=True, exist_ok=True)
        progress = (out / "progress.txt").open("w")

        def show(line: str) -> None:
            for stream in (None, progress):
                print(line, file=stream, flush=True)

        begun = time.monotonic()
        chosen = [section for section in SECTIONS + BY_NAME if section.name in args.only]
        told = run_all(chosen, Options(args.device, args.tiny, Path(scratch)), show, out / "log.txt", args.patience)
        whole = summary(told)
        (out / "summary.md").write_text(whole)
        write_results(told, out / "results.json")
        print(f"\n\n# Summary ({time.monotonic() - begun:.0f} s)\n\n{whole}", flush=True)
        progress.close()


def _roomy() -> str | None:
    """A folder in memory where a large checkpoint has room in it, else the usual one for what is temporary."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > ROOMY_BYTES else None


if __name__ == "__main__":
    main()
