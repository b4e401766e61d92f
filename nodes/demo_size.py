"""The size that the demo's models draw, said where one is loaded and where another size fails."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from comfy.patcher_extension import WrapperExecutor
from torch import Tensor

from ..parallel_backend.demo.files import PIXELS, demo_of
from ..parallel_backend.errors import InputError

_SIZE = f"about {PIXELS} x {PIXELS} pixels"


def demo_size(path: Path) -> str:
    """A line for who loads one of the demo's files; empty for all others."""
    return f"a model of the demo, trained at {_SIZE}: take Demo Caption's latent" if demo_of(path) else ""


def tells_demo_size(sample: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An OUTER_SAMPLE wrapper whose refusals of a latent also say which size the demo's model draws, if the latent is of another."""

    @wraps(sample)
    def told(executor: WrapperExecutor, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return sample(executor, noise, *args, **kwargs)
        except InputError as error:
            remote = executor.class_obj.model_patcher.remote
            if demo_of(Path(remote.load.path)) is None or noise.shape[2:] == (PIXELS // 8, PIXELS // 8):
                raise
            remedy = f"{error.remedy} The demo's models are trained at {_SIZE}: take Demo Caption's latent."
            raise InputError(error.message, remedy) from error

    return told
