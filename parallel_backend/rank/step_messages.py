"""What is told of a job's steps: on a GPU a step later, so that the host waits for no step that it has only just launched.

The latents of a preview are copied to pinned memory on a stream of their own, beside the next step's kernels. When those are
queued, the copy has long arrived, or the GPU has enough to do: the host then waits for the step before, which also keeps progress
and a cancel no further than a step from what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..rpc.host_copies import pinned_like
from ..rpc.messages import StepDone

Emit = Callable[[StepDone, Sequence[Tensor]], None]


class Copied(Protocol):
    """Copies under way, and all that was queued on the device before them."""

    def synchronize(self) -> None:
        """Returns when they have arrived."""
        ...


class Copier(Protocol):
    """Copies a device's tensors to the host while the device computes on."""

    def buffer(self, like: Tensor) -> Tensor:
        """Memory of the host that takes one."""
        ...

    def start(self, tensors: Sequence[Tensor], buffers: Sequence[Tensor]) -> Copied:
        """Begins to copy each tensor, as what is queued by now leaves it, into its buffer; of none there is the waiting alone."""
        ...


class SideStream:
    """A stream of a GPU for copies alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def buffer(self, like: Tensor) -> Tensor:
        return pinned_like(like)

    def start(self, tensors: Sequence[Tensor], buffers: Sequence[Tensor]) -> Copied:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for tensor, buffer in zip(tensors, buffers, strict=True):
                buffer.copy_(tensor, non_blocking=True)
            # A host that is woken leaves its core to others meanwhile; one that spins takes it from the noise's thread.
            copied = torch.cuda.Event(blocking=True)
            copied.record()
        return copied


@dataclass(frozen=True)
class _Behind:
    """A step whose message waits. The device's tensors stay until they are copied: their memory would be given away."""

    done: StepDone
    tensors: Sequence[Tensor]
    buffers: list[Tensor]
    copied: Copied


class StepMessages:
    """Every step's message once, in order.

    Args:
        copier: None sends each at once, as it is.
    """

    def __init__(self, emit: Emit, copier: Copier | None) -> None:
        self._emit, self._copier = emit, copier
        self._behind: _Behind | None = None
        self._free: list[list[Tensor]] = []

    def tell(self, done: StepDone, tensors: Sequence[Tensor]) -> None:
        """A step was launched; the one before it is told."""
        if self._copier is None:
            self._emit(done, tensors)
            return
        buffers = self._buffers(self._copier, tensors)
        launched = _Behind(done, tensors, buffers, self._copier.start(tensors, buffers))
        self.finish()
        self._behind = launched

    def finish(self) -> None:
        """All that were launched are told."""
        behind, self._behind = self._behind, None
        if behind is None:
            return
        behind.copied.synchronize()
        # What is sent is read by the socket for as long as a client is slow; the buffer is written again two steps later.
        self._emit(behind.done, [buffer.clone() for buffer in behind.buffers])
        if behind.buffers:
            self._free.append(behind.buffers)

    def _buffers(self, copier: Copier, tensors: Sequence[Tensor]) -> list[Tensor]:
        """One for each, all of one job's being of one shape: two sets take turns."""
        if tensors and self._free:
            return self._free.pop()
        return [copier.buffer(tensor) for tensor in tensors]


def step_messages(emit: Emit, device: torch.device, *, tells: bool) -> StepMessages:
    """Those of a job on `device`; on a rank that tells nobody, nothing is copied or waited for."""
    return StepMessages(emit, SideStream(device) if tells and device.type == "cuda" else None)
