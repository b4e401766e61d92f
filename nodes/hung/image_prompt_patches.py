"""Which patches are image prompts, and what each of them holds: IP-Adapter's, InstantID's and PuLID's, by the names of their classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from ...parallel_backend.rpc.extras import ImagePromptForm
from .asked_patch import part_of
from .patches import Patch

# By the name of the class: what it holds one of for each picture. The packs' forks have the same names in other folders.
_FIELDS = {"Attn2Replace": ("callback", "kwargs"), "CrossAttentionPatch": ("scales", "instantIds", "conds")}
_CALLBACKS = ("ipadapter_attention", "instantid_attention", "pulid_attention")
_RANGE = ("sigma_start", "sigma_end")
# PuLID's settings that make its output another than attention times a number, the one that goes first first.
_FORMS: Mapping[str, ImagePromptForm] = {"ortho": "orthogonal", "ortho_v2": "partly_orthogonal"}


def is_image_prompt(patch: Patch) -> bool:
    """An object of one of those classes, with the fields that are read."""
    fields = _FIELDS.get(type(patch.function).__qualname__)
    if patch.kind != "attn2" or fields is None:
        return False
    held: list[Any] = [getattr(patch.function, name, None) for name in fields]
    if not all(isinstance(of, list) and len(of) == len(held[0]) > 0 for of in held):
        return False
    return fields[0] != "callback" or all(_is_known(*one) for one in zip(*held, strict=True))


def _is_known(callback: Any, kwargs: Any) -> bool:
    named = isinstance(callback, FunctionType) and callback.__name__ in _CALLBACKS
    return named and all(isinstance(kwargs.get(name), int | float) for name in _RANGE)


def count_of(patch: Patch) -> int:
    """How many pictures it has: nodes that hang one more add it to the patch that is there."""
    return len(getattr(patch.function, _FIELDS[type(patch.function).__qualname__][0]))


@dataclass(frozen=True)
class Picture:
    """One picture of a patch: the patch with it alone, in its plain form, and when and in which form it acts."""

    plain: Any
    form: ImagePromptForm = "added"
    start: float | None = None
    end: float | None = None

    @property
    def function(self) -> Any:
        """What computes it."""
        return self.plain.callback[0] if hasattr(self.plain, "callback") else type(self.plain)

    @property
    def device(self) -> Any:
        """Where it is computed; None where that isn't said."""
        given = self.plain.kwargs[0].get("cond") if hasattr(self.plain, "kwargs") else self.plain.conds[0]
        return getattr(given, "device", None)


def pictures_of(patch: Any) -> list[Picture]:
    """In the order in which they are added. A patch without callbacks adds all of its own as it likes."""
    if not hasattr(patch, "callback"):
        return [Picture(patch)]
    found = []
    for number, kwargs in enumerate(patch.kwargs):
        form = next((form for name, form in _FORMS.items() if kwargs.get(name)), "added")
        plain = part_of(patch, number, **{name: False for name in _FORMS if name in kwargs})
        found.append(Picture(plain, form, *(float(kwargs[name]) for name in _RANGE)))
    return found
