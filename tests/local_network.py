"""A model of a file in its mesh, or a ControlNet beside one, as the engine makes it, without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel_backend.distributed.mesh import Mesh
from parallel_backend.models.checkpoint import load_parameters
from parallel_backend.models.controls import open_control
from parallel_backend.models.families import open_model
from parallel_backend.models.left_over import left_over_note
from parallel_backend.models.network import Network
from parallel_backend.models.residuals import Residuals
from parallel_backend.models.unet_control import BandControlNet, loadable_unet_control
from parallel_backend.models.unet_control_checkpoint import open_unet_control

CPU = torch.device("cpu")


def local_network(path: Path, mesh: Mesh, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Network:
    opened = open_model(path)
    with torch.device("meta"):
        model = opened.build(mesh, "native")
    load_parameters(model, opened.source, device=device, dtype=dtype, unread=opened.unread(model))
    return opened.network(model, mesh, "native", device, dtype)


def local_control(path: Path, base: Network, mesh: Mesh, dtype: torch.dtype = torch.float32) -> Any:
    """No Control-LoRA, which alone asks for the base's weights."""
    weights: Any = None
    opened = open_control(path, base, weights)
    with torch.device("meta"):
        module = opened.build(mesh, "native")
    load_parameters(module, opened.source, device=CPU, dtype=dtype, unread=opened.unread)
    assert not left_over_note({*dict(module.named_parameters()), *opened.unread}, opened.source.names(), path.name)
    return opened.network(module, mesh, "native", CPU, dtype)


def local_unet_control(path: Path, mesh: Mesh) -> BandControlNet:
    """Beside no model."""
    source, config = open_unet_control(path)
    with torch.device("meta"):
        module = loadable_unet_control(config, mesh)
    load_parameters(module, source, device=CPU, dtype=torch.float32)
    return BandControlNet(module, config, mesh, "native")


def evaluated(network: Network, x: Tensor, timesteps: Tensor, context: Tensor, pooled: Tensor, *step: Any) -> Tensor:
    """An evaluation, and what it takes from the prompt made for it. `step`: and residuals."""
    return network(x, timesteps, network.prepare(context, pooled), *step)


def control_residuals(
    control: Any, x: Tensor, timesteps: Tensor, context: Tensor, pooled: Tensor, *hint_and_step: Any
) -> Residuals:
    """What a ControlNet adds, as `evaluated`."""
    return control(x, timesteps, control.prepare_prompt(context, pooled), *hint_and_step)
