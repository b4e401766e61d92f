"""Evaluations that a MODEL's guidance functions make beside the sampler's, tried before the first: what can't be honoured is refused there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...parallel_backend.rpc.extras import LaterEvaluation
from .kinds import extras_of, guidance_of
from .patches import Call, Hung

# Of a MODEL's options, those that hold functions which evaluate it: one, or a list of them.
_FUNCTIONS = ("sampler_post_cfg_function", "sampler_pre_cfg_function", "sampler_calc_cond_batch_function")
# Whose generators a device has one of each.
_DRAWING = ("cuda", "xpu")


def hung_by_functions(options: Mapping[str, Any]) -> list[Hung]:
    """What those of a MODEL's options hang that are known, and that do hang something."""
    held = [options.get(name) for name in _FUNCTIONS]
    functions = [function for one in held for function in (one if isinstance(one, list | tuple) else [one])]
    known = [(function, guidance_of(function)) for function in functions if function is not None]
    found = [guidance.hangs(function) for function, guidance in known if guidance is not None]
    return [hung for hung in found if hung is not None]


def later_evaluations(untried: Sequence[Hung], call: Call) -> list[LaterEvaluation]:
    """What ranks will be told of the first evaluation with each of these, beside what hangs in `call`, which is the sampling's first.

    Raises: UnsupportedError, InputError: a patch that can't be honoured there.
    """
    evaluations = [one for hung in untried if (one := _first_with(hung, call)) is not None]
    if not evaluations:
        return []
    device = torch.device(call.device)
    generators = {"devices": [device], "device_type": device.type} if device.type in _DRAWING else {"devices": []}
    # What kinds draw by chance, they will draw then.
    with torch.random.fork_rng(**generators):  # type: ignore[arg-type]
        return [LaterEvaluation(extras_of(one), [*one.branches]) for one in evaluations]


def _first_with(hung: Hung, call: Call) -> Call | None:
    """The first evaluation with that, as if it were of all rows of this one, by which options may hold what they tell; None where there is
    none, or nobody knows when.
    """
    if call.sigma is None:
        return None
    scheduled = (sigma for sigma in map(float, call.options.get("sample_sigmas", ())) if sigma > 0)
    start = min(hung.start, call.sigma)
    sigma = next((sigma for sigma in (call.sigma, *scheduled) if hung.end <= sigma <= start), None)
    if sigma is None:
        return None
    options = hung.beside(call.options) | {"sigmas": torch.full_like(call.options["sigmas"], sigma)}
    return replace(call, sigma=sigma, rehearsed=(start, max(hung.end, 0.0)), options=options)
