"""CUDA's graphs: kernels and NCCL's messages of a function, recorded once, launched again as one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConfigError


class Recorder(Protocol):
    """What records a device's work to have it done again. Nothing that a function does to Python's objects is done again."""

    def beside(self, function: Callable[[], Tensor]) -> Tensor:
        """What the function gives, done at once: what libraries make at their first use is there afterwards."""
        ...

    def recorded(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What does the function's work again, and the tensor that has its result then; nothing is done yet.

        All of the function's tensors lie in one room with those of the other recordings: what any of them leaves there holds
        until another one is done again.
        Raises: whatever the function, or the device, has against being recorded.
        """
        ...

    def let_go(self) -> None:
        """No recording is left: the room is given back."""
        ...


def check_graphs(device: torch.device, *, sliced: bool) -> None:
    """Raises: ConfigError: ranks on that device, with weights in slices or whole, have no graphs."""
    off = "Turn graphs off in Mesh Config."
    if device.type != "cuda":
        raise ConfigError(f"graphs are CUDA's, and the ranks compute on {device.type}.", off)
    if sliced:
        raise ConfigError("graphs would hold the weights that sliced gathers from block to block.", off)


class CUDAGraphs:
    """Those of one GPU, with one pool of memory for all."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Functions are tried on the stream on which they are recorded: the workspaces that libraries keep for each stream are
        # then there before, and not in the pool.
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def beside(self, function: Callable[[], Tensor]) -> Tensor:
        own = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(own)
        with torch.cuda.stream(self._stream):
            result = function()
        own.wait_stream(self._stream)
        # It was made on another stream than that which reads it.
        result.record_stream(own)
        return result

    def recorded(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph, own = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            # Other threads of a rank ask CUDA for things meanwhile: NCCL's watch whether its messages are done, ours whether
            # the device moves.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                result = function()
        except Exception:
            # torch's own clearing up stops at CUDA's error: the stream stays current, the pool open.
            torch.cuda.set_stream(own)
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(own.device_index, self._pool)
            torch.cuda.synchronize(self._device)  # which raises where more is lost than a recording
            raise
        return graph.replay, result

    def let_go(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
