"""Image prompts: IP-Adapter, InstantID and PuLID, whose nodes add attention to a picture's keys and values to that to the prompt.

Their arithmetic of weights, masks and scalings is not repeated here: each patch is asked at its place, for rows and tokens as they
will be, which keys and values it attends to, and how much of the outcome it adds to each token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...parallel_backend.errors import UnsupportedError
from ...parallel_backend.rpc.extras import AnyExtra, ImagePrompt, PlaceName
from .asked_patch import Heard, heard
from .cross_attentions import CrossAttention, cross_attentions
from .image_prompt_check import gives_the_same
from .image_prompt_patches import Picture, count_of, is_image_prompt, pictures_of
from .image_prompt_tensors import prompts_of
from .kept_extras import kept_extras
from .pack_version import pack_and_version
from .patches import Call, Kind, Patch
from .refusal import LOCALLY, MISFITS
from .regional_prompts import prompt_rows, regional_patches
from .unet_places import places_of

# Of the transformer options what a patch is not told: the others, and of which step it is, by which an answer would hold there alone.
_UNTOLD = ("patches", "patches_replace", "sigmas", "sample_sigmas")
_OTHER_ADAPTER = f"Choose an adapter for this model, or another version of that pack; or {LOCALLY}."


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    """Those that act at some step. For the same patches they are the same objects, whose tensors are sent once."""
    regional = regional_patches(call)
    of = (tuple(map(count_of, patches)), call.shape, call.branches, call.sigma is None)
    return kept_extras([*patches, *regional], call, of, lambda: _translated(patches, call))


def _translated(patches: Sequence[Patch], call: Call) -> list[ImagePrompt[Tensor]]:
    """Raises: UnsupportedError: an adapter for other models, or a version that does something else."""
    at = {place: patch.function for patch in patches for place in places_of(patch, call)}
    attentions, rows = cross_attentions(call), prompt_rows(call)
    asked = [_Asked(at[place], attended, call, len(rows)) for place, attended in attentions.items() if place in at]
    # Of places that are alike one with few tokens: what is right there is right in the others.
    smallest: dict[Any, _Asked] = {}
    for one in sorted((one for one in asked if one.adds), key=lambda one: one.at.tokens):
        smallest.setdefault(one.kind, one)
    for one in smallest.values():
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
        made += prompts_of(found[number, turn, form, start, end], rows, call.dtype, **settings)
    return made


class _Asked:
    """What a patch says of one place.

    Raises: UnsupportedError: it doesn't fit there, or does something else than attend to a picture.
    """

    def __init__(self, patch: Any, at: CrossAttention, call: Call, rows: int) -> None:
        self.patch, self.at, self._rows = patch, at, rows
        others = {key: value for key, value in call.options.items() if key not in _UNTOLD}
        evaluated = {"cond_or_uncond": list(call.layout), "original_shape": list(call.shape)}
        self._options = others | evaluated | at.options
        with torch.inference_mode():
            self.pictures = [(picture, self._heard(picture)) for picture in pictures_of(patch)]

    @property
    def adds(self) -> bool:
        """Whether any picture adds something here."""
        return any(added for _, added in self.pictures)

    @property
    def kind(self) -> Any:
        """Equal where the same functions add as many attentions to as many tokens, at the same side of a network, of the same width."""
        added = [(p.function, p.form, tuple(one.k.shape[1] for one in added)) for p, added in self.pictures]
        return self.at.place[0], self.at.width, self.at.heads, tuple(added)

    def _heard(self, picture: Picture) -> Sequence[Heard]:
        q = torch.zeros(1, 1, 1, device=picture.device).expand(self._rows, self.at.tokens, self.at.width)
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


KIND = Kind(is_image_prompt, _extras)
