"""Functions of a MODEL that evaluate it with patched blocks while it samples, often from some step on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import PurePath
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from comfy.model_patcher import ModelPatcher

from .loop_patches import OWN

# What a function names that patches attention or blocks: ComfyUI's functions for it, and where they leave the patches.
_PATCHING = frozenset(
    {
        *("set_model_options_patch_replace", "set_model_patch_replace", "set_model_patch"),
        *("set_model_attn1_replace", "set_model_attn2_replace", "set_model_attn1_patch", "set_model_attn2_patch"),
        *("patches", "patches_replace"),
    }
)

_FUNCTIONS = (FunctionType, MethodType, partial)


def patching_functions(model: ModelPatcher) -> Iterator[str]:
    """Functions and wrappers of a MODEL that patch its blocks when they are called, each by its own name.

    Read from their code, before anything calls them, and from that of what they call in their own package.
    """
    hung: list[tuple[str, Any]] = [(key, value) for key, value in model.model_options.items()]
    hung += [(kind, fs) for kind, by_key in model.wrappers.items() for key, fs in by_key.items() if key != OWN]
    for kind, value in hung:
        for function in value if isinstance(value, list | tuple) else [value]:
            if callable(function) and any(_PATCHING & names(code) for code in _codes(function, set())):
                named = function if hasattr(function, "__qualname__") else type(function)
                module = PurePath(named.__module__).name  # a path, of those that ComfyUI loads from a folder
                yield f"{named.__qualname__} of {module} ({kind}), which patches blocks of the model"


def names(code: CodeType) -> set[str]:
    """All names and strings in a piece of code."""
    return {*code.co_names, *(const for const in code.co_consts if isinstance(const, str))}


def _codes(function: Any, seen: set[CodeType]) -> Iterator[CodeType]:
    """The code of a function and of what it calls, as far as that is of its own package."""
    while isinstance(function, partial):
        function = function.func
    if not isinstance(function, FunctionType | MethodType):
        function = getattr(function, "__call__", None)  # noqa: B004 - of an object, its method
    owner = getattr(function, "__self__", None)
    function = getattr(function, "__func__", function)
    if not isinstance(function, FunctionType) or function.__code__ in seen:
        return
    used: set[str] = set()
    inner = [function.__code__]
    while inner:
        code = inner.pop()
        seen.add(code)
        used |= names(code)
        inner += [const for const in code.co_consts if isinstance(const, CodeType)]
        yield code
    for called in _reachable(function, owner, used):
        yield from _codes(called, seen)


def _reachable(function: FunctionType, owner: Any, used: set[str]) -> Iterator[Callable[..., Any]]:
    """Functions that `function` may call by the names that it uses: its closure's, its module's and package's, its object's."""
    package = _package(function)
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    found = [function.__globals__.get(name) for name in used]
    modules = [value for value in found if isinstance(value, ModuleType) and value.__name__.split(".")[0] == package]
    objects = [type(value) for value in (owner, *cells) if _package(type(value)) == package]
    found += [getattr(holder, name, None) for holder in (*modules, *objects) for name in used]
    yield from (value for value in cells if isinstance(value, _FUNCTIONS))
    yield from (value for value in found if isinstance(value, _FUNCTIONS) and _package(value) == package)


def _package(of: Any) -> str:
    return str(getattr(of, "__module__", "")).split(".")[0]
