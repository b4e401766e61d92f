"""Who may ask for what changes something, or tells something private: ComfyUI's own pages, and programs that are no browser."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import urlsplit

from aiohttp import web

from ..parallel_backend.errors import UnsupportedError
from .json_requests import refused

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
# What a browser says of a page of the same origin, and of an address that was typed in.
_OWN_SITE = ("same-origin", "none")
_PORTS = {"http": 80, "https": 443}


def own_origin(handler: Handler) -> Handler:
    """The handler, for ComfyUI's own origin alone; others get status 403, and the reason as JSON.

    Any page that a browser shows may send requests to this machine. Browsers say whose page asks (Sec-Fetch-Site, Origin), and
    let none of another origin post JSON without leave: with core's --enable-cors-header it has that, and is refused here.
    """

    @functools.wraps(handler)
    async def guarded(request: web.Request) -> web.StreamResponse:
        error = refusal(request.method, request.headers)
        return await handler(request) if error is None else refused(error, status=403)

    return guarded


def refusal(method: str, headers: Mapping[str, str]) -> UnsupportedError | None:
    """Why a request with these headers is refused; None where it isn't."""
    site, origin, host = headers.get("Sec-Fetch-Site"), headers.get("Origin"), headers.get("Host", "")
    if site is not None and site not in _OWN_SITE:
        return UnsupportedError(
            f"A page of another origin asks (Sec-Fetch-Site: {site}).", "Open ComfyUI itself, at its own address."
        )
    if origin is not None and not is_of_host(origin, host):
        return UnsupportedError(
            f"A page of {origin} asks; ComfyUI is {host} here.",
            "Open ComfyUI at its own address; a proxy before it must pass on Host with the port (nginx: $http_host).",
        )
    if method == "POST" and headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
        return UnsupportedError("What was sent is not said to be JSON.", "Send it with Content-Type: application/json.")
    return None


def is_of_host(origin: str, host: str) -> bool:
    """Whether a page of that origin was served by that host and port."""
    try:
        page, here = urlsplit(origin), urlsplit(f"//{host}")
        own_port = _PORTS.get(page.scheme)
        return (page.hostname, page.port or own_port) == (here.hostname, here.port or own_port) and bool(page.hostname)
    except ValueError:  # a port that is no number
        return False
