"""One page about this installation: what is wrong with it, and what to do, in order."""

from .links import print_links
from .page import as_text, examine

__all__ = ["as_text", "examine", "print_links"]
