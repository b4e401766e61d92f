"""What ComfyUI's server tells and does for the backends of this machine: a status page, their part in /free, the setting
that makes every MODEL parallel."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from aiohttp import web
from execution import PromptQueue
from server import PromptServer

from ..parallel_backend import Backend
from ..parallel_backend.errors import BackendError, ConfigError
from ..parallel_backend.rpc.runtime_dir import running_names
from .backend_routes import BackendRoutes
from .everywhere import Everywhere
from .mesh_route import add_mesh_route
from .own_origin import Handler, own_origin
from .parallel_mesh import ParallelMesh
from .workflow_route import add_workflow_route

STATUS = "/parallel_mmdit/status"
EVERYWHERE = "/parallel_mmdit/everywhere"


def add_routes(everywhere: Everywhere) -> None:
    """Once, when ComfyUI loads the pack."""
    server = PromptServer.instance
    if server is None:  # nodes are imported without a server, by a script
        return

    backends = BackendRoutes()

    @server.routes.get(STATUS)
    @own_origin
    async def status(_: web.Request) -> web.Response:
        return web.json_response(await backends.told() | {"everywhere": told(everywhere)})

    @server.routes.get(EVERYWHERE)
    @own_origin
    async def is_everywhere(_: web.Request) -> web.Response:
        return web.json_response(told(everywhere))

    @server.routes.post(EVERYWHERE)
    @own_origin
    async def switch(request: web.Request) -> web.Response:
        try:
            on = (await request.json())["on"]
        except (ValueError, KeyError, TypeError):
            on = None
        if not isinstance(on, bool):
            return web.json_response({"error": 'The body is {"on": true} or {"on": false}.'}, status=400)
        if everywhere.switch(on, "request"):
            await forget_outputs(server.prompt_queue)
        return web.json_response(told(everywhere))

    backends.add_to(server.routes)
    add_workflow_route(server.routes)
    add_mesh_route(server.routes)
    server.app.middlewares.append(free_with_comfyui)


async def forget_outputs(queue: PromptQueue) -> None:
    """What ComfyUI keeps of earlier prompts was loaded the other way; a prompt that is queued after this loads anew."""
    queue.set_flag("free_memory", True)
    # A queue at work heeds it after its prompt. One at rest may take the next prompt first, or not have been woken at all where
    # it was about to rest: it is told until it has seen it.
    while not queue.get_tasks_remaining():
        with queue.mutex:
            if "free_memory" not in queue.get_flags(reset=False):
                return
            queue.set_flag("free_memory", True)
        await asyncio.sleep(0.01)


def told(everywhere: Everywhere) -> dict[str, Any]:
    """What it says of itself, or the error in its environment variable."""
    try:
        return everywhere.told()
    except ConfigError as error:
        return {"error": error.parts()}


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
