"""Starts a backend again, whatever it does: what a person asks for who presses a button."""

from __future__ import annotations

import time

from ..config import BackendSpec, DeviceType
from ..errors import ConfigError, StartError
from ..rpc import runtime_dir as files
from ..rpc.runtime_dir import BackendRecord
from .cards import seen
from .ending import end, refuse_served
from .launcher import LOCAL, Waiting, check_here, start, start_lock, unheard, wait_ready


def restart(name: str, spec: BackendSpec | None = None, waiting: Waiting = unheard) -> BackendRecord:
    """The record of the backend `name`, started anew as `spec` says, without one as it was; its jobs have failed by name.

    With a `spec` it is started too where none runs. The environment is this process's.

    Raises:
        ConfigError: it belongs to a `serve`; a GPU that it had isn't seen here.
        StartError: none runs, and no spec was given; it did not come up.
    """
    with start_lock(name, waiting):
        record = files.read_record(name) or files.restarting(name)
        if record is None and spec is None:
            raise StartError(f"No backend {name!r} runs.", "Queue a prompt: it is started then.")
        serve = LOCAL
        if record is not None:
            refuse_served(name, record, f"Backend {name!r} can't be restarted from here")
            spec, serve = spec or as_it_was(name, record), record.serve
            check_here(spec, serve)  # what runs doesn't end for what can't be started
            begun = time.monotonic()
            end(name, waiting=lambda: waiting(time.monotonic() - begun, "its jobs end"))
        assert spec is not None
        return wait_ready(spec, start(spec, serve, stays=True), waiting)


def as_it_was(name: str, record: BackendRecord) -> BackendSpec:
    """What a backend was started with, its GPUs by their numbers here.

    Raises: ConfigError: this process doesn't see one of them.
    """
    devices = tuple(record.devices)
    if record.device == "cuda" and any(record.cards):
        here = [card.uuid for card in seen().cards]
        if absent := [uuid for uuid in record.cards if uuid not in here]:
            raise ConfigError(
                f"Backend {name!r} runs on GPUs that are not seen here: {', '.join(absent)}.",
                "Restart it where it was started, or name the GPUs in Mesh Config.",
            )
        devices = tuple(here.index(uuid) for uuid in record.cards)
    device: DeviceType = "cuda" if record.device == "cuda" else "cpu"
    return BackendSpec(name, record.world_size, device, devices, record.idle_seconds, record.memory_budget)
