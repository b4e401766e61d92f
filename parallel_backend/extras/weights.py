"""Patches on weights, as a rank lays them on the parts that it holds.

The base comes from the checkpoint each time, bit for bit: nothing is subtracted, and no second copy is kept. Low-rank products are
added in fp32, each rank its own rows or columns. Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..checkpoint_files.patch_file import DOWN, UP, PatchEntry, append_part, entries_of, is_patch_file
from ..errors import InputError, UnknownPatchesError
from ..models.checkpoint import HeldWeight, TensorSource
from ..models.staging import placing
from ..quantized.weight import Product, QuantizedWeight
from ..rpc.messages import Patches
from ..rpc.state import Swap

OPEN_FILES = 4
# Of those that clients on other hosts sent, which can't remove them themselves.
SENT_FILES = 4
# The rows of a parameter that hold the tensor of a single-file name: the parameter's name, and its first such row.
Place = Callable[[str], tuple[str, int]]


class PatchFiles:
    """The patch files that this rank has open. They are mapped, so that a rank reads its own parts alone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: OrderedDict[str, tuple[list[PatchEntry], Any]] = OrderedDict()
        self._sent: list[str] = []

    def opened(self, name: str) -> tuple[list[PatchEntry], Any]:
        """Raises: InputError, CheckpointError: not a patch file. UnknownPatchesError: it isn't there."""
        path = self._path(name)
        if name not in self._open:
            if not path.is_file():
                raise UnknownPatchesError(f"The patch file {name} is not there.", "Run the prompt again.")
            self._open[name] = entries_of(path), safe_open(path, framework="pt", device="cpu")
        self._open.move_to_end(name)
        while len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)
        return self._open[name]

    def add(self, name: str, part: int, data: Tensor, *, last: bool) -> None:
        """Part by part, a file that this host doesn't have. One rank of a host writes it, and removes the oldest of such.

        Raises: InputError: no name of a patch file. CheckpointError: it can't be written.
        """
        path = self._path(name)
        if int(os.environ.get("LOCAL_RANK", 0)) != 0:
            return
        append_part(path, part, data, last=last)
        if last:
            self._sent = [*(sent for sent in self._sent if sent != name), name]
            for old in self._sent[:-SENT_FILES]:
                (self._folder / old).unlink(missing_ok=True)
            self._sent = self._sent[-SENT_FILES:]

    def _path(self, name: str) -> Path:
        """Raises: InputError: no name of a patch file."""
        if not is_patch_file(name):
            raise InputError(f"{name!r} is no name of a patch file.", "Name one that a client has written.")
        return self._folder / name

    def by_parameter(self, patches: Patches, place: Place) -> dict[str, list[Patch]]:
        """In their order. Raises: as `opened`; InputError: not a scale for each product."""
        found: dict[str, list[Patch]] = defaultdict(list)
        for name in patches.files:
            is_whole = name == patches.whole
            entries, file = self.opened(name)
            factors = [1.0] * len(entries) if is_whole else patches.scales
            if len(factors) != len(entries):
                raise InputError(f"{len(factors)} scales for {len(entries)} patches.", "Give one for each.")
            for number, (entry, scale) in enumerate(zip(entries, factors, strict=True)):
                parameter, first = place(entry.weight)
                tensors = (f"{number}",) if is_whole else (f"{number}{UP}", f"{number}{DOWN}")
                mark = (entry.digest, first + entry.row, scale)
                found[parameter].append(Patch(file, tensors, first + entry.row, scale, mark, entry.weight))
        return found


