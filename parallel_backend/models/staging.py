"""From a mapped file to a device: copied in the file's dtype, cast there.

torch casts on one thread of the CPU where a copy to a GPU is to change the dtype, and copies memory that isn't pinned in small
steps: both are several times slower than the link to the card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

# Of each of the two: a multiple of what a link takes at once, and pinned memory stays with the process.
BUFFER_BYTES = 2**25

Place = Callable[[Tensor, torch.dtype], Tensor]


class Sent(Protocol):
    """A copy under way."""

    def synchronize(self) -> None:
        """Returns when what it reads from may be written again."""
        ...


def placing(device: torch.device) -> Place:
    """What gives a tensor of a file on `device` in a dtype, as one of its own: the file can be let go."""
    if device.type != "cuda":
        return lambda tensor, dtype: tensor.to(device=device, dtype=dtype, copy=True)
    buffers = [torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    return Staging(device, buffers, _send).place


class Staging:
    """Puts tensors on a device by way of pinned buffers: one is filled while another is sent.

    Args:
        send: starts the copy of its second tensor into its first.
    """

    def __init__(self, device: torch.device, buffers: Sequence[Tensor], send: Callable[[Tensor, Tensor], Sent]) -> None:
        self._device, self._buffers, self._send = device, buffers, send
        self._sent: list[Sent | None] = [None] * len(buffers)
        self._next = 0

    def place(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor on the device in that dtype. For a moment the device has it in the file's dtype too."""
        if tensor.is_cuda:  # quantised there, as it was read
            return tensor.to(dtype)
        landed = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        for start, part in _parts(tensor, self._buffers[0].nbytes // tensor.element_size()):
            filled = self._free_buffer()[: part.nbytes].view(part.dtype)
            filled.view(part.shape).copy_(part)
            self._sent[self._next] = self._send(landed.view(-1)[start : start + part.numel()], filled)
            self._next = (self._next + 1) % len(self._buffers)
        return landed.to(dtype)

    def _free_buffer(self) -> Tensor:
        """The next buffer, once what was sent from it has arrived."""
        sent = self._sent[self._next]
        if sent is not None:
            sent.synchronize()
        return self._buffers[self._next]


def _send(to: Tensor, pinned: Tensor) -> Sent:
    to.copy_(pinned, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return arrived


def _parts(tensor: Tensor, most: int, start: int = 0) -> Iterator[tuple[int, Tensor]]:
    """Parts of at most so many elements, each with its place among those of the whole, row after row."""
    if tensor.numel() <= most:
        if tensor.numel():
            yield start, tensor
        return
    row = tensor[0].numel()
    if row > most:
        for index, rest in enumerate(tensor):
            yield from _parts(rest, most, start + index * row)
        return
    for index, rows in enumerate(tensor.split(most // row)):
        yield start + index * (most // row) * row, rows
