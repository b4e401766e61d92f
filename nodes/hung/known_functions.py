"""Functions of ComfyUI's own nodes that act between evaluations, and that the backend's loop has: by their node, and its settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .patches import origin

# By the option that the node sets: its origin's beginning, and what `RemoteModel.sample` calls its setting, as the node's function has it.
_KNOWN = {
    "sampler_cfg_function": ("nodes_model_advanced:RescaleCFG.", {"rescale_cfg": "multiplier"}),
    "denoise_mask_function": (
        "nodes_differential_diffusion:DifferentialDiffusion.",
        {"differential": "strength"},
    ),
}


def known_functions(options: Mapping[str, Any], *, is_flow: bool) -> tuple[dict[str, float], dict[str, Any]]:
    """Settings of the backend's loop, and the options that these stand for no more.

    Args:
        is_flow: of the model whose steps they act on.
    """
    settings: dict[str, float] = {}
    others = dict(options)
    for option, (node, named) in _KNOWN.items():
        function: Any = options.get(option)
        if function is None or not origin(function).startswith(node):
            continue
        made_with = closed_over(function)
        if option == "sampler_cfg_function" and made_with.get("is_flow", False) != is_flow:
            continue  # made for the other kind of models; older cores' is for all, and not the backend's on flow models
        values = {name: made_with.get(theirs, -1.0) for name, theirs in named.items()}
        if all(0 <= value <= 1 for value in values.values()):
            settings |= {name: float(value) for name, value in values.items()}
            del others[option]
    return settings, others


def closed_over(function: Callable[..., Any]) -> dict[str, Any]:
    """What a function made inside another has of it, by name."""
    cells = function.__closure__ or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))
