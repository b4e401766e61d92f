"""What is loaded in a backend, as its client sees it: loaded again by itself when the backend has lost it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Generic, TypeVar

from torch import Tensor

from ..errors import BackendLostError, ConfigError, NotFiniteError, StartError, UnknownModelError
from ..rpc.messages import LoadControl, Loaded, LoadModel, LoadVAE, Request, Result, Unload
from .connection import Connection, OnEvent
from .not_finite import NotFinite
from .sent_tensors import Attachment

log = logging.getLogger("parallel_backend")
RELOADS = 10

Load = TypeVar("Load", LoadModel, LoadVAE, LoadControl)


@dataclass
class Held(Generic[Load]):
    """Something loaded in a backend; it is loaded again by itself when the backend has lost it.

    `last` is what rank 0 says of the last job: its own seconds, and the steps. `note` is what the user should know of it:
    what ranks have to tell, how the backend has come to be another (by itself: `changed`), and NaN or infinity in its result, which
    with `nan_is_error` is an error (by itself: `not_finite`). Empty where there is nothing.
    """

    backend: Connection
    load: Load
    loaded: Loaded
    last: Result | None = field(init=False, default=None)
    note: str = field(init=False, default="")
    not_finite: str = field(init=False, default="")
    changed: str = field(init=False, default="")
    nan_is_error: bool = field(init=False, default=False)
    _generation: str = field(init=False)

    def __post_init__(self) -> None:
        self._generation = self.backend.generation

    @property
    def name(self) -> str:
        """The name under which the backend holds it."""
        return self.loaded.model

    @property
    def file(self) -> str:
        """The name of the file that it was loaded from."""
        return PurePath(self.load.paths[0] if isinstance(self.load, LoadVAE) else self.load.path).name

    def ensure_loaded(self, should_cancel: Callable[[], bool] | None = None, on_event: OnEvent | None = None) -> Loaded:
        """Resident now; reads nothing where it was."""
        self.loaded = self.backend.load(self.load, on_event, should_cancel)
        self._generation = self.backend.generation
        return self.loaded

    def leave(self, should_cancel: Callable[[], bool] | None = None) -> None:
        """The backend lets it go on all ranks, after the jobs that wait; the next request brings it back.

        Asked for by a callback of a request that is under way, it stays.
        """
        with self.backend.lock, suppress(BackendLostError, StartError):  # a backend that has ended holds nothing
            if not self.backend.asking:
                self.backend.request(Unload([self.name]), should_cancel=should_cancel)

    def is_held(self, should_cancel: Callable[[], bool] | None = None) -> bool:
        """Whether the backend holds it now; one that has ended holds nothing, and is not started.

        Asked by a callback of a request that is under way, it is taken to be.
        """
        with self.backend.lock, suppress(BackendLostError, StartError):
            if self.backend.asking:
                return True
            return self.name in [model.model for model in self.backend.status(should_cancel).models]
        return False

    def _request(
        self, body: Request, attachments: Sequence[Attachment], others: Sequence[Held[Any]] = (), **callbacks: Any
    ) -> list[Tensor]:
        """Its tensors, once what it needs is loaded, this and `others`: where another client has freed that, it is loaded again."""
        should_cancel = callbacks.get("should_cancel")
        needed = [self, *others]
        with self.backend.lock:
            self.backend.follow_restarts(should_cancel)
            for held in needed:
                if held._generation != self.backend.generation:
                    held.ensure_loaded(should_cancel)
            for tries_left in reversed(range(RELOADS)):
                try:
                    reply, tensors = self.backend.request(body, attachments, **callbacks)
                    break
                except UnknownModelError:  # another client has freed it, and may do so again before this one's turn
                    if not tries_left:
                        raise
                    for held in needed:
                        held.ensure_loaded(should_cancel)
                        _check_together(held, needed)
            assert isinstance(reply, Result)
            self.last, self.note, self.not_finite = reply, "\n".join(reply.notes), ""
            self.changed = self.backend.taken_notes()
            self.note = "\n".join(filter(None, [self.changed, self.note]))
            return tensors

    def _tell(self, found: NotFinite) -> None:
        """Raises: NotFiniteError: it is to be an error."""
        if self.nan_is_error:
            raise NotFiniteError(found.message, found.remedy)
        self.not_finite = f"{found.message} {found.remedy}"
        self.note = "\n".join(filter(None, [self.note, self.not_finite]))
        log.warning("%s", self.not_finite)


def _check_together(loaded: Held[Any], needed: Sequence[Held[Any]]) -> None:
    """Raises: ConfigError: one that a request needs had to leave for another one that it needs."""
    gone = [held.file for held in needed if held is not loaded and held.file in loaded.loaded.evicted]
    if gone:
        raise ConfigError(
            f"There is no room for {loaded.file} beside {', '.join(gone)}, and all are needed at once.",
            "Use fewer ControlNets, hold the model in fp8, use more ranks, or raise the memory budget.",
        )
