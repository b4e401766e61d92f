"""What the pack's routes read and refuse alike."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

from ..parallel_backend.errors import BackendError, InputError


async def json_of(request: web.Request, example: str) -> Any:
    """The request's body. Raises: InputError: it is not JSON; `example` is of what is."""
    try:
        return await request.json()
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"What was sent is not JSON: {error}.", f"Send {example}.") from None


def refused(error: BackendError, status: int = 400) -> web.Response:
    return web.json_response({"error": error.parts()}, status=status)
