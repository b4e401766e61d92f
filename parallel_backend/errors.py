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

Each carries a `code` (stable, for scripts), a `message` (one sentence, with the values), a `remedy`, and perhaps `details`: the
end of a log, what another library said, long lists. They come last, so that nobody has to read past them to what helps.
"""

from __future__ import annotations

# ComfyUI names an error by its module, which is the whole path of the pack's folder there. In Python, it is where it is imported from.
_MODULE = __name__ if __name__ == "parallel_backend.errors" else "parallel_mmdit"
# Characters of another library's error, in a sentence of ours.
_LONGEST = 200


class BackendError(Exception):
    """Root of the tree; `str()` gives the message and the remedy, then the details in a paragraph of their own."""

    __module__ = _MODULE
    code = "backend_error"

    def __init__(self, message: str, remedy: str = "", details: str = "") -> None:
        super().__init__(message, remedy, details)
        self.message = message
        self.remedy = remedy
        self.details = details

    def __init_subclass__(cls) -> None:
        if __name__ != _MODULE:
            cls.__module__ = _MODULE

    def __str__(self) -> str:
        return "\n\n".join(filter(None, (self.brief, self.details)))

    @property
    def brief(self) -> str:
        """Without the details: where a line or two have room."""
        return f"{self.message} {self.remedy}".strip()

    def parts(self) -> dict[str, str]:
        """For programs, as JSON."""
        return {"code": self.code, "message": self.message, "remedy": self.remedy, "details": self.details}


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


def error_from_code(code: str, message: str, remedy: str, details: str = "") -> BackendError:
    """The error that a backend reported, as the class of the same code."""
    return _BY_CODE.get(code, BackendError)(message, remedy, details)


def in_a_line(error: Exception) -> str:
    """An error of another library as part of a sentence: its class and its first line, cut where that is long."""
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0] if words else ''}"[:_LONGEST]


def beyond_a_line(error: Exception) -> str:
    """All that it says, for an error's details, where `in_a_line` leaves some of it out; else nothing."""
    words = f"{type(error).__name__}: {str(error).strip()}"
    return "" if words == in_a_line(error) else words
