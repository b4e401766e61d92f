"""What CUDA graphs do, on the CPU: operations are recorded without being done, and done again without Python.

As with CUDA, a recording knows tensors by where they lie: what was a number when it was made is that number for ever, what is
changed in place is seen changed. All lie in one room: what one has left there is gone when another one is done again. Nothing
that was started before a recording can be waited for in it, and what is started in it must be waited for in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch
from weakref import WeakSet

from torch import Tensor
from torch._C._distributed_c10d import PythonCallbackWork, Work
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel_backend.distributed.collectives import Handle

# The host would wait for what they find.
_READ = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "item", "is_nonzero", "unique"}


class NotRecordableError(RuntimeError):
    """What CUDA forbids while it captures."""


class Recording(TorchDispatchMode):
    """Operations with their arguments and results, in order."""

    def __init__(self, most_messages: int | None = None) -> None:
        """More than `most_messages` fail."""
        super().__init__()
        self._most, self._active = most_messages, False
        self._calls: list[Callable[[], object]] = []
        self._works: dict[int, Any] = {}
        self._unjoined: set[int] = set()
        self._waits = self._started = 0
        self.made: list[Tensor] = []
        self.operations = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._opname in _READ:
            raise NotRecordableError(f"the host waits for {func.name()}")
        if func.namespace == "c10d":
            return self._message(func, args, kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func._schema.is_mutable:
            self._calls.append(lambda: func(*args, **kwargs))
            self.operations += 1
            return _changed(func, args, kwargs)
        result = func(*args, **kwargs)
        old = {x.untyped_storage()._cdata for x in given}
        fresh = [isinstance(x, Tensor) and x.untyped_storage()._cdata not in old for x in tree_leaves(result)]
        if any(fresh):
            kept = [x for x, is_new in zip(tree_leaves(result), fresh, strict=True) if is_new]
            self.made += kept
            self.operations += 1

            def again() -> None:
                found = [x for x, is_new in zip(tree_leaves(func(*args, **kwargs)), fresh, strict=True) if is_new]
                for own, x in zip(kept, found, strict=True):
                    own.copy_(x)

            if not func._opname.startswith(("empty", "new_empty")):
                self._calls.append(again)
        return result

    def _message(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        if self._started == self._most:
            raise NotRecordableError("planted")
        number, self._started = self._started, self._started + 1
        self._unjoined.add(number)
        self.operations += 1

        def send() -> None:
            results = func(*args, **kwargs)
            self._works[number] = (results if isinstance(results, tuple | list) else (results,))[-1]

        def wait(_: Any) -> bool:
            if not self._active:
                raise NotRecordableError("what was started in a recording is waited for after it")
            self._waits += 1
            if number in self._unjoined:
                self._unjoined.discard(number)
                self._calls.append(lambda: Work.unbox(self._works.pop(number)).wait())
            return True

        self._calls.append(send)
        work = Work.boxed(PythonCallbackWork(wait))
        returns = [work if "Work" in str(value.type) else args[0] for value in func._schema.returns]
        return tuple(returns) if len(returns) > 1 else returns[0]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, waiting for what others have started is an error; so is what is under way at the end."""
        arrive = Handle._arrive

        def checked(handle: Handle) -> None:
            before, count = self._waits, len(handle.works)
            arrive(handle)
            if self._waits != before + count:
                raise NotRecordableError("it waits for what was started before it")

        self._active = True
        try:
            with patch.object(Handle, "_arrive", checked), self:
                yield
        finally:
            self._active = False
        if self._unjoined:
            raise NotRecordableError(f"{len(self._unjoined)} messages are under way at its end")

    def again(self) -> None:
        for call in self._calls:
            call()


def _changed(func: OpOverload, args: Any, kwargs: Any) -> Any:
    """The arguments that the operation writes, as it returns them."""
    named = [argument.name for argument in func._schema.arguments]
    written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    found = [kwargs[name] if name in kwargs else args[named.index(name)] for name in written]
    count = len(func._schema.returns)
    return None if count == 0 else found[0] if count == 1 else tuple(found[:count])


class Recorder:
    """Stands for `CUDAGraphs`. `fails` makes recordings fail: in the middle of their messages, or at their end."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.recordings: WeakSet[Recording] = WeakSet()
        self.evaluated = self.recorded_ones = self.done_again = 0

    def beside(self, function: Callable[[], Tensor]) -> Tensor:
        self.evaluated += 1
        return function()

    def recorded(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.recorded_ones += 1
        recording = Recording(3 if self.fails else None)
        with recording.watched():
            result = function()
            if self.fails:
                raise NotRecordableError("planted")
        self.recordings.add(recording)

        def again() -> None:
            self.done_again += 1
            for other in self.recordings:
                for x in other.made:
                    x.fill_(float("nan") if x.is_floating_point() else 77)
            recording.again()

        return again, result

    def let_go(self) -> None:
        """Nothing is kept."""
