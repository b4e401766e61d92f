"""What a job needs of the server while it runs, and nothing more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..distributed.control import Control
from ..errors import CancelledError
from ..rpc.messages import Reply


@dataclass(frozen=True)
class Job:
    """One request under way on this rank.

    Args:
        emit: sends a reply that is not the last; does nothing but on rank 0.
        cancelled: whether the client gave the job up; only rank 0 hears of it.
    """

    control: Control
    emit: Callable[[Reply, Sequence[Tensor]], None]
    cancelled: Callable[[], bool]

    def check_cancelled(self) -> None:
        """Raises CancelledError on all ranks alike. Comm: one byte from rank 0."""
        if self.control.any(self.cancelled()):
            raise cancelled_by_client()

    def given_up(self) -> bool:
        """Whether the job was cancelled, on any rank, which need not be where the others are.

        Comm: a look into the ranks' common store.
        """
        return self.control.heard(self.cancelled())


def cancelled_by_client() -> CancelledError:
    return CancelledError("The job was cancelled by its client.")
