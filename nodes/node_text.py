"""Lines of text on the node that is executing, for the person who queued its prompt."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ClassVar

from comfy.model_management import InterruptProcessingException
from comfy_api.feature_flags import supports_feature
from comfy_api.latest import io
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ..parallel_backend.errors import BackendError, in_a_line

# Either is told by a client that reads text: the first says so, the second is told by editors alone, those of before the first too.
TOLD_BY_READERS = ("supports_progress_text_metadata", "supports_manager_v4_ui")
RUNNING, DONE, INTERRUPTED, FAILED = "running", "done", "Interrupted", "Failed: "


def say(text: str, *, log: bool = False) -> None:
    """Shows `text` on the executing node in the client that queued the prompt, if it reads text; on none outside a prompt.

    Never as an output of the node, which would be one of the prompt's results, nor to other clients: in their graphs, the id is
    another node's, and those that know no text take its bytes for a picture.

    Args:
        log: also as a line of ComfyUI's log, for those who have no editor; not for what changes many times a second.
    """
    context = get_executing_context()
    if log:
        logging.info("parallel-mmdit%s: %s", f", node {context.node_id}" if context else "", text)
    if context is None or not text:
        return
    server = PromptServer.instance
    client = server.client_id  # None where nobody waits; then ComfyUI would send to everybody
    if client is not None and any(supports_feature(server.sockets_metadata, client, flag) for flag in TOLD_BY_READERS):
        if (run := _Run.now.get()) is not None:
            run.has_said = True
        note = _Run.failed.add if text == INTERRUPTED or text.startswith(FAILED) else _Run.failed.discard
        note((client, context.node_id))
        server.send_progress_text(text, context.node_id, client)


class _Run:
    """Of a node, from its begin to its end.

    An editor keeps a node's text until another comes, and takes no empty one: `failed` are the clients and their nodes that show
    a failure.
    """

    now: ClassVar[ContextVar[_Run | None]] = ContextVar("parallel_mmdit_run", default=None)
    failed: ClassVar[set[tuple[str, str]]] = set()

    def __init__(self, node_id: str) -> None:
        self.node_id, self.has_said = node_id, True

    def begin(self) -> None:
        server = PromptServer.instance
        _Run.failed.intersection_update([shown for shown in _Run.failed if shown[0] in server.sockets])
        if (server.client_id, self.node_id) in _Run.failed:
            say(RUNNING)
            self.has_said = False

    def end(self) -> None:
        if not self.has_said:
            say(DONE)


@contextmanager
def own_text() -> Iterator[None]:
    """The executing node shows what this run of it comes to: where it fails, of what, and no failure of an earlier one.

    For all that a node does, ours or a stock one that meets a parallel MODEL; what is inside of another one changes nothing.
    """
    context = get_executing_context()
    if context is None or _Run.now.get() is not None:
        yield
        return
    run = _Run(context.node_id)
    token = _Run.now.set(run)
    try:
        run.begin()
        yield
        run.end()
    except InterruptProcessingException:
        say(INTERRUPTED)
        raise
    except BackendError as error:
        say(FAILED + error.brief)
        raise
    except Exception as error:
        say(FAILED + in_a_line(error))
        raise
    finally:
        _Run.now.reset(token)


def with_own_text(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The same node; while it executes, `own_text` holds."""
    node.execute = classmethod(own_text()(node.execute.__func__))  # type: ignore[method-assign, attr-defined, assignment]
    return node
