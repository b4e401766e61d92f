"""`parallel-mmdit workflow` on what is no workflow, or one of which a part is of another type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from typing import Any

import pytest
from workflow_sheets import JSON, plain, prompt, subgraph

from parallel_backend.errors import InputError
from parallel_backend.workflow_files.make_parallel import make_parallel
from parallel_backend.workflow_files.reading import workflow_in


def damaged(change: Callable[[JSON], None]) -> JSON:
    content = plain()
    change(content)
    return content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "a list of 2 entries"),
        ("text", "the single value"),
        ({"version": 1, "name": "index"}, "it has 'version', 'name'"),
        ({}, "it has nothing"),
        ({"1": {"class_type": "KSampler"}, "2": {"inputs": {}}}, "Node '2'"),
        (damaged(lambda w: w["nodes"].append({"id": 9})), "missing required field `type` - at `$.nodes[3]`"),
        (damaged(lambda w: w["nodes"].append(dict(w["nodes"][0]))), "two nodes have the id 1"),
        (damaged(lambda w: w["links"].append([1])), "length 5, got 1"),
        (damaged(lambda w: w.update(links=5)), "`$.links`"),
    ],
)
def test_what_is_no_workflow_is_told_by_what_it_is(content: Any, words: str) -> None:
    with pytest.raises(InputError) as raised:
        workflow_in(content, "it")
    assert words in raised.value.message and raised.value.remedy


def test_whatever_is_of_another_type_is_named_or_left_alone() -> None:
    """Each single part of a workflow, replaced."""
    for content in (subgraph("sdxl.safetensors"), prompt()):
        for path in paths(content):
            for other in (None, "x", 7, [], {}):
                broken = deepcopy(content)
                inside = broken
                for key in path[:-1]:
                    inside = inside[key]
                inside[path[-1]] = other
                with suppress(InputError):
                    make_parallel(workflow_in(broken, "it"), swapped=True)


def paths(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in entries:
        yield from paths(value, (*path, key))
