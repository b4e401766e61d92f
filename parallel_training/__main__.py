"""`torchrun -m parallel_training SPEC.json [LOADER MAP]`: what `parallel-mmdit train` starts on every rank."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec
import torch

from parallel_backend.errors import BackendError

from .config import Roles, TrainSpec
from .loop import train


def main(arguments: list[str]) -> int:
    """Exit status: 0 done, 1 a BackendError, printed with its remedy."""
    try:
        spec = msgspec.json.decode(Path(arguments[0]).read_bytes(), type=TrainSpec)
        train(spec, Roles.parse("".join(arguments[1:]), int(os.environ.get("WORLD_SIZE", "1"))))
    except BackendError as error:
        print(f"parallel-mmdit: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", str(torch.get_num_threads()))))
    sys.exit(main(sys.argv[1:]))
