"""`parallel-mmdit train`: settings to a torchrun of the training loop."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import msgspec

from parallel_backend.client.environment import KEEP_FREED_MEMORY, PACKAGE_ROOT

from .config import TASKS, Roles, TrainSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each setting of a run, and how many ranks it has."""
    parser.add_argument("task", choices=TASKS)
    defaults = {field.name: field for field in msgspec.structs.fields(TrainSpec)}
    for name, field in defaults.items():
        if name == "task":
            continue
        option = f"--{name.replace('_', '-')}"
        if field.required:
            parser.add_argument(option, required=True, type=int if name == "steps" else str)
        else:
            parser.add_argument(option, default=field.default, type=type(field.default), help=f"{field.default!r}")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--loaders", default="", help="which ranks render and feed which others, like '{0: [1, 2, 3]}'")


def run(args: argparse.Namespace) -> int:
    """The exit status of torchrun."""
    names = [field.name for field in msgspec.structs.fields(TrainSpec)]
    spec = TrainSpec(**{name: getattr(args, name) for name in names})
    Roles.parse(args.loaders, args.ranks)
    folder = Path(spec.output)
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "run.json"
    settings.write_bytes(msgspec.json.format(msgspec.json.encode(spec)) + b"\n")
    cores = len(os.sched_getaffinity(0))
    env = KEEP_FREED_MEMORY | {"OMP_NUM_THREADS": str(max(1, cores // args.ranks))} | os.environ
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")]))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
    command = [*launch, "-m", "parallel_training", str(settings), *([args.loaders] if args.loaders else [])]
    return subprocess.run(command, env=env, check=False).returncode
