"""Whose code a function or object is: core's own, a pack's, or a pack's that only stands around core's own."""

from __future__ import annotations

import sys
from dis import get_instructions, hasjabs, hasjrel
from functools import partial
from inspect import signature
from pathlib import PurePath
from types import CodeType, FunctionType
from typing import Any

from .asking import with_others
from .patches import closed_over
from .refusal import module_of

# Of a function that was made of text.
_NO_MODULE = "code without a module"
_NO_PACKS = frozenset({*sys.stdlib_module_names, "torch", "comfy"})


def maker_of(put: Any) -> str:
    """The module whose function or object it is, or one within it that it wraps; empty where it is torch's, Python's or core's."""
    while isinstance(put, partial):
        put = put.func
    put = getattr(put, "__func__", put)
    if isinstance(put, FunctionType):  # what wraps another calls itself by the other's name
        module = PurePath(put.__globals__.get("__name__") or _NO_MODULE).name
    else:
        module = module_of(put if isinstance(put, type) else type(put))
    if module.split(".")[0] not in _NO_PACKS:
        return module
    wrapped = getattr(put, "__wrapped__", None)  # as torch.no_grad() leaves it
    return "" if wrapped is None else maker_of(wrapped)


def is_cores_own(function: Any, module: str, name: str) -> bool:
    """Whether what goes by this name in a module of core's is what core has put there."""
    is_named = isinstance(function, FunctionType | type) and function.__qualname__ == name
    return is_named and function.__module__ == module and not maker_of(function)


def stands_around(put: Any, before: Any, kind: type, name: str) -> bool:
    """Whether what a class has by this name does what it had `before` did.

    Both have one function of the class's own module within, and packs have put around it only such as call it with all that they get,
    and give back what it gives. LayerDiffuse puts one around the forward of all transformer blocks, wherever it is installed.
    """
    own = _own_within(put, kind, name)
    return own is not None and own is _own_within(before, kind, name)


def _own_within(put: Any, kind: type, name: str, outer: tuple[FunctionType, ...] = ()) -> FunctionType | None:
    """That function; None where something else was put around it. `outer`: those around `put`, which may hold each other."""
    if not isinstance(put, FunctionType) or put in outer:
        return None
    if any(is_cores_own(put, of.__module__, f"{of.__qualname__}.{name}") for of in kind.__mro__):
        return put
    if not _is_straight(put.__code__):
        return None
    of_module = {known: put.__globals__[known] for known in put.__code__.co_names if known in put.__globals__}
    for variable, inner in (of_module | closed_over(put)).items():
        own = _own_within(inner, kind, name, (*outer, put))
        if own is not None and _hands_on(put, variable, own):
            return own
    return None


def _is_straight(code: CodeType) -> bool:
    """Whether it does the same each time, and calls one thing: without branches, handlers of errors, or loops."""
    steps = list(get_instructions(code))
    calls = [step for step in steps if step.opname.startswith("CALL") and not step.opname.startswith("CALL_INTRINSIC")]
    jumps = [step for step in steps if step.opcode in (*hasjrel, *hasjabs)]
    return len(calls) == 1 and not jumps and not getattr(code, "co_exceptiontable", b"")


def _hands_on(put: FunctionType, variable: str, own: FunctionType) -> bool:
    """Whether a copy, asked with objects that can only be handed on, calls what it holds in this variable with all of them, and gives back
    what that gives."""
    taken, output = signature(own), object()
    parameters = taken.parameters.values()
    named = {p.name: object() for p in parameters if p.kind is p.KEYWORD_ONLY or p.default is not p.empty}
    named |= {f"more_{p.name}": object() for p in parameters if p.kind is p.VAR_KEYWORD}
    first = [object() for p in parameters if p.name not in named and p.kind is not p.VAR_KEYWORD]
    calls = []

    def asked(*args: Any, **kwargs: Any) -> object:
        calls.append(taken.bind(*args, **kwargs))
        return output

    copy = with_others(put, {variable: asked}, {variable: asked})
    try:
        is_output = copy(*first, **named) is output
    except Exception:  # noqa: BLE001 - whatever it does with what it is given, it does something with it
        return False
    return is_output and calls == [taken.bind(*first, **named)]
