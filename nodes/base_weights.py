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
from ..parallel_backend.checkpoint_files.safetensors_file import PICKLED, check_stamp, stamp
from ..parallel_backend.quantized.whole_file import WholeFile


class BaseWeights(Mapping[str, Tensor]):
    """The values of the diffusion model's tensors. The file's pages are read as they are used, and none is kept.

    Of an MMDiT in diffusers' layout, whose weights ComfyUI joins, all are kept once one was asked for.

    Args:
        unet_config: ComfyUI's, which tells its names of a UNet in diffusers' layout.
    """

    def __init__(self, path: Path, unet_config: Mapping[str, Any]) -> None:
        self.path, self._stamp = path, stamp(path)
        names = [] if path.suffix in PICKLED else list(self._file)
        self._in_file = {name: name for name in names}
        self._is_joined = "transformer_blocks.0.attn.add_q_proj.weight" in self._in_file
        if "down_blocks.0.resnets.0.conv1.weight" in self._in_file:
            ours = comfy.utils.unet_to_diffusers(unet_config)
            self._in_file = {ours[name]: name for name in self._in_file if name in ours}

    @property
    def is_quantised(self) -> bool:
        return self.path.suffix not in PICKLED and self._file.is_quantised

    def __getitem__(self, name: str) -> Tensor:
        """Raises: CheckpointError: the file is not the one any more that it was."""
        check_stamp(self.path, self._stamp)
        return self._joined[name] if self._is_joined else self._file[self._in_file[name]]

    @cached_property
    def _joined(self) -> dict[str, Tensor]:
        return comfy.model_detection.convert_diffusers_mmdit(comfy.utils.load_torch_file(str(self.path)), "")

    @cached_property
    def _file(self) -> WholeFile:
        return WholeFile(self.path, diffusion_prefix(self.path))

    def __iter__(self) -> Iterator[str]:
        return iter(self._joined if self._is_joined else self._in_file)

    def __len__(self) -> int:
        return len(self._joined if self._is_joined else self._in_file)

    def __deepcopy__(self, memo: Any) -> BaseWeights:
        return self
