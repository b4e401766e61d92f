"""Image prompts: IP-Adapter, InstantID and PuLID, whose nodes add attention to a picture's keys and values to that to the prompt.

Their arithmetic of weights, masks and scalings is not repeated here: each patch is asked at its place, for rows and tokens as they
will be, which keys and values it attends to, and how much of the outcome it adds to each token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ...parallel_backend.errors import UnsupportedError
from ...parallel_backend.rpc.extras import AnyExtra, ImagePrompt, ImagePromptForm, PlaceName
from .asked_patch import Heard, heard, part_of
from .cross_attentions import CrossAttention, cross_attentions
from .image_prompt_check import gives_the_same
from .image_prompt_tensors import prompt_of
from .kept_extras import kept_extras
from .pack_version import pack_and_version
from .patches import Call, Kind, Patch
from .refusal import LOCALLY, MISFITS
from .unet_places import places_of

# By the name of the class: what it holds one of for each picture. The packs' forks have the same names in other folders.
_FIELDS = {"Attn2Replace": ("callback", "kwargs"), "CrossAttentionPatch": ("scales", "instantIds", "conds")}
_CALLBACKS = ("ipadapter_attention", "instantid_attention", "pulid_attention")
_RANGE = ("sigma_start", "sigma_end")
# PuLID's settings that make its output another than attention times a number, the one that goes first first.
_FORMS: Mapping[str, ImagePromptForm] = {"ortho": "orthogonal", "ortho_v2": "partly_orthogonal"}
# Of the transformer options what a patch is not told: the others, and of which step it is, by which an answer would hold there alone.
_UNTOLD = ("patches", "patches_replace", "sigmas", "sample_sigmas")
_OTHER_ADAPTER = f"Choose an adapter for this model, or another version of that pack; or {LOCALLY}."


def _knows(patch: Patch) -> bool:
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


@dataclass(frozen=True)
class _Picture:
    """One picture of a patch: the patch with it alone, in its plain form, and when and in which form it acts."""

    plain: Any
    form: ImagePromptForm = "added"
    start: float | None = None
    end: float | None = None


def _pictures(patch: Any) -> list[_Picture]:
    """In the order in which they are added. A patch without callbacks adds all of its own as it likes."""
    if not hasattr(patch, "callback"):
        return [_Picture(patch)]
    found = []
    for number, kwargs in enumerate(patch.kwargs):
        form = next((form for name, form in _FORMS.items() if kwargs.get(name)), "added")
        plain = part_of(patch, number, **{name: False for name in _FORMS if name in kwargs})
        found.append(_Picture(plain, form, *(float(kwargs[name]) for name in _RANGE)))
    return found


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    """Those that act at some step. For the same patches they are the same objects, whose tensors are sent once."""
    # Nodes that hang one more picture add it to the patch that is there.
    counts = tuple(len(getattr(p.function, _FIELDS[type(p.function).__qualname__][0])) for p in patches)
    of = (counts, call.shape, call.branches, call.sigma is None)
    return kept_extras(patches, call, of, lambda: _translated(patches, call))


def _translated(patches: Sequence[Patch], call: Call) -> list[ImagePrompt[Tensor]]:
    """Raises: UnsupportedError: an adapter for other models, or a version that does something else."""
    at = {place: patch.function for patch in patches for place in places_of(patch, call)}
    attentions = cross_attentions(call.network, *call.shape[2:])
    asked = [_Asked(at[place], attended, call) for place, attended in attentions.items() if place in at]
    # A place with few tokens for each picture: what is right there is right elsewhere.
    smallest: dict[int, _Asked] = {}
    for one in sorted(asked, key=lambda one: one.at.tokens):
        smallest |= {number: one for number in one.adding if number not in smallest}
    for one in {id(one): one for one in smallest.values()}.values():
        one.check()
    found: dict[Any, list[tuple[PlaceName, Heard]]] = defaultdict(list)
    for one in asked:
        for number, (picture, attentions_added) in enumerate(one.pictures):
            for turn, added in enumerate(attentions_added):
                found[number, turn, picture.form, picture.start, picture.end].append((one.at.place, added))
    made = []
    for number, turn, form, start, end in sorted(found, key=lambda key: key[:2]):
        if start is not None and start < end:
            continue  # at no step
        settings = {"form": form, "start": start, "end": end}
        of_picture = found[number, turn, form, start, end]
        made.append(prompt_of(of_picture, call.layout, call.dtype, **settings))
    return [prompt for prompt in made if prompt is not None]


class _Asked:
    """What a patch says of one place.

    Raises: UnsupportedError: it doesn't fit there, or does something else than attend to a picture.
    """

    def __init__(self, patch: Any, at: CrossAttention, call: Call) -> None:
        self.patch, self.at, self._rows = patch, at, call.shape[0]
        others = {key: value for key, value in call.options.items() if key not in _UNTOLD}
        rows = {"cond_or_uncond": list(call.layout), "original_shape": list(call.shape)}
        self._options = others | rows | at.options
        with torch.inference_mode():
            self.pictures = [(picture, self._heard(picture)) for picture in _pictures(patch)]

    @property
    def adding(self) -> list[int]:
        """The pictures that add something here."""
        return [number for number, (_, added) in enumerate(self.pictures) if added]

    def _heard(self, picture: _Picture) -> Sequence[Heard]:
        given = picture.plain.kwargs[0].get("cond") if hasattr(picture.plain, "kwargs") else picture.plain.conds[0]
        q = torch.zeros(1, 1, 1, device=getattr(given, "device", None)).expand(
            self._rows, self.at.tokens, self.at.width
        )
        try:
            found = heard(picture.plain, q, self._options)
        except UnsupportedError as error:
            raise UnsupportedError(f"{self._told}: {error.message}", error.remedy) from error
        except MISFITS as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            what = f"{type(error).__name__}: {str(error)[:200]}"
            raise UnsupportedError(f"{self._told} can't be computed: {what}.", _OTHER_ADAPTER) from error
        if found is None:
            raise self._unknown()
        return found

    def check(self) -> None:
        """Raises: UnsupportedError: what the patch gives is not what it said."""
        pictures = [(picture.form, added) for picture, added in self.pictures]
        with torch.inference_mode():
            if not gives_the_same(self.patch, pictures, self.at, self._rows, self._options):
                raise self._unknown()

    @property
    def _told(self) -> str:
        kind = type(self.patch)
        return (
            f"An image prompt ({kind.__qualname__} of {pack_and_version(kind)}) at {' '.join(map(str, self.at.place))}"
        )

    def _unknown(self) -> UnsupportedError:
        what = "is of a version that is not known: it does something else than attend to a picture's keys and values."
        return UnsupportedError(f"{self._told} {what}", f"Use another version of that pack, or {LOCALLY}.")


KIND = Kind(_knows, _extras)
