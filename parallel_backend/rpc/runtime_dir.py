"""Where backends are found: a folder per name that only its user can enter.

It holds `backend.json` (written by rank 0 once all ranks are ready), the socket, a lock, logs, how far each rank is that
starts, the last words of ranks that failed, and after which restart a job last ended well.
"""

from __future__ import annotations

import os
import platform
import re
import stat
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from ..config import DEFAULT_IDLE_SECONDS, ServeSpec
from ..errors import StartError

_SHARED = Path("/tmp")
_LONGEST_SOCKET_PATH = 100  # bytes
# What a rank that starts is at, in order; before the first it imports Python's and torch's modules.
STAGES = ("meeting", "connecting", "proving links", "getting ready")
STAGE_NOTES = "rank*.stage"
# A variable of the ranks: what of the environment their backend was started with, as JSON.
STARTED_WITH = "PARALLEL_MMDIT_STARTED_WITH"


class BackendRecord(msgspec.Struct, frozen=True):
    """What a running backend says of itself. `generation` changes whenever its ranks are restarted.

    `agent_pid` is the process that starts its ranks anew. Ticks tell both processes from later ones of their numbers.
    `cards` are the GPUs of its ranks by uuid, `environment` the variables of client/gpu_environment.py at its start, `code` is
    own_code.py's of its ranks. The rest is what else it was started with, or has taken over since; `foreground`: it belongs to the
    `serve` that started it. Other versions read this too: no field goes, and a new one has a default.
    """

    version: str
    generation: str
    pid: int
    agent_pid: int
    address: str
    world_size: int
    device: str
    devices: list[int] = []
    start_ticks: int = 0
    agent_ticks: int = 0
    cards: list[str] = []
    environment: dict[str, str] = {}
    code: str = ""
    idle_seconds: float = DEFAULT_IDLE_SECONDS
    memory_budget: int = 0
    models: list[str] = []
    listen: str = ""
    keys: str = ""
    metrics_port: int = 0
    foreground: bool = False

    @property
    def serve(self) -> ServeSpec:
        """What only `serve` sets, of a backend of one host."""
        return ServeSpec(tuple(self.models), self.listen, self.keys, self.metrics_port)


def runtime_root() -> Path:
    """$PARALLEL_MMDIT_RUNTIME_DIR, else this user's folder in /tmp: one place, whoever asks.

    Raises: StartError: not on Linux, where alone ranks can run.

    XDG_RUNTIME_DIR and TMPDIR have no say. A service has neither, a shell has its own, below `su` it has another user's, and
    /run/user/UID is gone after the last log-out: a backend, which stays, would be looked for where it isn't.
    """
    if sys.platform != "linux":
        raise StartError(
            f"Ranks run on Linux; this is {platform.system() or sys.platform}.",
            "On Windows, run ComfyUI in WSL2; elsewhere, set address in Mesh Config to a backend on a Linux machine.",
        )
    if chosen := os.environ.get("PARALLEL_MMDIT_RUNTIME_DIR"):
        return Path(chosen).expanduser().absolute()
    return _SHARED / f"parallel-mmdit-{os.getuid()}"


def runtime_dir(name: str) -> Path:
    """The folder of the backend `name`, made if it is not there.

    Raises: StartError: it can't be made, belongs to somebody else, or its path is too long for a socket.
    """
    remedy = "Set PARALLEL_MMDIT_RUNTIME_DIR to a folder of yours."
    for folder in (runtime_root(), runtime_root() / name):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            info = folder.lstat()
            if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
                raise StartError(f"{folder} belongs to another user.", remedy)
            if stat.S_IMODE(info.st_mode) != 0o700:
                folder.chmod(0o700)
        except OSError as error:
            raise StartError(f"{folder} can't be used: {error.strerror}.", remedy) from None
    if len(os.fsencode(folder / "socket")) > _LONGEST_SOCKET_PATH:
        raise StartError(
            f"The path {folder}/socket is longer than a socket's may be ({_LONGEST_SOCKET_PATH} bytes).",
            "Set PARALLEL_MMDIT_RUNTIME_DIR to a shorter path, or use a shorter backend name.",
        )
    return folder


def patches_folder() -> Path:
    """Where clients leave patches on weights for the ranks of this machine: beside the backends' own folders."""
    return runtime_root() / ".patches"


def read_record(name: str) -> BackendRecord | None:
    """The record of a backend that lives; None where there is none or its rank 0 is gone."""
    record = last_record(name)
    return record if record is not None and lives(record.pid, record.start_ticks) else None


def restarting(name: str) -> BackendRecord | None:
    """The last record of a backend whose rank 0 is gone, while its torchrun lives to start it anew; else None."""
    record = last_record(name)
    if record is None or lives(record.pid, record.start_ticks):
        return None
    return record if lives(record.agent_pid, record.agent_ticks) else None


