"""All kinds of patches that become extras, and what a MODEL's options come to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ...parallel_backend.rpc.extras import AnyExtra
from . import (
    advanced_free_u,
    automatic_cfg,
    deep_shrink,
    free_u,
    hyper_tile,
    image_prompt,
    joint_image_prompt,
    nag_guider,
    normalized_attention,
    normalized_prompt,
    perturbed_attention,
    rau_net,
    regional_prompts,
    self_attention_guidance,
    shared_attention,
    shared_norms,
    shifted_windows,
    shuffled_tokens,
    skip_layers,
    smoothed_energy,
    sparse_attention,
    t_gate,
    token_merging,
)
from .core_step_caches import is_step_cache
from .forward_options import FORWARD_OPTIONS, OF_OTHER_FAMILIES
from .patches import FORWARD, Call, Guidance, Kind, Patch, forwards_in, origin, patches_in
from .refusal import is_set

KINDS: tuple[Kind, ...] = (
    skip_layers.KIND,
    perturbed_attention.KIND,
    joint_image_prompt.KIND,
    image_prompt.KIND,
    smoothed_energy.KIND,
    regional_prompts.KIND,
    self_attention_guidance.KIND,
    normalized_attention.KIND,
    normalized_prompt.KIND,
    nag_guider.KIND,
    hyper_tile.KIND,
    free_u.KIND,
    advanced_free_u.KIND,
    deep_shrink.KIND,
    rau_net.KIND,
    shifted_windows.KIND,
    token_merging.KIND,
    shared_attention.KIND,
    shared_norms.KIND,
    t_gate.KIND,
    sparse_attention.KIND,
    shuffled_tokens.KIND,
)
_OPTIONS = frozenset(kind.option for kind in KINDS if kind.option is not None)
_KNOWN_OPTIONS = FORWARD_OPTIONS | OF_OTHER_FAMILIES | _OPTIONS | {"patches", "patches_replace"}
# What only a UNet's network asks for, and what only a transformer's does: on the other, a patch has no effect, as in ComfyUI.
_OF_TRANSFORMERS = ("dit", "dit_forward")


def unknown_patches(options: Mapping[str, Any]) -> Iterator[str]:
    """Of transformer options what nothing here knows, each by its name."""
    yield from (patch.told for patch in patches_in(options) if _kind_of(patch) is None)
    for key, value in options.items():
        known = key in _KNOWN_OPTIONS or is_step_cache(key, value) or any(kind.told(key, options) for kind in KINDS)
        if not known and is_set(value):
            yield f"transformer option {key!r}"


def extras_of(call: Call) -> list[AnyExtra]:
    """What the ranks do in place of the patches in a call's options, in the order in which these hang.

    Raises: UnsupportedError, InputError: a patch that can't be honoured.
    """
    return [extra for number, patches in _by_kind(call).items() for extra in KINDS[number].extras(patches, call)]


def give_reports(call: Call, extras: Sequence[AnyExtra], reports: Sequence[Tensor], latent: Tensor) -> None:
    """What those extras report of a call's rows, to the patches that ask for it."""
    reporting = [extra for extra in extras if extra.reports]
    if not reporting:
        return
    for number, patches in _by_kind(call).items():
        for extra, report in zip(reporting, reports, strict=True):
            if (take := KINDS[number].reported.get(type(extra))) is not None:
                take(patches, call, report, latent)


def step_by_step(options: Mapping[str, Any]) -> Iterator[str]:
    """Which of the patches in transformer options can't be had for a whole sampling at once, each by its name."""
    for patch in patches_in(options):
        if (kind := _kind_of(patch)) is not None:
            yield from kind.step_by_step(patch)
    yield from (f"transformer option {key!r}" for key in _OPTIONS if is_set(options.get(key)))


def _by_kind(call: Call) -> dict[int, list[Patch]]:
    """Patches that the call's network asks for, by the number of their kind; none of a kind that an option asks for."""
    found: dict[int, list[Patch]] = {}
    for patch in (*patches_in(call.options), *forwards_in(call.network)):
        kind = _kind_of(patch)
        if kind is not None and (patch.kind in _OF_TRANSFORMERS) != call.is_unet:
            found.setdefault(KINDS.index(kind), []).append(patch)
    for number, kind in enumerate(KINDS):
        if kind.option is not None and is_set(call.options.get(kind.option)):
            found.setdefault(number, [])
    return found


def guidance_of(function: Any) -> Guidance | None:
    """Of a guidance function that hangs patches; None where no kind knows it."""
    known = (automatic_cfg.FUNCTIONS, *(kind.functions for kind in KINDS))
    found = (functions.get(origin(function)) for functions in known)
    return next((guidance for guidance in found if guidance is not None), None)


def is_known_change(attribute: str, value: Any) -> bool:
    """Whether what a node has put on a layer of the network is what a kind knows."""
    is_patch = attribute == FORWARD and _kind_of(Patch(FORWARD, None, value)) is not None
    return is_patch or any(kind.left(attribute, value) for kind in KINDS)


def _kind_of(patch: Patch) -> Kind | None:
    return next((kind for kind in KINDS if kind.knows(patch)), None)
