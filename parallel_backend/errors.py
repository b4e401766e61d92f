"""Every error that a person can meet, as one tree.

BackendError
├── ConfigError          a setting that can't be, e.g. degrees that don't fit the ranks
├── InputError           a tensor or number of a request that can't be used
├── CheckpointError      a file that can't be loaded as what was asked for
├── UnsupportedError     something real that this path doesn't do, refused by its name
├── ProtocolError        a message of another version or of a wrong form
├── MissingTensorsError  tensors named by key that the backend no longer holds
├── UnseenTensorsError   tensors in memory that a rank, on another machine perhaps, doesn't see
├── UnknownModelError    a model id that the backend doesn't hold (any more)
├── UnknownPatchesError  a file of patches on weights that a rank doesn't find
├── OutOfMemoryError     a rank has no room for a model or a job; what is resident stays
├── NotFiniteError       NaN or infinity in a result, where the user wants that to be an error
├── CancelledError       the job was cancelled by its client
├── StartError           a backend could not be started or reached
├── BackendInUseError    a backend that others work with is other than what was asked for
├── BackendLostError     the backend went away in the middle of a request
└── RankError            a rank failed while it computed; the ranks are restarted

Each carries a `code` (stable, for scripts), a `message` (one sentence, with the values) and a `remedy`.
"""

from __future__ import annotations

# Characters of another library's error, in a sentence of ours.
_LONGEST = 200


class BackendError(Exception):
    """Root of the tree; `str()` gives the message and the remedy."""

    code = "backend_error"

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()

    def parts(self) -> dict[str, str]:
        """For programs, as JSON."""
        return {"code": self.code, "message": self.message, "remedy": self.remedy}


class ConfigError(BackendError):
    code = "config"


class InputError(BackendError):
    code = "input"


class CheckpointError(BackendError):
    code = "checkpoint"


class UnsupportedError(BackendError):
    code = "unsupported"


class ProtocolError(BackendError):
    code = "protocol"


class MissingTensorsError(BackendError):
    code = "missing_tensors"


class UnseenTensorsError(BackendError):
    code = "unseen_tensors"


class UnknownModelError(BackendError):
    code = "unknown_model"


class UnknownPatchesError(BackendError):
    code = "unknown_patches"


class NotFiniteError(BackendError):
    code = "not_finite"


class CancelledError(BackendError):
    code = "cancelled"


class OutOfMemoryError(BackendError):
    code = "out_of_memory"


class StartError(BackendError):
    code = "start"


class BackendInUseError(BackendError):
    code = "backend_in_use"


class BackendLostError(BackendError):
    code = "backend_lost"


class RankError(BackendError):
    code = "rank"


_CLASSES: list[type[BackendError]] = [BackendError, *BackendError.__subclasses__()]
_BY_CODE = {cls.code: cls for cls in _CLASSES}


def error_from_code(code: str, message: str, remedy: str) -> BackendError:
    """The error that a backend reported, as the class of the same code."""
    return _BY_CODE.get(code, BackendError)(message, remedy)


def in_a_line(error: Exception) -> str:
    """An error of another library as part of a sentence: its class and its first line, cut where that is long."""
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0] if words else ''}"[:_LONGEST]
