"""A run on disk, from which it goes on: weights, their average, the optimiser, the step, the losses."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from parallel_backend.errors import CheckpointError, ConfigError

from .config import Roles, TrainSpec

NAME = "snapshot.pt"


@dataclass
class Snapshot:
    """What `save` writes. All random draws come from the seed and the step, so the step is the random state."""

    step: int
    model: dict[str, Any]
    ema: dict[str, Any]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    losses: list[float]


def save(snapshot: Snapshot, spec: TrainSpec, roles: Roles) -> None:
    """In one piece: a run that ends in the middle leaves the one before."""
    path = Path(spec.output) / NAME
    settings = {"spec": msgspec.json.encode(spec).decode(), "roles": msgspec.json.encode(roles).decode()}
    torch.save({**vars(snapshot), **settings}, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def load(spec: TrainSpec, roles: Roles) -> Snapshot | None:
    """The last snapshot of the run's folder; None where there is none.

    Raises: CheckpointError: it can't be read. ConfigError: it is of another run or of other ranks.
    """
    path = Path(spec.output) / NAME
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        then = msgspec.json.decode(saved.pop("roles"), type=Roles)
        settings = msgspec.json.decode(saved.pop("spec"), type=TrainSpec)
        snapshot = Snapshot(**saved)
    except (
        RuntimeError,
        OSError,
        EOFError,
        KeyError,
        TypeError,
        pickle.UnpicklingError,
        msgspec.MsgspecError,
    ) as error:
        raise CheckpointError(f"{path} can't be read: {error}.", "Delete it to start anew.") from None
    spec.check_resume(settings)
    if roles != then:
        raise ConfigError(
            f"The run to resume had {then.world_size} ranks and loader map {then.feeds}; this one has "
            f"{roles.world_size} and {roles.feeds}.",
            "Use the same ranks and map, or another folder.",
        )
    return snapshot