@dataclass(frozen=True)
class Patch:
    """One on rows of a parameter, from `first` on: a product of two tensors of the file, or one tensor in their place."""

    file: Any
    tensors: tuple[str, ...]
    first: int
    scale: float
    mark: tuple[str, int, float]
    weight: str

    @property
    def is_whole(self) -> bool:
        return len(self.tensors) == 1

    def whole(self) -> Tensor:
        """Mapped, not read."""
        return self.file.get_tensor(self.tensors[0])

    def onto(self, local: Tensor, held: HeldWeight) -> None:
        """Lies on this rank's part of the weight, which changes in place.

        Args:
            local: (kept rows, kept columns), fp32: a kernel is a matrix, all dims after the first are one.
        Raises: as `_cut`.
        """
        for here, left, down in self._cut(held, torch.float32):
            if down is None:
                local[here] = left
            else:
                local[here].addmm_(left, down, alpha=self.scale)

    def products(self, held: HeldWeight, dtype: torch.dtype) -> Iterator[Product]:
        """Those that lie beside this rank's part of a quantised weight. Raises: as `_cut`."""
        for here, left, down in self._cut(held, dtype):
            assert down is not None
            yield Product(here, left, down, self.scale)

    def _cut(self, held: HeldWeight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Where some of it lies on this rank's rows: those rows, and its two factors there, or its values and None.

        Raises: InputError: of another size than the weight.
        """
        left, right = self.file.get_slice(self.tensors[0]), self.file.get_slice(self.tensors[-1])
        rows, columns = left.get_shape()[0], torch.Size(right.get_shape()[1:]).numel()
        full_rows, full_columns = held.full_shape[0], torch.Size(held.full_shape[1:]).numel()
        if self.first + rows > full_rows or columns != full_columns:
            raise InputError(
                f"A patch on {self.weight} has {rows} x {columns} values, and lies on {full_rows} x {full_columns}.",
                "It was made for another model: remove its node.",
            )
        device, wanted_columns = held.parameter.device, held.columns
        down = None if self.is_whole else _matrix(right[:], device, dtype)[:, wanted_columns]
        for here, there in held.rows_of(self.first, rows):
            found = _matrix(left[there], device, dtype)
            yield here, found if down is not None else found[:, wanted_columns], down


class PatchedWeights:
    """A loaded model's parameters, and what lies on them now.

    Args:
        source: of the base.
        later: parts that are read when they are needed: told what takes their place, or None for the file's own.
    `version` is another one after each weight that has changed: what was computed with the weights holds no longer. `moved` is
    another one after each that lies elsewhere since: what knows them by their place doesn't find them there. `patched` counts the
    model's weights with a patch on, also those of other ranks.
    """

    def __init__(
        self,
        held: Mapping[str, HeldWeight],
        source: TensorSource,
        place: Place,
        later: Mapping[str, Callable[[Tensor | None], None]],
    ) -> None:
        self._held, self.source, self._place, self._later = held, source, place, later
        self._lying: dict[str, tuple[Any, ...]] = {}
        self._worn: Patches | None = Patches()
        self.version = self.moved = self.patched = 0

    def wear(
        self, patches: Patches, files: PatchFiles, told: Callable[[int, int], object] = lambda done, total: None
    ) -> Swap:
        """These patches, and no others, lie on the weights; only those weights change that must.

        Args:
            told: before each of them, how many of how many have changed.

        Raises:
            InputError: a patch of another size, or of no weight of this model.
            UnknownPatchesError: a file that isn't there.
            CheckpointError: the checkpoint has changed or is gone.
            Then each weight is whole, with its former patches or the new ones.
        """
        if patches == self._worn:  # as at most evaluations
            return Swap()
        self._worn = None
        start, read = time.perf_counter(), self.source.bytes_read
        wanted = files.by_parameter(patches, self._place)
        for name in wanted.keys() - set(self.source.names()):
            raise InputError(f"{self.source.path.name} has no weight {name}.", "Remove the node that patches it.")
        marks = {name: tuple(patch.mark for patch in on_it) for name, on_it in wanted.items()}
        changed = [name for name in {**self._lying, **marks} if self._lying.get(name) != marks.get(name)]
        here = [name for name in changed if name in self._held or name in self._later]
        if here:
            self.source.check_unchanged()
        onto_device = cache(placing)  # its pinned buffers are made once for all weights
        for number, name in enumerate(here):
            told(number, len(here))
            self.version += 1
            self._change(name, wanted.get(name, []), onto_device)
            self._lying[name] = marks.get(name, ())
        self._lying = {name: mark for name, mark in self._lying.items() if mark}
        self._worn, self.patched = patches, len(marks)
        return Swap(len(here), self.source.bytes_read - read, time.perf_counter() - start)

    def _change(
        self, name: str, patches: Sequence[Patch], onto_device: Callable[[torch.device], Callable[..., Tensor]]
    ) -> None:
        if name in self._later:
            if not all(patch.is_whole for patch in patches):
                raise InputError(f"A product can't be added to {name}.", "Give what takes its place.")
            self._later[name](patches[-1].whole() if patches else None)
            return
        held = self._held[name]
        parameter = held.parameter
        if isinstance(parameter, QuantizedWeight):
            self.moved += 1
            _lay_beside(parameter, held, patches)
            return
        base = onto_device(parameter.device)(self.source.read(name, held.shard), parameter.dtype)
        if patches:
            local = base.float().reshape(base.shape[0], -1)
            for patch in patches:
                patch.onto(local, held)
            base = local.reshape(base.shape).to(parameter.dtype)
        parameter.data.copy_(base)


def _lay_beside(weight: QuantizedWeight, held: HeldWeight, patches: Sequence[Patch]) -> None:
    """These patches, and no others, lie on a weight that stays quantised: nothing of it is quantised again.

    Raises: as `Patch.onto`; then the former ones lie on it.
    """
    if not any(patch.is_whole for patch in patches):
        weight.wear(product for patch in patches for product in patch.products(held, weight.dtype))
        return
    former = weight.products, weight.instead
    try:
        weight.wear(())
        local = weight.dequantized().float().reshape(weight.shape[0], -1)
        for patch in patches:
            patch.onto(local, held)
        former = (), local.reshape(weight.shape).to(weight.dtype)
    finally:
        weight.wear(*former)


def _matrix(part: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """All dims after the first as one."""
    return part.to(device, dtype).reshape(part.shape[0], -1)
