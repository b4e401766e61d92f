"""Automatic CFG, of the pack ComfyUI-AutomaticCFG: a guidance function that patches attentions only where one of its experiments does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .patches import Guidance, closed_over
from .refusal import module_of

_FUNCTION = "nodes:advancedDynamicCFG.patch.<locals>.automatic_cfg_function"
_EXPERIMENTS = ("cond_exp", "uncond_exp", "fake_uncond_exp")
# Of an experiment's methods, those that evaluate the model once more, with other attentions.
_PATCHING = "attention_modifiers_input"


def _refused(function: Any, _: Any) -> Iterator[str]:
    settings = closed_over(function)
    told = f"{function.__qualname__} of {module_of(function)}"
    for experiment in _EXPERIMENTS:
        method = settings.get(f"{experiment}_method")
        if not isinstance(method, str) or experiment not in settings:
            yield f"{told}, of a version without {experiment}"
        elif settings[experiment] and _PATCHING in method:
            yield f"{told} with {experiment} by {method}, which patches blocks of the model"


FUNCTIONS = {_FUNCTION: Guidance(hangs=lambda _: None, refused=_refused)}
