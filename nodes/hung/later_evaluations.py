"""Evaluations that a MODEL's guidance functions make beside the sampler's, tried before the first: what can't be honoured is refused there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import inf
from typing import Any

import torch

from ...parallel_backend.rpc.extras import LaterEvaluation
from .kinds import extras_of, guidance_of
from .patches import Call, Hung

# Of a MODEL's options, those that hold functions which evaluate it: one, or a list of them.
_FUNCTIONS = ("sampler_post_cfg_function", "sampler_pre_cfg_function", "sampler_calc_cond_batch_function")
# Whose generators a device has one of each.
_DRAWING = ("cuda", "xpu")


def guidance_functions(options: Mapping[str, Any]) -> list[Any]:
    """Those of a MODEL's options that hang patches which are known."""
    held = [options.get(name) for name in _FUNCTIONS]
    functions = [function for one in held for function in (one if isinstance(one, list | tuple) else [one])]
    return [function for function in functions if function is not None and guidance_of(function) is not None]


def later_evaluations(functions: list[Any], call: Call) -> list[LaterEvaluation]:
    """What ranks will be told of each function's first evaluation, beside what hangs in `call`, which is the sampling's first.

    Raises: UnsupportedError, InputError: a patch that can't be honoured there.
    """
    device = torch.device(call.device)
    generators = {"devices": [device], "device_type": device.type} if device.type in _DRAWING else {"devices": []}
    # What kinds draw by chance, they will draw then.
    with torch.random.fork_rng(**generators):  # type: ignore[arg-type]
        return [
            LaterEvaluation(extras_of(one), [*one.branches])
            for function in functions
            if (one := _first_of(function, call)) is not None
        ]


def _first_of(function: Any, call: Call) -> Call | None:
    """The first evaluation that it makes of its own, as if it were of all rows of this one, by which options may hold what they tell; None
    where it makes none.
    """
    known = guidance_of(function)
    hung = None if known is None else known.hangs(function)
    sigma = None if hung is None else next(_sigmas(hung, call), None)
    if hung is None or sigma is None:
        return None
    sigmas = call.options.get("sigmas")
    said = {} if sigmas is None else {"sigmas": torch.full_like(sigmas, sigma)}
    between = min(hung.start, call.sigma or inf), max(hung.end, 0.0)
    return replace(call, sigma=sigma, rehearsed=between, options=hung.beside(call.options) | said)


def _sigmas(hung: Hung, call: Call) -> Iterator[float]:
    """Of the schedule's from this evaluation on, those at which it acts."""
    schedule = call.options.get("sample_sigmas")
    now = [] if call.sigma is None else [call.sigma]
    later = [] if schedule is None else [float(sigma) for sigma in schedule if float(sigma) > 0]
    return (sigma for sigma in (*now, *later) if sigma <= min(hung.start, *now) and sigma >= hung.end)
