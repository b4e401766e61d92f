"""What the editor's backend panel asks ComfyUI's server for: to start, restart, stop or free a backend, its log, the doctor's page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from ..parallel_backend import Backend
from ..parallel_backend.client.asking import own_hello
from ..parallel_backend.client.ending import end
from ..parallel_backend.client.launcher import Waiting
from ..parallel_backend.client.restart import restart
from ..parallel_backend.config import BackendSpec
from ..parallel_backend.doctor import as_text, examine
from ..parallel_backend.errors import BackendError, InputError, StartError
from ..parallel_backend.rpc import runtime_dir as files
from .backend_states import known_names, states
from .json_requests import json_of, refused
from .mesh_config import default_mesh
from .own_origin import own_origin
from .parallel_mesh import ParallelMesh

BACKEND, LOG, DOCTOR = "/parallel_mmdit/backend", "/parallel_mmdit/log", "/parallel_mmdit/doctor"
LOG_LINES = 300


@dataclass
class Request:
    """What a person has asked for of a backend, while it is being done; `at` is what that waits for."""

    do: str
    at: str = ""
    begun: float = field(default_factory=time.monotonic)

    def waiting(self, _: float, what: str) -> None:
        self.at = what

    def told(self) -> dict[str, Any]:
        return {"do": self.do, "waits_for": self.at, "seconds": time.monotonic() - self.begun}


class BackendRoutes:
    """One request at a time for each backend; they are done in threads, whoever still waits for them."""

    def __init__(self) -> None:
        self._under_way: dict[str, Request] = {}
        self._default: dict[str, Any] | None = None
        self._examining = asyncio.Lock()

    def add_to(self, routes: web.RouteTableDef) -> None:
        routes.post(BACKEND)(own_origin(self._backend))
        routes.get(LOG)(own_origin(self._log))
        # Ranks are started to prove their links: no page of another origin may cause that with a mere link.
        routes.post(DOCTOR)(own_origin(self._doctor))

    async def told(self) -> dict[str, Any]:
        """For the status route: all backends with what is being done to them, what Start would start, and this client's name there."""
        found = {entry["name"]: entry for entry in await states()}
        for name, request in self._under_way.items():
            found.setdefault(name, {"name": name, "phase": "starting", "waits_for": request.at})
            found[name]["doing"] = request.told()
        if self._default is None:  # the cards that a process sees stay the same
            self._default = await asyncio.to_thread(what_starts)
        return {
            "backends": [found[name] for name in sorted(found)],
            "default": self._default,
            "client": own_hello().client,
        }

    async def _backend(self, http: web.Request) -> web.Response:
        try:
            name, work, request = await asyncio.to_thread(self._asked, await json_of(http, '{"name": ..., "do": ...}'))
            if name in self._under_way:
                raise InputError(
                    f"Backend {name!r} is busy with: {self._under_way[name].do}.", "Wait until it is done."
                )
            self._under_way[name] = request
            # Not the request's own task: it goes on where the page is closed.
            await asyncio.shield(asyncio.create_task(self._done(name, work)))
        except BackendError as error:
            return refused(error)
        return web.json_response({"done": request.do, "name": name})

    async def _done(self, name: str, work: Callable[[], object]) -> None:
        try:
            await asyncio.to_thread(work)
        finally:
            del self._under_way[name]

    def _asked(self, body: Any) -> tuple[str, Callable[[], object], Request]:
        """The backend's name, what is to be done, and how it is told of. Raises: BackendError: it can't be."""
        do, name = (body.get(key) for key in ("do", "name")) if isinstance(body, dict) else (None, None)
        works: dict[str, Callable[[str, Waiting], object]] = {
            "start": start,
            "restart": restarted,
            "restart as asked": restarted_as_asked,
            "stop": lambda name, _: end(name),
            "free": lambda name, _: freed(name),
        }
        if do not in works or not isinstance(name, str):
            raise InputError(
                "What was sent asks for nothing.", f'Send {{"name": ..., "do": one of {", ".join(works)}}}.'
            )
        if do != "start":
            check_known(name)
        elif name != default_mesh().spec.name:
            raise InputError(
                f"Backend {name!r} can't be started from here.", "Run a prompt whose Mesh Config has that name."
            )
        request, work = Request(do), works[do]
        return name, lambda: work(name, request.waiting), request

    async def _log(self, http: web.Request) -> web.Response:
        name = http.query.get("name", "")
        try:
            return web.json_response({"name": name, "log": await asyncio.to_thread(log_of, name)})
        except BackendError as error:
            return refused(error)

    async def _doctor(self, _: web.Request) -> web.Response:
        async with self._examining:  # each starts ranks
            page = as_text(await asyncio.to_thread(examine))
        return web.json_response({"page": page})


def what_starts() -> dict[str, Any]:
    """The backend that Mesh Config's defaults start."""
    try:
        spec = default_mesh().spec
    except BackendError as error:
        return {"error": error.parts()}
    return {"name": spec.name, "ranks": spec.world_size, "device": spec.device}


def check_known(name: str) -> None:
    """Raises: ConfigError: no name of a backend. StartError: none of that name runs."""
    BackendSpec(name)
    if name not in known_names():
        raise StartError(f"No backend {name!r} runs.", "Press Start, or run a prompt: it is started then.")


def start(name: str, waiting: Waiting) -> None:
    """Not by the mesh's own `backend`, which hears the interrupts that are meant for a prompt."""
    spec = default_mesh().spec
    limits = {"idle_seconds": spec.idle_seconds, "memory_budget": spec.memory_budget}
    Backend(spec.world_size, spec.device, name, devices=spec.devices, waiting=waiting, **limits).close()


def restarted(name: str, waiting: Waiting) -> None:
    restart(name, waiting=waiting)
    ParallelMesh.refused.pop(name, None)


def restarted_as_asked(name: str, waiting: Waiting) -> None:
    """As the node wanted it that was refused last. Raises: InputError: it has got that meanwhile, or another start has come between."""
    spec = ParallelMesh.refused.get(name)
    if spec is None:
        raise InputError(f"Nothing else is asked of backend {name!r} any more.", "Press Restart to have it as it is.")
    restart(name, spec, waiting)
    ParallelMesh.refused.pop(name, None)


def freed(name: str) -> None:
    """All models leave, after the jobs that wait."""
    backend = Backend.attach(name)
    try:
        backend.unload()
    finally:
        backend.close()


def log_of(name: str) -> str:
    """The last lines that the backend of that name, or the last one, has written.

    Raises: ConfigError: no name of a backend. StartError: none has run here.
    """
    BackendSpec(name)
    if not (files.runtime_root() / name / "backend.log").is_file():
        raise StartError(f"No backend {name!r} has run here.", "There is no log of it.")
    return files.log_tail(name, LOG_LINES)
