"""A line of text on the node that is executing."""

from __future__ import annotations

from comfy_execution.utils import get_executing_context
from server import PromptServer


def say(text: str) -> None:
    """Shows `text` on the executing node; does nothing outside a prompt."""
    context = get_executing_context()
    if context is not None and PromptServer.instance is not None:
        PromptServer.instance.send_progress_text(text, context.node_id)
