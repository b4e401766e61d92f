"""Which ControlNet a file holds, and how it is built beside the model that it is for: the one list of their kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..distributed.mesh import Mesh
from .checkpoint import TensorSource
from .control_use import ControlNetwork
from .network import Network


@dataclass(frozen=True)
class OpenedControl:
    """A ControlNet's file that was recognised, for a model.

    Args:
        build: (mesh, kernel) -> a module without weights, whose names are those of `source`.
        network: (that module with its weights, the model's network, mesh, kernel, device, dtype) -> what is asked.
        repeated: the block that most of it is made of.
    """

    source: TensorSource
    config: Any
    build: Callable[[Mesh, str], nn.Module]
    network: Callable[[Any, Network, Mesh, str, torch.device, torch.dtype], ControlNetwork]
    repeated: type[nn.Module]


def open_control(path: Path, kind: str) -> OpenedControl:
    """The ControlNet at `path`, for a model of that kind: mmdit or unet.

    Raises: CheckpointError, UnsupportedError: the file holds something else, or one of another kind of model; the message says what.
    """
    raise NotImplementedError
