"""Which ControlNet a file holds, and how it is built beside the model that it is for: the one list of their kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from ..checkpoint_files.header import entries_of
from ..checkpoint_files.unet_control_files import is_control_lora
from ..distributed.mesh import Mesh
from .checkpoint import TensorSource
from .control_lora import open_control_lora
from .control_use import ControlNetwork
from .mmdit import JointBlock
from .mmdit_control import ImageBlock, ImageControl, JointControl, TokenControlNet
from .mmdit_control_checkpoint import check_fits, idle_tensors, open_mmdit_control, positions
from .network import Network, TokenNetwork
from .unet_control import BandControlNet, loadable_unet_control
from .unet_control_checkpoint import open_unet_control


@dataclass(frozen=True)
class OpenedControl:
    """A ControlNet's file that was recognised, for a model.

    Args:
        build: (mesh, kernel) -> a module without weights, whose names are those of `source`.
        network: (that module with its weights, mesh, kernel, device, dtype) -> what is asked. The mesh is the model's.
        repeated: the block that most of it is made of.
        unread: names in the file of tensors that a rank doesn't read when it loads.
        is_of_weights: it is made of the model's own weights, as its file has them: patches on these are not in it.
    """

    source: TensorSource
    build: Callable[[Mesh, str], nn.Module]
    network: Callable[[Any, Mesh, str, torch.device, torch.dtype], ControlNetwork]
    repeated: type[nn.Module]
    unread: frozenset[str] = frozenset()
    is_of_weights: bool = False


def open_control(path: Path, model: Network, weights: TensorSource) -> OpenedControl:
    """The ControlNet at `path`, for that model.

    Args:
        weights: the model's, as its file has them.
    Raises: CheckpointError: the file is not whole, or holds something else. UnsupportedError: a ControlNet of another kind, or of
        another model; the message says which.
    """
    return _of_transformer(path, model) if isinstance(model, TokenNetwork) else _of_unet(path, model, weights)


def _of_unet(path: Path, unet: Network, weights: TensorSource) -> OpenedControl:
    source: TensorSource
    of_weights = is_control_lora(entries_of(path))
    if of_weights:
        source, config = open_control_lora(path, weights, unet.config)
    else:
        source, config = open_unet_control(path)
        config.check_fits(unet.config, path.name)
    return OpenedControl(
        source,
        lambda mesh, kernel: loadable_unet_control(config, mesh),
        lambda module, mesh, kernel, device, dtype: BandControlNet(module, config, mesh, kernel),
        BasicTransformerBlock,
        is_of_weights=of_weights,
    )


def _of_transformer(path: Path, network: TokenNetwork) -> OpenedControl:
    source, config = open_mmdit_control(path)
    check_fits(config, network.config, path.name)
    base: Any = network.model
    return OpenedControl(
        source,
        lambda mesh, kernel: (ImageControl if config.image_only else JointControl)(config, mesh),
        lambda module, mesh, kernel, device, dtype: TokenControlNet(
            module, mesh, kernel, device, dtype, base, positions(source, config, device, dtype)
        ),
        ImageBlock if config.image_only else JointBlock,
        idle_tensors(source, config),
    )
