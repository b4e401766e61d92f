"""POST /parallel_mmdit/workflow: what `parallel-mmdit workflow` does to a file, done to the editor's workflow."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from aiohttp import web

from ..parallel_backend.errors import InputError
from ..parallel_backend.workflow_files.make_parallel import make_parallel
from ..parallel_backend.workflow_files.reading import workflow_in
from .json_requests import json_of, refused
from .own_origin import own_origin

WORKFLOW = "/parallel_mmdit/workflow"


def add_workflow_route(routes: web.RouteTableDef) -> None:
    @routes.post(WORKFLOW)
    @own_origin
    async def workflow(request: web.Request) -> web.Response:
        try:
            return web.json_response(made_parallel(await json_of(request, '{"workflow": ...}')))
        except InputError as error:
            return refused(error)


def made_parallel(asked: Any) -> dict[str, Any]:
    """The workflow that was sent, made parallel, and the command's report of it.

    Args:
        asked: {"workflow": of the editor's or the API's form, "check": only tell, "swap": replace loaders}.
    Raises: InputError: no workflow.
    """
    if not isinstance(asked, dict) or "workflow" not in asked:
        raise InputError("What was sent has no workflow.", 'Send {"workflow": ...}.')
    workflow = workflow_in(asked["workflow"], "The workflow")
    report = make_parallel(workflow, swapped=bool(asked.get("swap")), only_check=bool(asked.get("check")))
    found = report.found
    kinds = {"changed": report.changed, "parallel": found.parallel, "hidden": found.hidden, "local": found.local}
    kinds |= {"refused": found.refused, "unknown": found.unknown}
    remarks = {kind: list(map(asdict, entries)) for kind, entries in kinds.items()}
    told = {"runs": found.runs, "concerns_us": found.concerns_us, "notes": found.notes, "lines": list(report.lines())}
    return {"workflow": workflow.content, "report": remarks | told}
