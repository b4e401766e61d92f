"""What replies tell of a backend: its ranks, its models, the job that runs, and what a job cost."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

Unit: TypeAlias = Literal["", "bytes"]


class RankState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`machine` tells hosts of one name apart, `uuid` GPUs of one number; a CPU has no uuid and no capability.

    `bfloat16`: False for GPUs of AMD's that lack it, whose capability doesn't tell.
    """

    rank: int
    host: str
    machine: str
    pid: int
    device: str
    device_name: str
    free_bytes: int
    total_bytes: int
    used_bytes: int
    uuid: str = ""
    capability: tuple[int, int] = (0, 0)
    bfloat16: bool = True


class ModelState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`name` is its file's. `axes` of its mesh, outermost first, those of one rank left out; `patched`: weights with a patch on."""

    model: str
    name: str
    family: str
    mesh: str
    dtype: str
    rank_bytes: int
    axes: dict[str, int] = {}
    patched: int = 0


class JobState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The job that runs, and how far it is.

    Args:
        kind: its request's. model: its file's name; empty where it has none. client: its name, empty for the backend's own.
        done, total, unit: steps, or of what Progress told last in the words `what`; a total of 0 is not known.
        seconds: since it began. step_seconds: between steps, once there were two.
    """

    kind: str
    model: str
    client: str
    what: str = ""
    done: int = 0
    total: int = 0
    unit: Unit = ""
    seconds: float = 0.0
    step_seconds: float | None = None


class JobCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a sampling, or an evaluation, cost rank 0: see Result. `waited`: seconds for other ranks; None where not timed."""

    kind: str
    model: str
    seconds: float
    steps: int
    sent_bytes: int
    waited: float | None


class AxisCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a rank sent along an axis, and how many seconds its computing stood still for it: None where that was not timed."""

    axis: str
    sent_bytes: int
    waited: float | None


class RankCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a job cost a rank.

    `kept_bytes`: the most that it kept from step to step: stale tensors of the others, keys and values. `peak_bytes`: the
    most beyond what it held before; None where it isn't known (on CPUs). `notes`: what its user should know. `reused`: the
    steps at which it took most of an evaluation from an earlier one.
    """

    costs: list[AxisCost]
    kept_bytes: int = 0
    peak_bytes: int | None = None
    notes: list[str] = []
    reused: list[int] = []


class Swap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What it took rank 0 to lay a job's patches on its weights: how many changed, bytes read of the checkpoint."""

    weights: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
