"""Ends backends: one that nobody works with, to make way for another, or whatever it does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ..command_line import command_line
from ..errors import BackendInUseError, ConfigError, StartError
from ..rpc import runtime_dir as files
from ..rpc.messages import Done, Stop, StopUnused
from ..rpc.runtime_dir import BackendRecord
from .asking import ask, own_hello
from .differences import Difference

ANSWER_SECONDS = 3.0
# Who has only looked at it, or has just had it started, is gone or there by then.
USED_SECONDS = 2.5
END_SECONDS = 20.0
KILL_SECONDS = 10.0


def restart_remedy(name: str) -> str:
    """What to do about a backend that is in use, or doesn't answer."""
    stop = command_line("stop", "--name", name)
    return f"Press Restart in the Parallel MMDiT panel of the sidebar, or run `{stop}`; then queue again."


def make_way(
    name: str, record: BackendRecord, others: Sequence[Difference], waiting: Callable[[float, str], object]
) -> bool:
    """Ends the backend, which differs in `others`, where nothing runs or waits and no other process is connected.

    Args:
        waiting: called now and then with the seconds passed and what is waited for; what it raises ends the wait.
    Returns: whether it is gone; False where it is in use and `others` leave it of use as it is.
    Raises: BackendInUseError; ConfigError: it is not ours to end; StartError: as `kill`.
    """
    binding = [other for other in others if other.binding]
    what = f"Backend {name!r} has {'; '.join(map(str, binding or others))}"
    if binding:
        refuse_served(name, record, what)
    elif _is_served(record):
        return False
    user = _stop_unused(record, waiting, USED_SECONDS if binding else 0.0)
    if not user:
        begun = time.monotonic()
        _wait_or_kill(name, record, END_SECONDS, lambda: waiting(time.monotonic() - begun, "the one that ran ends"))
        return True
    if not binding:
        return False
    raise BackendInUseError(f"{what}, and {user}.", f"{restart_remedy(name)} Or name another backend in Mesh Config.")


def refuse_served(name: str, record: BackendRecord, what: str) -> None:
    """Raises: ConfigError: it belongs to a `serve`, which alone can start it as it was; `what` says why that matters."""
    if _is_served(record):
        how = "in a terminal or as a service" if record.foreground else f"to listen at {record.listen}"
        raise ConfigError(
            f"{what}; it was started by `parallel-mmdit serve` {how} (process {record.agent_pid}).",
            f"End it there or with `{command_line('stop', '--name', name)}` and start it as you want it, or name another backend.",
        )


def _is_served(record: BackendRecord) -> bool:
    return record.foreground or bool(record.listen)


def _stop_unused(record: BackendRecord, waiting: Callable[[float, str], object], seconds: float) -> str:
    """Empty once it has heard that it is to end, or has ended; else who works with it, still after so many seconds."""
    hello, begun = own_hello(), time.monotonic()
    while True:
        answer = ask(record, StopUnused(hello.client, hello.machine), ANSWER_SECONDS)
        if not files.lives(record.pid, record.start_ticks) or (answer or {}).get("type") == Done.__name__:
            return ""
        if answer is None or time.monotonic() - begun >= seconds:
            return _user(answer, hello.client)
        waiting(time.monotonic() - begun, "whether the one that runs is in use")
        time.sleep(0.25)


def _user(answer: dict[str, Any] | None, own: str) -> str:
    """Who works with a backend that has answered so."""
    if answer is None:
        return "doesn't answer"
    if "clients" not in answer:
        return f"can't be asked whether it is in use: {answer.get('message', 'it answers otherwise')}".rstrip(".")
    running, queued = answer.get("running"), answer.get("queued")
    others = [client for client in answer["clients"] if client != own]
    said = [
        f"a job runs there ({running})" if running else "",
        f"{queued} wait" if queued else "",
        f"others are connected ({', '.join(others)})" if others else "",
    ]
    return f"is in use: {'; '.join(filter(None, said)) or 'it was started a moment ago'}"


def end(name: str, seconds: float = END_SECONDS, waiting: Callable[[], object] = lambda: None) -> bool:
    """The backend is gone, whatever it did; its clients are told, where it still hears.

    Args:
        waiting: called now and then; what it raises ends the wait.
    Returns: whether there was one. Raises: as `kill`.
    """
    record = files.read_record(name)
    if record is not None:
        ask(record, Stop(), min(seconds, ANSWER_SECONDS))
    elif (record := files.restarting(name)) is not None:
        with suppress(ProcessLookupError):
            os.kill(record.agent_pid, signal.SIGTERM)
    else:
        return False
    _wait_or_kill(name, record, seconds, waiting)
    return True


def _wait_or_kill(name: str, record: BackendRecord, seconds: float, waiting: Callable[[], object]) -> None:
    deadline = time.monotonic() + seconds
    while files.lives(record.agent_pid, record.agent_ticks) and time.monotonic() < deadline:
        waiting()
        time.sleep(0.05)
    if files.lives(record.agent_pid, record.agent_ticks):
        kill(name, record.agent_pid)
    (files.runtime_dir(name) / "backend.json").unlink(missing_ok=True)


def kill(name: str, agent_pid: int) -> None:
    """torchrun and its ranks are gone, whatever they were waiting for.

    Raises: StartError: the kernel can't end them, as where a driver is stuck.
    """
    pids = [agent_pid, *files.children(agent_pid)]
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if left := [pid for pid in pids if not files.wait_until_gone(pid, KILL_SECONDS)]:
        raise StartError(
            f"Backend {name!r} was killed, and process {', '.join(map(str, left))} is still there.",
            "It hangs in the kernel, most likely in the GPU's driver: see dmesg; only a restart of the machine ends that.",
        )
