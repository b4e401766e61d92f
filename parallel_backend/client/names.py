"""Which backend a name means: "default" is one for each set of GPUs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from ..errors import StartError
from ..rpc.runtime_dir import living_names
from .cards import Seen, seen

DEFAULT = "default"


def backend_name(name: str, device: str, seen: Seen) -> str:
    """`name`; in place of "default" one of its own where other GPUs than these may be hidden from this process.

    The same cards give the same name, in whatever order they are seen: several ComfyUIs with a GPU each share no backend.
    """
    if name != DEFAULT or device != "cuda" or not seen.narrowed:
        return name
    known = sorted(card.uuid for card in seen.cards)
    marks = " ".join(known if all(known) else [seen.visible or ""])
    return f"{DEFAULT}-{hashlib.sha256(marks.encode()).hexdigest()[:8]}"


def meant(name: str | None, looked: Callable[[], Seen] = seen) -> str:
    """Which of the backends that live is meant where none was named: that of this process's GPUs, or the only default one.

    Raises: StartError: there are several, and none is of this process's GPUs.
    """
    if name is not None:
        return name
    living = [one for one in living_names() if one == DEFAULT or one.startswith(f"{DEFAULT}-")]
    if len(living) < 2:
        return living[0] if living else DEFAULT
    own = backend_name(DEFAULT, "cuda", looked())
    if own not in living:
        raise StartError(f"Several backends run: {', '.join(living)}.", "Name one of them (--name).")
    return own
