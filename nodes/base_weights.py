"""The weights of a checkpoint under ComfyUI's names, mapped: what ComfyUI's own patching code starts from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.utils
from torch import Tensor

from ..parallel_backend.checkpoint_files.diffusion_part import diffusion_prefix
from ..parallel_backend.checkpoint_files.header import entries_of
from ..parallel_backend.quantized.whole_file import WholeFile


class BaseWeights(Mapping[str, Tensor]):
    """The values of the diffusion model's tensors in its file or files. Their pages are read as they are used, and none is kept.

    Of an MMDiT in diffusers' layout, whose weights ComfyUI joins, all are kept once one was asked for.

    Args:
        unet_config: ComfyUI's, which tells its names of a UNet in diffusers' layout.
    """

    def __init__(self, path: Path, unet_config: Mapping[str, Any]) -> None:
        self._tensors = WholeFile(path, diffusion_prefix(entries_of(path)))
        self._in_file = {name: name for name in self._tensors}
        self._is_joined = "transformer_blocks.0.attn.add_q_proj.weight" in self._in_file
        if "down_blocks.0.resnets.0.conv1.weight" in self._in_file:
            ours = comfy.utils.unet_to_diffusers(unet_config)
            self._in_file = {ours[name]: name for name in self._in_file if name in ours}

    @property
    def is_quantised(self) -> bool:
        return self._tensors.is_quantised

    def __getitem__(self, name: str) -> Tensor:
        """Raises: CheckpointError: the file is not the one any more that it was."""
        return self._joined[name] if self._is_joined else self._tensors[self._in_file[name]]

    @cached_property
    def _joined(self) -> dict[str, Tensor]:
        tensors = {name: self._tensors[in_file] for name, in_file in self._in_file.items()}
        return comfy.model_detection.convert_diffusers_mmdit(tensors, "")

    def __contains__(self, name: object) -> bool:
        """Without reading the weight."""
        return name in (self._joined if self._is_joined else self._in_file)

    def __iter__(self) -> Iterator[str]:
        return iter(self._joined if self._is_joined else self._in_file)

    def __len__(self) -> int:
        return len(self._joined if self._is_joined else self._in_file)

    def __deepcopy__(self, memo: Any) -> BaseWeights:
        return self
