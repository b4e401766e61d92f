"""Imported by a rank before all else: brings diffusers in without what ranks don't need of it.

diffusers imports transformers and torchvision wherever it finds them. Ranks use neither, they take seconds, and in many
ComfyUI environments one of them doesn't fit the installed torch, which would keep the backend from starting.
xformers is of no use to them either, and diffusers 0.36 goes down where it doesn't fit torch; so are what trains, quantises and
offloads for diffusers: peft imports transformers by itself.
scipy (for schedulers), torch's compiler (for marks on hooks) and bitsandbytes (for quantisers) are not of use to most ranks either:
they are kept out while diffusers is imported, which halves a rank's start, and come when a schedule, a compiled model or a file in
4 bits asks for them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..distributed import kernel_packages  # noqa: F401 - before diffusers

_NEVER = (
    *("transformers", "torchvision", "xformers", "aiter", "peft", "accelerate", "torchao", "optimum", "modelopt"),
    *("auto_round", "sdnq", "flashpack"),
)
_LATER = ("scipy", "torch._dynamo", "bitsandbytes", "gguf")
# What ranks take of diffusers.
_WANTED = (
    "attention_dispatch",
    "unets.unet_2d_condition",
    "autoencoders.autoencoder_kl",
    "autoencoders.autoencoder_tiny",
)


def _unmarked(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
    """What torch.compiler.disable is meanwhile: compiled code of ours never reaches diffusers' hooks."""
    return function if function is not None else _unmarked


@contextmanager
def _kept_out(names: tuple[str, ...]) -> Iterator[None]:
    absent = [name for name in names if name not in sys.modules]
    disable = torch.compiler.disable
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    torch.compiler.disable = _unmarked  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compiler.disable = disable
        for name in absent:
            del sys.modules[name]


for _unused in _NEVER:
    sys.modules.setdefault(_unused, None)  # type: ignore[arg-type]
with _kept_out(_LATER):
    for _name in _WANTED:
        importlib.import_module(f"diffusers.models.{_name}")
