"""A model of a file in its mesh, as the engine makes it, without an engine."""

from __future__ import annotations

from pathlib import Path

import torch

from parallel_backend.distributed.mesh import Mesh
from parallel_backend.models.checkpoint import load_parameters
from parallel_backend.models.families import open_model
from parallel_backend.models.network import Network

CPU = torch.device("cpu")


def local_network(path: Path, mesh: Mesh, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Network:
    opened = open_model(path)
    with torch.device("meta"):
        model = opened.build(mesh, "native")
    load_parameters(model, opened.source, device=device, dtype=dtype, unread=opened.unread(model))
    return opened.network(model, mesh, "native", device, dtype)
