"""Which model a file holds, and how it is built: the one list of families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..distributed.mesh import Mesh
from ..errors import CheckpointError
from ..safetensors_file import PICKLED
from .checkpoint import SafetensorsSource, TensorSource
from .from_scratch import FromScratch, GridPositions
from .from_scratch_file import from_scratch_config, is_from_scratch, open_from_scratch
from .mmdit import MMDiT
from .mmdit_checkpoint import POS_EMBED, PositionTable, mmdit_config, open_mmdit


class Positions(Protocol):
    """What a model is told of the places of this rank's image tokens."""

    def rows(self, model: Any, height: int, width: int) -> Tensor: ...


@dataclass(frozen=True)
class LatentScale:
    """Between a VAE's latent and the model's: (latent - shift) * scale."""

    scale: float
    shift: float


# Sources: the configurations of SD3's and of FLUX's VAE; from-scratch models add the shift after the scale.
SD3_SCALE = LatentScale(1.5305, 0.0609)
FROM_SCRATCH_SCALE = LatentScale(0.3611, -0.1159 / 0.3611)


@dataclass(frozen=True)
class OpenedModel:
    """A file that was recognised. `lazy` names tensors that are read when they are needed."""

    source: TensorSource
    config: Any
    build: Callable[[Mesh, str], nn.Module]
    positions: Callable[[torch.device, torch.dtype], Positions]
    scale: LatentScale
    lazy: frozenset[str] = frozenset()


def open_model(path: Path) -> OpenedModel:
    """Raises: CheckpointError, UnsupportedError: the file holds something else; the message says what."""
    if path.suffix in PICKLED or (path.is_file() and is_from_scratch(SafetensorsSource(path))):
        return _open_from_scratch(path)
    source = open_mmdit(path)
    config = mmdit_config(source)
    return OpenedModel(
        source,
        config,
        lambda mesh, kernel: MMDiT(config, mesh, kernel),
        lambda device, dtype: PositionTable(source, config.pos_embed_size, device, dtype),
        SD3_SCALE,
        frozenset({POS_EMBED}),
    )


def _open_from_scratch(path: Path) -> OpenedModel:
    source = open_from_scratch(path)
    if not is_from_scratch(source):
        raise CheckpointError(
            f"{path.name} is a pickle of another model than SD3 from scratch.", "Use the .safetensors file of it."
        )
    config = from_scratch_config(source)
    return OpenedModel(
        source,
        config,
        lambda mesh, kernel: FromScratch(config, mesh, kernel),
        lambda device, dtype: GridPositions(device),
        FROM_SCRATCH_SCALE,
    )
