"""Who plays the ranks of a mesh: this process on a GPU, one after the other; processes of a core each, at once, on a CPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch

from ..client.environment import environment
from ..config import BackendSpec, MeshSpec
from ..distributed.shared_cores import never_preempt
from ..errors import BackendError, StartError, error_from_code
from ..models.families import open_model
from .stand_in import Played, Run, Subject, play

# The journals of all ranks of a run, in their order.
Play = Callable[[Run], list[Played]]


class Ask(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    run: Run
    rank: int


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was played, or the code, the message and the remedy of an error."""

    played: Played | None = None
    error: tuple[str, str, str, str] = ("", "", "", "")


def roles(mesh: MeshSpec) -> list[int]:
    """For each rank the first one that has as much to do: dp's and cfg's have equal rows of equal prompts."""
    places = [mesh.coordinates(rank) for rank in range(mesh.world_size)]
    alike = [tuple(place[axis] for axis in place if axis not in ("dp", "cfg")) for place in places]
    return [alike.index(role) for role in alike]


def on_device(subject: Subject) -> Play:
    """Played here, one role after the other."""

    def played(run: Run) -> list[Played]:
        known = {rank: play(subject, run, rank) for rank in sorted(set(roles(run.mesh)))}
        return [known[role] for role in roles(run.mesh)]

    return played


@contextmanager
def on_cores(path: Path, cores: int) -> Iterator[Play]:
    """Played by `cores` processes, as many ranks at once: beside each other they are as slow as real ones beside each other.

    Stages that wait for each other take turns, and so do their players.
    """
    workers = [_Worker(path, cores) for _ in range(cores)]

    def played(run: Run) -> list[Played]:
        turns = 1 if takes_turns(run) else cores
        found: list[Played] = []
        for first in range(0, run.mesh.world_size, turns):
            ranks = range(first, min(first + turns, run.mesh.world_size))
            for worker, rank in zip(workers, ranks, strict=False):
                worker.ask(Ask(run, rank))
            answers = [worker.answer() for worker, _ in zip(workers, ranks, strict=False)]
            found += [_checked(answer) for answer in answers]
        return found

    try:
        yield played
    finally:
        for worker in workers:
            worker.close()


def takes_turns(run: Run) -> bool:
    """Whether all but one of its ranks wait at any time."""
    return run.mesh.world_size == run.mesh.pp and run.warmup is None


def _checked(answer: Answer) -> Played:
    if answer.played is None:
        raise error_from_code(*answer.error)
    return answer.played


class _Worker:
    """A process that plays ranks of the model at `path`, in an environment as a rank of a backend has it."""

    def __init__(self, path: Path, cores: int) -> None:
        env = environment(BackendSpec("predict", max(2, cores), "cpu")) | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", __name__, str(path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)

    def ask(self, ask: Ask) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(ask) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `answer` says so

    def answer(self) -> Answer:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise StartError(
                f"A process that plays a rank has ended ({self._process.wait()}).", "What it wrote stands above."
            )
        return msgspec.json.decode(line, type=Answer)

    def close(self) -> None:
        assert self._process.stdin is not None
        with self._process:  # closes the pipes and waits
            self._process.stdin.close()


def serve(path: Path, asks: Iterator[bytes], answer: Callable[[bytes], object]) -> None:
    """Plays what is asked, line by line, until no more comes."""
    torch.set_num_threads(1)
    never_preempt()
    subject = Subject(open_model(path), torch.device("cpu"), torch.float32)
    for line in asks:
        ask = msgspec.json.decode(line, type=Ask)
        try:
            answer(msgspec.json.encode(Answer(play(subject, ask.run, ask.rank))))
        except BackendError as error:
            answer(msgspec.json.encode(Answer(error=(error.code, error.message, error.remedy, error.details))))


def main(argv: Sequence[str]) -> None:
    out = sys.stdout.buffer

    def answer(line: bytes) -> None:
        out.write(line + b"\n")
        out.flush()

    serve(Path(argv[0]), iter(sys.stdin.buffer), answer)


if __name__ == "__main__":
    main(sys.argv[1:])
