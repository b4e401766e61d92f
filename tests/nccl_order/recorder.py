"""Writes down what this rank asks of its process groups, while gloo does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from parallel_backend.distributed.mesh import Groups

from .host_tensors import HostTensors, is_on_host
from .trace import Call, Trace, Wait

# Methods of a process group by what they do; some have another name in other versions of torch.
METHODS = {
    "send": "send",
    "recv": "receive",
    "broadcast": "broadcast",
    "allreduce": "all_reduce",
    "allgather": "all_gather of a list",
    "_allgather_base": "all_gather",
    "all_gather_single": "all_gather",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "gather": "gather",
}
REFUSED = ("alltoall", "reduce", "scatter", "reduce_scatter", "recv_anysource", "barrier", "allgather_coalesced")


class RecordedWork:
    """A work of the group, whose waits are written down."""

    def __init__(self, work: dist.Work, waited: Callable[[], None]) -> None:
        self._work, self._waited = work, waited

    def wait(self) -> bool:
        self._waited()
        return self._work.wait()


class Recorder:
    """This rank's calls since `recording` began, and the names of its groups, which it keeps."""

    def __init__(self) -> None:
        self.trace: Trace = []
        self._uses: dict[str, str] = {}
        self._batch: list[Call] | None = None

    @contextmanager
    def recording(self) -> Iterator[Trace]:
        """What goes through torch.distributed inside the block, in order."""
        self.trace = []
        with ExitStack() as stack:
            for name in (*METHODS, *REFUSED):
                if hasattr(dist.ProcessGroup, name):
                    method = self._recorded(name) if name in METHODS else _refused(name)
                    stack.enter_context(mock.patch.object(dist.ProcessGroup, name, method))
            stack.enter_context(mock.patch.object(dist, "batch_isend_irecv", self._batched(dist.batch_isend_irecv)))
            stack.enter_context(mock.patch.object(dist, "new_group", self._made(dist.new_group)))
            stack.enter_context(mock.patch.object(Groups, "of", self._named(Groups.of)))
            stack.enter_context(HostTensors())
            yield self.trace

    def _recorded(self, name: str) -> Callable[..., dist.Work | RecordedWork]:
        original = getattr(dist.ProcessGroup, name)

        def method(group: dist.ProcessGroup, *args: Any) -> dist.Work | RecordedWork:
            call = self._call(group, METHODS[name], args)
            if self._batch is not None:
                self._batch.append(call)
                return original(group, *args)
            self.trace.append(call)
            return self._work(original(group, *args), len(self.trace) - 1)

        return method

    def _work(self, work: dist.Work, number: int) -> RecordedWork:
        return RecordedWork(work, lambda: self.trace.append(Wait(number)))

    def _batched(self, original: Callable[..., list[dist.Work]]) -> Callable[..., list[RecordedWork]]:
        """With NCCL a batch is one work; here each of its messages has one, and the waits for them say the same."""

        def batch_isend_irecv(ops: list[dist.P2POp]) -> list[RecordedWork]:
            self._batch = []
            try:
                works = original(ops)
            finally:
                messages, self._batch = self._batch, None
            sends, receives = (
                tuple(m for call in messages for m in getattr(call, side)) for side in ("sends", "receives")
            )
            first = messages[0]
            self.trace.append(
                Call(first.group, first.ranks, "batch", sends=sends, receives=receives, on_host=first.on_host)
            )
            number = len(self.trace) - 1
            return [self._work(work, number) for work in works]

        return batch_isend_irecv

    def _made(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def new_group(*args: Any, **settings: Any) -> Any:
            group = original(*args, **settings)
            if settings.get("backend") == "gloo" and isinstance(group, dist.ProcessGroup):
                self._uses[group.group_name] = "gloo"
            return group

        return new_group

    def _named(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def of(groups: Groups, ranks: Sequence[int], use: str = "") -> Any:
            group = original(groups, ranks, use)
            if isinstance(group, dist.ProcessGroup):
                self._uses.setdefault(group.group_name, use)
            return group

        return of

    def _call(self, group: dist.ProcessGroup, what: str, args: tuple[Any, ...]) -> Call:
        ranks = tuple(dist.get_process_group_ranks(group))
        use = self._uses.get(group.group_name, "" if group is dist.group.WORLD else f"group {group.group_name}")
        x, details = _described(what, ranks, args)
        return Call(f"{use} {list(ranks)}".strip(), ranks, what, on_host=use == "gloo" or is_on_host(x), **details)


def _described(what: str, ranks: Sequence[int], args: tuple[Any, ...]) -> tuple[Tensor, dict[str, Any]]:
    """The tensor whose device decides, and what else there is to say of a call."""
    if what in ("send", "receive"):
        (x,), peer, _tag = args
        return x, {f"{what}s": ((ranks[peer], x.nbytes),)}
    *tensors, options = args
    own_stream = {"on_own_stream": options.asyncOp}
    if what == "all_to_all":
        received, sent, received_sizes, sent_sizes = tensors
        sides = {"sends": (sent, sent_sizes), "receives": (received, received_sizes)}
        return sent, own_stream | {
            side: tuple((rank, size * x.itemsize) for rank, size in zip(ranks, sizes, strict=True) if size)
            for side, (x, sizes) in sides.items()
        }
    x = tensors[-1]
    x = x if isinstance(x, Tensor) else x[0]
    root = ranks[options.rootRank] if what in ("broadcast", "gather") else None
    return x, own_stream | {"nbytes": x.nbytes, "root": root}


def _refused(name: str) -> Callable[..., Any]:
    def method(*_: Any) -> Any:
        raise AssertionError(f"ProcessGroup.{name} is not written down: see METHODS in {__name__}")

    return method
