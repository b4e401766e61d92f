"""Functions of a MODEL that evaluate it with patched blocks while it samples, often from some step on."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from comfy.model_patcher import ModelPatcher

from .kinds import guidance_of
from .loop_patches import OWN
from .refusal import module_of

# What a function names that patches attention or blocks: ComfyUI's functions for it, and where they leave the patches.
_PATCHING = frozenset(
    {
        *("set_model_options_patch_replace", "set_model_patch_replace", "set_model_patch"),
        *("set_model_attn1_replace", "set_model_attn2_replace", "set_model_attn1_patch", "set_model_attn2_patch"),
        *("patches", "patches_replace"),
    }
)

# What a function names that looks at the ControlNets of prompts by itself, to cut their pictures into tiles or batches.
_OF_CONTROLS = frozenset({"cond_hint", "cond_hint_original", "previous_controlnet"})

_FUNCTIONS = (FunctionType, MethodType, partial)


def patching_functions(model: ModelPatcher) -> Iterator[str]:
    """Functions and wrappers of a MODEL that patch its blocks when they are called, each by its own name.

    Read from their code, before anything calls them, and from that of what they call in their own package. Of those whose patches
    the ranks know, what of their settings can't be honoured.
    """
    for function, told in _functions_naming(_PATCHING, model):
        known = guidance_of(function)
        if known is None:
            yield f"{told}, which patches blocks of the model"
        else:
            yield from known.refused(function, model.model.diffusion_model)


def functions_on_controls(model: ModelPatcher) -> Iterator[str]:
    """Functions and wrappers of a MODEL that look at ControlNets by themselves, each by its own name."""
    return (told for _, told in _functions_naming(_OF_CONTROLS, model))


def _functions_naming(words: frozenset[str], model: ModelPatcher) -> Iterator[tuple[Any, str]]:
    hung: list[tuple[str, Any]] = [(key, value) for key, value in model.model_options.items()]
    for wrappers in (model.wrappers, model.model_options["transformer_options"].get("wrappers", {})):
        hung += [(kind, fs) for kind, by_key in wrappers.items() for key, fs in by_key.items() if key != OWN]
    for kind, value in hung:
        for function in value if isinstance(value, list | tuple) else [value]:
            if callable(function) and _names_any(words, function):
                named = function if hasattr(function, "__qualname__") else type(function)
                yield function, f"{named.__qualname__} of {module_of(named)} ({kind})"


def patches_blocks(function: Any) -> bool:
    """Whether its code, or that of its own package which it calls, names what patches attention or blocks."""
    return _names_any(_PATCHING, function)


def _names_any(words: frozenset[str], function: Any) -> bool:
    return any(words & names(code) for code in _codes(function, set()))


def names(code: CodeType) -> set[str]:
    """All names and strings in a piece of code."""
    return {*code.co_names, *(const for const in code.co_consts if isinstance(const, str))}


def _codes(hung: Any, seen: set[CodeType]) -> Iterator[CodeType]:
    """The code of a function and of what it calls, as far as that is of its own package."""
    function, owner = _plain(hung)
    if function is None or function.__code__ in seen:
        return
    used: set[str] = set()
    inner = [function.__code__]
    while inner:
        code = inner.pop()
        seen.add(code)
        used |= names(code)
        inner += [const for const in code.co_consts if isinstance(const, CodeType)]
        yield code
    for called in _called(function, owner, used):
        yield from _codes(called, seen)


def _called(function: FunctionType, owner: Any, used: set[str]) -> Iterator[Any]:
    """What `function` may call by the names that it uses: of its closure, of its module and package, of its object."""
    package = _package(function)
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    # Whatever else a closure holds is followed too, but not into ComfyUI's sampling, which all of them lead to.
    others = (value for value in cells if isinstance(value, _FUNCTIONS) and _package(value) != "comfy")
    # A method's decorator holds the plain function, which is the same object's.
    yield from (MethodType(f, owner) if owner is not None and isinstance(f, FunctionType) else f for f in others)
    found = [function.__globals__.get(name) for name in used]
    modules = [value for value in found if isinstance(value, ModuleType) and value.__name__.split(".")[0] == package]
    found += [vars(module).get(name) for module in modules for name in used]
    objects = [type(value) for value in (owner, *cells) if _package(type(value)) == package]
    found += [getattr(kind, name, None) for kind in objects for name in used]
    yield from (value for value in found if isinstance(value, _FUNCTIONS) and _package(value) == package)


def _plain(hung: Any) -> tuple[FunctionType | None, Any]:
    """The function that a callable comes down to, None where it isn't Python; and the object whose method it is."""
    while isinstance(hung, partial):
        hung = hung.func
    method = hung if isinstance(hung, FunctionType | MethodType) else getattr(hung, "__call__", None)  # noqa: B004
    function = getattr(method, "__func__", method)
    return function if isinstance(function, FunctionType) else None, getattr(method, "__self__", None)


def _package(of: Any) -> str:
    named = of if isinstance(of, type) else _plain(of)[0]
    return str(getattr(named, "__module__", "")).split(".")[0]
