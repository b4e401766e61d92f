"""POST /parallel_mmdit/mesh: what Mesh Config's values come to, for the picture on the node. No backend is asked or started."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from ..parallel_backend.config import MMDIT_AXES, UNET_AXES
from ..parallel_backend.errors import BackendError, InputError
from ..parallel_backend.rpc.messages import ModelKind
from .json_requests import json_of, refused
from .mesh_config import mesh_of
from .mesh_inputs import mesh_inputs
from .own_origin import own_origin
from .parallel_mesh import ParallelMesh

MESH = "/parallel_mmdit/mesh"


def add_mesh_route(routes: web.RouteTableDef) -> None:
    @routes.post(MESH)
    @own_origin
    async def mesh(request: web.Request) -> web.Response:
        try:
            settings = checked(await json_of(request, '{"ranks": 2, ...}'))
        except InputError as error:
            return refused(error)
        try:
            return web.json_response(told(await asyncio.to_thread(mesh_of, **settings)))
        except BackendError as error:  # an answer: these values don't fit together
            return refused(error, status=200)


def checked(asked: Any) -> dict[str, Any]:
    """Raises: InputError: not Mesh Config's inputs, by name, each of its own type."""
    if not isinstance(asked, dict):
        raise InputError("What was sent is no object of Mesh Config's values.", 'Send {"ranks": 2, ...}.')
    types = {setting.id: type(setting.default) for setting in mesh_inputs()}
    for name, value in asked.items():
        if name not in types:
            raise InputError(f"Mesh Config has no input {name!r}.", f"Its inputs are: {', '.join(types)}.")
        if type(value) is not types[name]:
            raise InputError(f"{name}={value!r} is no {types[name].__name__}.", "Send the value of the node's widget.")
    return asked


def told(mesh: ParallelMesh) -> dict[str, Any]:
    """By kind of model its axes, outer to inner, and what the node says of it; a kind that can't be has an `error`."""
    kinds = {"mmdit": _told_of(mesh, "mmdit"), "unet": _told_of(mesh, "unet")}
    return {**kinds, "ranks": mesh.spec.world_size, "places": mesh.places(), "note": mesh.note}


def _told_of(mesh: ParallelMesh, kind: ModelKind) -> dict[str, Any]:
    spec, usable, what = (mesh.unet, UNET_AXES, "a UNet") if kind == "unet" else (mesh.mmdit, MMDIT_AXES, "an MMDiT")
    axes = [{"name": axis, "size": spec.degrees[axis]} for axis in spec.order if spec.degrees[axis] > 1]
    answer: dict[str, Any] = {"axes": axes, "describe": spec.describe(), "note": mesh.notes[kind]}
    try:
        spec.check_axes(usable, what)
        mesh.check_displaced(kind)
    except BackendError as error:
        answer["error"] = error.parts()
    return answer
