"""A job that tests of the backend give it, and how they wait."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from parallel_backend import Conditioning, RemoteModel
from parallel_backend.small_checkpoints.prompts import random_prompt

POSITIVE, NEGATIVE = Conditioning(*random_prompt(1, 154)), Conditioning(*random_prompt(2, 77))
EMPTY = torch.zeros(1, 16, 16, 16)


def sample(model: RemoteModel, **settings: object) -> Tensor:
    return model.sample(EMPTY, POSITIVE, NEGATIVE, **{"seed": 1, "steps": 3} | settings)  # type: ignore[arg-type]


def wait_until(what: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)
