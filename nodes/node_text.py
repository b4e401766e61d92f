"""Lines of text on the node that is executing, for the person who queued its prompt."""

from __future__ import annotations

import logging

from comfy_api.feature_flags import supports_feature
from comfy_execution.utils import get_executing_context
from server import PromptServer

# Either is told by a client that reads text: the first says so, the second is told by editors alone, those of before the first too.
TOLD_BY_READERS = ("supports_progress_text_metadata", "supports_manager_v4_ui")


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
    if context is None:
        return
    server = PromptServer.instance
    client = server.client_id  # None where nobody waits; then ComfyUI would send to everybody
    if client is not None and any(supports_feature(server.sockets_metadata, client, flag) for flag in TOLD_BY_READERS):
        server.send_progress_text(text, context.node_id, client)
