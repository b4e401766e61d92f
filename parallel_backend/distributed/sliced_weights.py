"""Weights in slices: each rank keeps some rows of every large tensor, and a block's whole weights only while it computes.

The next block's weights are gathered while one computes. Nothing is approximated: the gathered tensors are the file's.
Source: ZeRO, stage 3 (Rajbhandari et al. 2019, arXiv 1910.02054).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .collectives import Handle, split_range, split_sizes, start_all_gather
from .mesh import MeshAxis
from .tensor_parallel import Shard, sharded_parameter


@dataclass
class _Block:
    """A block's sliced tensors: (module, name, full shape) each."""

    axis: MeshAxis
    parts: list[tuple[nn.Module, str, torch.Size]] = field(default_factory=list)
    slices: list[nn.Parameter] = field(default_factory=list)

    def start(self) -> Handle:
        """Comm: one all-gather of this rank's slices, padded to the longest rank's."""
        flat = torch.cat([_rows_first(p).reshape(-1) for p in self.slices])
        longest = sum(split_sizes(shape[0], self.axis.degree)[0] * shape[1:].numel() for _, _, shape in self.parts)
        padding = flat.new_zeros(longest - flat.numel())
        return start_all_gather(torch.cat([flat, padding])[None], self.axis)

    def fill(self, gathered: Handle) -> None:
        """The whole tensors are in their modules."""
        by_rank, starts = gathered.wait(), [0] * self.axis.degree
        for module, name, shape in self.parts:
            rest, pieces = shape[1:].numel(), []
            for rank, rows in enumerate(split_sizes(shape[0], self.axis.degree)):
                pieces.append(by_rank[rank, starts[rank] : starts[rank] + rows * rest])
                starts[rank] += rows * rest
            setattr(module, name, nn.Parameter(_rows_last(torch.cat(pieces), shape), requires_grad=False))

    def empty(self) -> None:
        """Only this rank's slices are."""
        for (module, name, _), own in zip(self.parts, self.slices, strict=True):
            setattr(module, name, own)


class SlicedWeights:
    """The blocks of a model whose weights are sliced over an axis, each gathered before it computes.

    All ranks of the axis must run the same blocks in the same order.
    """

    def __init__(self, axis: MeshAxis) -> None:
        self.axis = axis
        self._blocks: list[tuple[nn.Module, _Block]] = []
        self._orders: dict[bool, list[_Block]] = {True: [], False: []}
        self._order = self._orders[True]
        self._place = 0
        self._coming: tuple[_Block, Handle] | None = None

    def cut(self, module: nn.Module) -> None:
        """Before weights are loaded: the block's matrices and kernels want only this rank's rows."""
        block = _Block(self.axis)
        for part in module.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                if parameter.ndim > 1 and parameter.shape[0] >= self.axis.degree:
                    rows = split_range(parameter.shape[0], self.axis.degree, self.axis.rank)
                    block.parts.append((part, name, parameter.shape))
                    setattr(part, name, sharded_parameter(parameter.shape, Shard(0, (rows,))))
        self._blocks.append((module, block))

    def attach(self) -> None:
        """After weights are loaded: each block gathers its own when it is called."""
        for module, block in self._blocks:
            block.slices = [getattr(part, name) for part, name, _ in block.parts]
            module.register_forward_pre_hook(lambda *_, block=block: self._before(block))
            module.register_forward_hook(lambda *_, block=block: block.empty(), always_call=True)

    @contextmanager
    def whole(self, part: nn.Module) -> Iterator[None]:
        """Inside, between evaluations, what `part` itself has is whole: it is gathered apart from its block.

        Comm: one all-gather of it, which all ranks of the axis make.
        """
        block = _Block(self.axis)
        for _, sliced in self._blocks:
            for (module, name, shape), own in zip(sliced.parts, sliced.slices, strict=True):
                if module is part:
                    block.parts.append((module, name, shape))
                    block.slices.append(own)
        if block.parts:
            block.fill(block.start())
        try:
            yield
        finally:
            block.empty()

    def begin(self, is_whole: bool = True) -> None:
        """A new evaluation starts with the first block, of all blocks or always the same few; what an evaluation that broke off has
        asked for is taken in."""
        if self._coming is not None:
            self._coming[1].wait()
            self._coming = None
        self._place, self._order = 0, self._orders[is_whole]

    def _before(self, block: _Block) -> None:
        gathered = self._coming[1] if self._coming is not None and self._coming[0] is block else block.start()
        self._coming = None
        if self._place == len(self._order):  # the first evaluation finds out the order
            self._order.append(block)
        self._place += 1
        if self._place < len(self._order):
            following = self._order[self._place]
            self._coming = following, following.start()
        block.fill(gathered)


def _rows_first(x: Tensor) -> Tensor:
    """A kernel as it lies in memory in the channels-last layout; a matrix as it is."""
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x


def _rows_last(flat: Tensor, shape: torch.Size) -> Tensor:
    if len(shape) != 4:
        return flat.view(shape)
    rows, channels, height, width = shape
    return flat.view(rows, height, width, channels).permute(0, 3, 1, 2)
