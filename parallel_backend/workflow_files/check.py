"""What of a workflow would be made parallel, and what of it a parallel MODEL would refuse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .api_form import api_graph
from .editor_form import editor_graph
from .families import family_of
from .graph import Graph, Node, carries_model, is_pipe
from .known import LOADERS, OURS, PARALLELIZE, RUN
from .reading import Workflow
from .refusals import why_file_refused, why_refused

THE_SETTING = 'the setting "Make every SD3 / SDXL model parallel" (PARALLEL_MMDIT_EVERYWHERE=1 for a headless server)'
IN_A_PIPE = f"its MODEL goes on inside a pipe, where no node can be put; {THE_SETTING} makes it parallel"
IN_A_GROUP = f"its MODEL stays inside the group: turn the group into nodes first, or use {THE_SETTING}"
ON_LINUX = "a ComfyUI on Linux refuses that before this pack is asked: choose the file again, or let --swap put in a loader that finds it."
# What brings prompts to a sampler, and the ControlNets on them.
_PROMPTS = ("CONDITIONING", "CONTROL_NET", "CONTROL_NET_STACK")


@dataclass(frozen=True)
class Remark:
    """A node, and what is to be said of it."""

    key: str
    title: str
    class_type: str
    why: str

    @classmethod
    def of(cls, node: Node, why: str) -> Remark:
        return cls(node.key, node.title, node.class_type, why)

    def __str__(self) -> str:
        kind = "" if self.title == self.class_type else f" ({self.class_type})"
        return f'{self.key} "{self.title}"{kind}: {self.why}'


@dataclass
class Findings:
    """`wanted` are the outputs behind which a ParallelizeModel belongs; `hidden` are loaders whose MODEL no node can reach."""

    wanted: list[tuple[Node, int]] = field(default_factory=list)
    parallel: list[Remark] = field(default_factory=list)
    hidden: list[Remark] = field(default_factory=list)
    local: list[Remark] = field(default_factory=list)
    refused: list[Remark] = field(default_factory=list)
    unknown: list[Remark] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def concerns_us(self) -> bool:
        """Whether a model of SD3 or SDXL, or one that can be, is sampled at all."""
        return bool(self.wanted or self.parallel or self.hidden)

    @property
    def runs_with_setting(self) -> bool:
        return self.concerns_us and not self.refused

    @property
    def runs(self) -> bool:
        return self.runs_with_setting and not self.hidden


def graph_of(workflow: Workflow) -> Graph:
    return editor_graph(workflow.graph) if workflow.form == "editor" else api_graph(workflow.graph)


def check(workflow: Workflow) -> Findings:
    """Without a change to it."""
    graph, found = graph_of(workflow), Findings(notes=list(workflow.notes))
    loaders: dict[str, Node] = {}
    on_the_way: dict[str, Node] = {}
    for loader, slot in graph.model_sources():
        path = _sampling_path(graph, loader, graph.reached(loader, slot))
        if path and _is_ours(graph, loader, path, found):
            _place(found, loader, slot, path, list(filter(_samples, graph.reached(loader, slot, not_past=PARALLELIZE))))
            loaders[loader.key] = loader
            on_the_way |= {node.key: node for node in path}
    for loader, why in _hidden(graph):
        wires = (slot for slot in graph.taken(loader) if carries_model(loader.outputs[slot]))
        path = graph.behind([loader, *(node for slot in wires for node in graph.reached(loader, slot))], _PROMPTS)
        if loader.key in loaders or _is_ours(graph, loader, path, found):
            found.hidden.append(Remark.of(loader, why))
            loaders[loader.key] = loader
            on_the_way |= {node.key: node for node in path}
    for loader in loaders.values():
        if why := why_file_refused(loader):
            found.refused.append(Remark.of(loader, f"{why} ({loader.file})" if loader.file else why))
        if "\\" in loader.file and loader.class_type not in OURS:
            found.notes.append(f"{loader.label} names its file as Windows does ({loader.file}); {ON_LINUX}")
    for node in on_the_way.values():
        if why := why_refused(node):
            found.refused.append(Remark.of(node, why))
        elif node.class_type not in RUN and not node.members:
            found.unknown.append(Remark.of(node, "not known here: will be told at sampling if it can't be honoured"))
    return found


def _sampling_path(graph: Graph, loader: Node, reached: Sequence[Node]) -> list[Node]:
    """The loader, all that its MODEL gets to, and all that gives these their prompts; nothing if none of them samples."""
    return graph.behind([loader, *reached], _PROMPTS) if any(map(_samples, reached)) else []


def _samples(node: Node) -> bool:
    return any(entry.kind == "CONDITIONING" or is_pipe(entry.kind) for entry in node.inputs)


def _is_ours(graph: Graph, loader: Node, path: Sequence[Node], found: Findings) -> bool:
    """Whether it is of SD3 or SDXL, or can be; what isn't is said to stay local."""
    if loader.class_type in OURS:
        return True
    family = family_of(loader, graph.behind(path, ("CONDITIONING", "CLIP")))
    file = f" ({loader.file})" if loader.file else ""
    if family == "another":
        found.local.append(Remark.of(loader, f"not a model of SD3 or SDXL{file}, stays as it is"))
    elif family == "unknown":
        found.notes.append(
            f"Nothing tells the family of {loader.label}{file}: if it is neither SD3 nor SDXL, the node refuses it by name."
        )
    return family != "another"


def _place(found: Findings, loader: Node, slot: int, path: Sequence[Node], aside: Sequence[Node]) -> None:
    """Whether its MODEL is to be made parallel, or is so already; `aside` samples what a ParallelizeModel doesn't reach."""
    if loader.class_type in OURS:
        found.parallel.append(Remark.of(loader, "gives a parallel MODEL already"))
    elif any(node.class_type == PARALLELIZE for node in path):
        found.parallel.append(Remark.of(loader, "its MODEL is made parallel already"))
        found.local += [Remark.of(node, f"samples the MODEL of {loader.label} beside {PARALLELIZE}") for node in aside]
    elif not any(kept[0].raw is loader.raw and kept[1] == slot for kept in found.wanted):
        found.wanted.append((loader, slot))


def _hidden(graph: Graph) -> Iterator[tuple[Node, str]]:
    """Loaders whose MODEL goes on in a pipe, and old group nodes that keep it inside."""
    for node in graph.nodes.values():
        makes_model = any(node.outputs[slot] == "MODEL" for slot in graph.taken(node))
        in_pipe = any(is_pipe(node.outputs[slot]) for slot in graph.taken(node))
        takes = any(entry.kind == "MODEL" or is_pipe(entry.kind) for entry in node.inputs)
        if in_pipe and node.files and not takes:
            yield node, IN_A_PIPE
        elif LOADERS.intersection(node.members) and not makes_model and not takes:
            yield node, IN_A_GROUP