def last_record(name: str) -> BackendRecord | None:
    """What was last written there, of a backend that may be gone."""
    try:
        return msgspec.json.decode((runtime_dir(name) / "backend.json").read_bytes(), type=BackendRecord)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def lives(pid: int, ticks: int) -> bool:
    """Whether the process of that number runs that was started then; with 0 ticks, any of that number."""
    fields = _process_fields(pid)
    return _runs(fields) and ticks in (0, int(fields[19]))


def running_names() -> list[str]:
    """The backends that run here, by name; a folder of another user holds none of this one's."""
    return [name for name in _names() if read_record(name) is not None]


def living_names() -> list[str]:
    """As `running_names`, with those whose ranks are being started anew."""
    return [name for name in _names() if read_record(name) is not None or restarting(name) is not None]


def _names() -> list[str]:
    """All that have a record, of whatever is left of them."""
    found = []
    with suppress(StartError):
        for path in runtime_root().glob("*/backend.json"):
            with suppress(StartError):
                found.append(runtime_dir(path.parent.name).name)
    return sorted(found)


def keep_record(name: str, record: BackendRecord) -> None:
    """Puts the record where it isn't, because it was removed or could not be written; another backend's is left alone."""
    if read_record(name) is None:
        write_record(name, record)


def remove_record(name: str, pid: int) -> None:
    """Takes away the record of the backend whose rank 0 is process `pid`, and no other."""
    record = read_record(name)
    if record is not None and record.pid == pid:
        (runtime_dir(name) / "backend.json").unlink(missing_ok=True)


def write_record(name: str, record: BackendRecord) -> None:
    """The record in place, whole or not at all."""
    path = runtime_dir(name) / "backend.json"
    draft = path.with_suffix(".new")
    draft.write_bytes(msgspec.json.encode(record))
    draft.replace(path)


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie doesn't."""
    return _runs(_process_fields(pid))


def is_stopped(pid: int) -> bool:
    """Whether the process was stopped by a signal, and may never go on."""
    return _process_fields(pid)[:1] == ["T"]


def start_ticks(pid: int) -> int:
    """When the process was started, in clock ticks since the machine was; 0 where there is none."""
    fields = _process_fields(pid)
    return int(fields[19]) if fields else 0


def children(pid: int) -> list[int]:
    """The processes that it has started and that run."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def machine() -> str:
    """What processes share that see each other by their numbers, and no others."""
    if sys.platform != "linux":
        return f"{sys.platform}/{uuid.getnode()}"
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.readlink('/proc/self/ns/pid')}"


def _runs(fields: Sequence[str]) -> bool:
    return bool(fields) and fields[0] not in "ZX"


def _process_fields(pid: int) -> list[str]:
    """Of /proc/PID/stat, those after the name: the state, and what follows it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def note_good(name: str, restarts: int) -> None:
    """A job has ended in good order after so many restarts."""
    path = runtime_dir(name) / "last_good"
    if last_good(name) != restarts:
        path.write_text(str(restarts))


def last_good(name: str) -> int:
    """The restart after which a job last ended in good order; 0 before any."""
    try:
        return int((runtime_dir(name) / "last_good").read_text() or 0)
    except (FileNotFoundError, ValueError):
        return 0


def note_stage(name: str, rank: int, stage: str) -> None:
    """Leaves how far rank `rank` has come on its way to being ready, one of STAGES, for its starter to read."""
    (runtime_dir(name) / f"rank{rank}.stage").write_text(stage)


def stages(name: str, since: float) -> dict[str, str]:
    """How far the ranks have come that have left word after a time.time(), by the names of their notes."""
    notes = [path for path in runtime_dir(name).glob(STAGE_NOTES) if path.stat().st_mtime >= since - 1]
    found = {path.stem: path.read_text() for path in notes}
    return {rank: stage for rank, stage in found.items() if stage in STAGES}


def note_last_words(name: str, rank: int, words: str) -> None:
    """Leaves what rank `rank` failed of for the client to read."""
    (runtime_dir(name) / f"rank{rank}.error").write_text(words, encoding="utf-8", errors="replace")


def last_words(name: str, since: float) -> str | None:
    """What the rank said that failed first after a time.time(); None where none said anything."""
    notes = [p for p in runtime_dir(name).glob("rank*.error") if p.stat().st_mtime >= since - 1]
    if not notes:
        return None
    first = min(notes, key=lambda p: p.stat().st_mtime)
    return f"{first.stem.replace('rank', 'rank ')}: {first.read_text(encoding='utf-8', errors='replace').strip()}"


def fallen_ranks(name: str) -> list[str]:
    """How each rank ended that torchrun saw end, oldest first."""
    found = re.findall(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)", log_tail(name, 10_000))
    return [
        f"rank {rank} was killed by signal {-int(code)}" if int(code) < 0 else f"rank {rank} ended with code {code}"
        for code, rank in found
    ]


def log_tail(name: str, lines: int = 15) -> str:
    try:
        return "\n".join((runtime_dir(name) / "backend.log").read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return "(no log)"


def wait_until_gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
