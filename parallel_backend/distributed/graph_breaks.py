"""Functions that compiled code calls and never contains: what ranks send each other, and what a job remembers."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])
_MARK = "breaks_graph"


def breaks_graph(function: F) -> F:
    """Marks a function for `torch.compiler.disable`, which `keep_out_of_graphs` puts in force.

    Not at once, since that imports the compiler: two seconds and 60 MB of each rank, and most ranks compile nothing.
    """
    setattr(function, _MARK, True)
    return function


def keep_out_of_graphs(*owners: type | ModuleType) -> None:
    """The marked functions of these classes and modules are called by compiled code as they are, from now on."""
    for owner in owners:
        for name, value in list(vars(owner).items()):
            if getattr(value, _MARK, False):
                outside = torch.compiler.disable(value)
                setattr(outside, _MARK, False)  # it has the mark of the function that it wraps
                setattr(owner, name, outside)
