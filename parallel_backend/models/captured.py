"""Evaluations as graphs: recorded once for each kind of input, phase and branch, and done again without Python.

The first evaluation of a kind runs as ever, so that communicators, workspaces and kernels are made. The second is recorded, which
computes nothing, and done by its recording, as are all that follow: at other steps, with other prompts, in other jobs. So each
rank makes each evaluation once, whether it has a recording or not: one rank may have lost it, or failed to make it.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.mesh import Mesh
from ..distributed.stale import Buckets, Step
from ..distributed.traffic import Traffic
from ..errors import in_a_line
from .cuda_graphs import Recorder
from .extra import Extra
from .inputs import Inputs
from .network import Network
from .prepared import PreparedPrompt
from .reports import ReportingExtra
from .residuals import NONE, Residuals

log = logging.getLogger("parallel_backend")

RECORDING = "capturing a graph"
# Two phases of two branches, in two sizes.
MOST_GRAPHS = 8
# Kinds that were evaluated before, which are a few numbers each.
MOST_KNOWN = 256


@dataclass
class _Standing:
    """Where a branch's inputs of one form lie, and its messages, whatever the phase.

    Args:
        given: the tensors whose values those inputs have that last.
        buckets: none where the branch has no messages.
    """

    inputs: Inputs
    given: list[ref[Tensor] | None]
    buckets: Buckets | None

    @classmethod
    def like(cls, inputs: Inputs, buckets: Buckets | None) -> _Standing:
        return cls(inputs.each(torch.empty_like), [None] * len(inputs.kept()), buckets)

    def take(self, inputs: Inputs) -> None:
        """They have the values of these. What lasts is copied where it is another tensor than the last time."""
        pairs = list(zip(self.inputs.fresh(), inputs.fresh(), strict=True))
        for number, (own, tensor) in enumerate(zip(self.inputs.kept(), inputs.kept(), strict=True)):
            before = self.given[number]
            if before is None or before() is not tensor:
                pairs.append((own, tensor))
                self.given[number] = ref(tensor)
        _copy(pairs)


@dataclass(frozen=True)
class _Graph:
    """An evaluation that was recorded, and what it counts each time."""

    standing: _Standing
    again: Callable[[], None]
    out: Tensor
    counts: Sequence[tuple[Traffic, int, int]]

    def __call__(self, inputs: Inputs) -> Tensor:
        self.standing.take(inputs)
        self.again()
        for traffic, nbytes, collectives in self.counts:
            traffic.count_again(nbytes, collectives)
        # The next recording that is done again may have its tensors where this result lies.
        return self.out.clone()


@dataclass
class CapturedNetwork:
    """`network`, evaluated by graphs where that can be.

    Args:
        beat: called before each, which runs no block's hooks.
        tell: of a recording: what is under way, and how many of 1 are done.
    """

    network: Network
    mesh: Mesh
    recorder: Recorder
    beat: Callable[[], object] = lambda: None
    tell: Callable[[str, int], object] = lambda what, done: None
    notes: list[str] = field(init=False, default_factory=list)
    _graphs: OrderedDict[Hashable, _Graph] = field(init=False, default_factory=OrderedDict)
    _standing: dict[Hashable, _Standing] = field(init=False, default_factory=dict)
    # Kinds that have been evaluated, and whether they have messages; those that can't be recorded.
    _known: OrderedDict[Hashable, bool] = field(init=False, default_factory=OrderedDict)
    _refused: set[Hashable] = field(init=False, default_factory=set)
    _version: int = field(init=False, default=0)

    def __call__(
        self,
        x: Tensor,
        timesteps: Tensor,
        prepared: PreparedPrompt,
        step: Step,
        residuals: Residuals = NONE,
        extras: Sequence[Extra] = (),
    ) -> Tensor:
        """As the network's; its tensor is the caller's own."""
        inputs = self.network.inputs(x, timesteps, prepared, step, residuals, extras)
        kept = step.kept
        if kept is not None and any(made is not None for made in (kept.token_kv, kept.timeline, kept.caches)):
            return self.network.evaluate(inputs, step)  # patches of a pipeline; marks of time; decisions
        if any(isinstance(extra, ReportingExtra) or extra.is_drawn for extra in extras):
            return self.network.evaluate(inputs, step)
        place = (inputs.form(), step.branch, step.kept is not None and step.kept.stale is not None)
        stale, standing = step.stale, self._standing.get(place)
        if stale is not None and standing is not None and standing.buckets is not None:
            stale.adopt(standing.buckets)
        graph = self._graph(place, inputs, step)
        if graph is None:
            return self._evaluated((place, step.phase), inputs, step)
        self.beat()
        if stale is not None:  # a recording can't wait for what was started before it
            stale.arrive()
        return graph(inputs)

    def drop(self) -> None:
        """No graph is left, and none of their memory is taken."""
        self._graphs.clear()
        self._standing.clear()
        self.recorder.let_go()

    def at_version(self, version: int) -> None:
        """Of weights that lie where they lay at this version: graphs of others are gone.

        Kernels of these may never have run, or be such as can be recorded where others weren't: all begins anew.
        """
        if version != self._version:
            self.drop()
            self._known.clear()
            self._refused.clear()
        self._version = version

    def take_notes(self) -> list[str]:
        """What the user should know since the last time."""
        notes, self.notes = self.notes, []
        return notes

    def _evaluated(self, kind: Hashable, inputs: Inputs, step: Step) -> Tensor:
        out = self.recorder.beside(lambda: self.network.evaluate(inputs, step))
        self._known[kind] = step.stale is not None and step.stale.is_used
        self._known.move_to_end(kind)
        while len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)
        return out

    def _graph(self, place: Hashable, inputs: Inputs, step: Step) -> _Graph | None:
        """That of this kind of evaluation, recorded now where it has run before; None where it is to run as ever."""
        kind, stale = (place, step.phase), step.stale
        if kind in self._refused or kind not in self._known:
            return None
        if stale is not None:
            stale.settle()
        buckets = stale.buckets if stale is not None else None
        if self._known[kind] and buckets is None:  # which the first displaced evaluation makes
            return None
        standing = self._standing.get(place)
        if standing is None or standing.buckets is not buckets:  # graphs of other buckets will not be asked for again
            standing = _Standing.like(inputs, buckets)
        graph = self._graphs.get(kind)
        if graph is None or graph.standing is not standing:
            self.tell(RECORDING, 0)
            graph = self._recorded(kind, standing, inputs, step)
            self.tell(RECORDING, 1)
        if graph is not None:
            self._standing[place], self._graphs[kind] = standing, graph
            self._graphs.move_to_end(kind)
            self._let_go_of_oldest()
        return graph

    def _let_go_of_oldest(self) -> None:
        while len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)
        used = {id(graph.standing) for graph in self._graphs.values()}
        self._standing = {place: standing for place, standing in self._standing.items() if id(standing) in used}

    def _recorded(self, kind: Hashable, standing: _Standing, inputs: Inputs, step: Step) -> _Graph | None:
        """None where it can't be recorded: what it left half done is undone."""
        stale, axes = step.stale, {id(axis.traffic): axis.traffic for axis in self.mesh.axes}
        before = [(traffic, traffic.sent_bytes, traffic.collectives) for traffic in axes.values()]
        if stale is not None:
            stale.arrive()
        standing.take(inputs)

        def evaluate() -> Tensor:
            out = self.network.evaluate(standing.inputs, step)
            if stale is not None:  # what was started in a recording ends in it
                stale.arrive()
            return out

        try:
            again, out = self.recorder.recorded(evaluate)
            counts = [(t, t.sent_bytes - sent, t.collectives - started) for t, sent, started in before]
        except dist.DistBackendError:  # a communicator that failed can't be used again
            raise
        except Exception as error:  # noqa: BLE001 - whatever stands against it, the evaluation itself goes on
            self._refuse(kind, error)
            if stale is not None:
                stale.break_off()
            return None
        finally:  # nothing was sent
            for traffic, sent, started in before:
                traffic.sent_bytes, traffic.collectives = sent, started
        return _Graph(standing, again, out, counts)

    def _refuse(self, kind: Hashable, error: Exception) -> None:
        why = in_a_line(error)
        log.warning("an evaluation can't be a CUDA graph (%s): it runs without", why)
        self.notes.append(f"CUDA graphs: an evaluation runs without ({why})")
        self._refused.add(kind)


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """The first of each pair has the values of the second; those of one dtype in as few launches as can be."""
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for own, tensor in pairs:
        if tensor.numel():
            owns, tensors = by_dtype.setdefault(tensor.dtype, ([], []))
            owns.append(own)
            tensors.append(tensor)
    for owns, tensors in by_dtype.values():
        torch._foreach_copy_(owns, tensors)
