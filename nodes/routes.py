"""What ComfyUI's server tells and does for this pack: backends' status and their part in /free, workflows made parallel."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Any

import msgspec
from aiohttp import web
from server import PromptServer

from ..parallel_backend import Backend
from ..parallel_backend.errors import BackendError, InputError
from ..parallel_backend.rpc.runtime_dir import running_names
from ..parallel_backend.workflow_files.make_parallel import make_parallel
from ..parallel_backend.workflow_files.reading import workflow_in
from .parallel_mesh import ParallelMesh

STATUS, WORKFLOW = "/parallel_mmdit/status", "/parallel_mmdit/workflow"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def add_routes() -> None:
    """Once, when ComfyUI loads the pack."""
    server = PromptServer.instance
    if server is None:  # nodes are imported without a server, by a script
        return

    @server.routes.get(STATUS)
    async def status(_: web.Request) -> web.Response:
        return web.json_response({"backends": await asyncio.to_thread(states)})

    @server.routes.post(WORKFLOW)
    async def workflow(request: web.Request) -> web.Response:
        try:
            return web.json_response(made_parallel(await request.json()))
        except json.JSONDecodeError as error:
            said = _said(InputError(f"What was sent is not JSON: {error}."))
        except InputError as error:
            said = _said(error)
        return web.json_response({"error": said}, status=400)

    server.app.middlewares.append(free_with_comfyui)


def states() -> list[dict[str, Any]]:
    """What each running backend says of itself, or the error that says why it doesn't."""
    return [_state(name) for name in running_names()]


def _state(name: str) -> dict[str, Any]:
    try:
        backend = Backend.attach(name)
        try:
            return msgspec.to_builtins(backend.status())
        finally:
            backend.close()
    except BackendError as error:
        return {"name": name, "error": _said(error)}


def _said(error: BackendError) -> dict[str, str]:
    return {"code": error.code, "message": error.message, "remedy": error.remedy}


def made_parallel(asked: Any) -> dict[str, Any]:
    """The workflow that was sent, made parallel, and the report of `parallel-mmdit workflow`.

    Args:
        asked: {"workflow": of the editor's or the API's form, "check": only tell, "swap": replace loaders}.
    Raises: InputError: no workflow.
    """
    if not isinstance(asked, dict) or "workflow" not in asked:
        raise InputError("What was sent has no workflow.", 'Send {"workflow": ...}.')
    workflow = workflow_in(asked["workflow"], "The workflow")
    report = make_parallel(workflow, swapped=bool(asked.get("swap")), only_check=bool(asked.get("check")))
    found = report.found
    kinds = {"changed": report.changed, "parallel": found.parallel, "local": found.local, "refused": found.refused}
    remarks = {kind: list(map(asdict, entries)) for kind, entries in (kinds | {"unknown": found.unknown}).items()}
    told = {"runs": found.runs, "concerns_us": found.concerns_us, "notes": found.notes, "lines": list(report.lines())}
    return {"workflow": workflow.content, "report": remarks | told}


@web.middleware
async def free_with_comfyui(request: web.Request, handler: Handler) -> web.StreamResponse:
    """POST /free, with unload_models or free_memory, frees the models of this ComfyUI's backends too, after the jobs that wait."""
    if request.method != "POST" or request.path not in ("/free", "/api/free"):
        return await handler(request)
    ours = own_names()  # ComfyUI may forget what holds them as soon as it has been asked
    response = await handler(request)
    asked = await request.json()  # kept by aiohttp, which has read it for ComfyUI already
    if asked.get("unload_models") or asked.get("free_memory"):
        asyncio.get_running_loop().run_in_executor(None, unload, ours)
    return response


def own_names() -> list[str]:
    """Of this machine's backends those that this ComfyUI works with; the others serve other processes."""
    return sorted({backend.spec.name for backend in ParallelMesh.attached if not backend.spec.address})


def unload(names: Sequence[str]) -> None:
    """All that these backends hold; one that has ended holds nothing."""
    for name in sorted(set(names).intersection(running_names())):
        try:
            backend = Backend.attach(name)
            backend.unload()
            backend.close()
        except BackendError as error:
            logging.warning("parallel-mmdit: backend %s was not freed: %s", name, error)
