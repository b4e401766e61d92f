"""The backends of this machine: those that run, start their ranks anew, or are gone."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ..client.backend import Backend
from ..client.cards import seen
from ..client.gpu_environment import difference
from ..command_line import command_line
from ..errors import BackendError
from ..rpc import runtime_dir as files
from ..version import __version__
from .finding import Finding, wrong


def backends() -> Iterator[Finding]:
    running = files.running_names()
    for name in running:
        yield from _running(name)
    try:
        left = sorted(files.runtime_root().glob("*/backend.json"))
    except BackendError:
        return  # `folders` has said so
    for path in left:
        try:
            restarting = files.restarting(path.parent.name)
        except BackendError as error:
            yield wrong(error, f"{path} can't be looked at: ")
            continue
        if restarting:
            yield Finding("note", f"backend {path.parent.name!r} is starting its ranks anew", "Its log says why.")
        elif path.parent.name not in running:
            yield Finding("note", f"{path} is of a backend that is gone", "Nothing: the next start takes its place.")


def _running(name: str) -> Iterator[Finding]:
    record = files.read_record(name)
    if record is not None and record.version != __version__:
        what = f"backend {name!r} runs version {record.version}, this is {__version__}"
        stop = command_line("stop", "--name", name)
        yield Finding("note", what, f"The next prompt restarts it, if nobody works with it; or run `{stop}`.")
        return
    try:
        backend = Backend.attach(name)
        state = backend.status()
        backend.close()
    except BackendError as error:
        yield wrong(error, f"backend {name!r} doesn't answer: ")
        return
    if record is not None and (other := difference(name, record, os.environ, [card.uuid for card in seen().cards])):
        yield Finding("note", *other)
    line = f"backend {name!r}: {len(state.ranks)} ranks, {state.jobs_done} jobs, {state.restarts} restarts"
    yield Finding("note" if state.restarts else "ok", line, "Its log says why." if state.restarts else "")
