"""What the backends of this machine say of themselves, also while they start, restart or hang."""

from __future__ import annotations

import asyncio
from typing import Any

from ..parallel_backend.client.asking import ask
from ..parallel_backend.client.differences import differences
from ..parallel_backend.client.launcher import starting
from ..parallel_backend.errors import BackendError, BackendLostError, ProtocolError
from ..parallel_backend.rpc import runtime_dir as files
from ..parallel_backend.rpc.messages import BackendState, Status
from ..parallel_backend.version import __version__
from .parallel_mesh import ParallelMesh

# One that computes answers at once; one that doesn't is told as silent.
ANSWER_SECONDS = 1.5


async def states() -> list[dict[str, Any]]:
    """One entry a backend, by name: `state` of it, all asked at the same time."""
    names = await asyncio.to_thread(known_names)
    return list(await asyncio.gather(*(asyncio.to_thread(state, name) for name in names)))


def known_names() -> list[str]:
    """Those that run, and those that are being started, for the first time or anew."""
    return sorted({*files.living_names(), *starting()})


def state(name: str) -> dict[str, Any]:
    """What a backend answers, the fields of BackendState; else `name` and an `error`. `phase` is in any case one of

    running: it answers. silent: it doesn't. starting: its ranks are on their way, and `waits_for` says what for.
    `refusal` stands with one that was refused to a node, because it is in use and otherwise than was asked.
    """
    record = files.read_record(name)
    if record is None:
        return {"name": name, "phase": "starting", "waits_for": starting().get(name, "its ranks are started anew")}
    answer = ask(record, Status(), ANSWER_SECONDS)
    if answer is None:
        silent = BackendLostError(
            f"Backend {name!r} has not answered within {ANSWER_SECONDS:g} s.",
            "Wait a little; if it stays so, press Restart. Its log may say why.",
        )
        return {"name": name, "phase": "silent", "error": silent.parts()}
    if answer.pop("type", "") != BackendState.__name__:
        what = f"Backend {name!r} runs version {record.version}, this is {__version__}."
        if record.version == __version__:
            what = f"Backend {name!r} tells nothing of itself: {answer.get('message', 'its answer is another')}"
        other = ProtocolError(what, "Press Restart, or run a prompt: an idle one is restarted by itself.")
        return {"name": name, "phase": "running", "version": record.version, "error": other.parts()}
    return {**answer, "phase": "running"} | _refusal(name, record)


def _refusal(name: str, record: files.BackendRecord) -> dict[str, Any]:
    """What a node has asked for and not got, and in what that differs from what runs."""
    spec = ParallelMesh.refused.get(name)
    if spec is None:
        return {}
    try:
        found = [{"there": other.there, "asked": other.asked} for other in differences(record, spec) if other.binding]
    except BackendError as error:
        found = [{"there": error.message, "asked": error.remedy}]
    return {"refusal": found} if found else {}
