"""Large safetensors files, written tensor by tensor from the device: no second copy of them in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from parallel_backend.config import MeshSpec
from parallel_backend.distributed.mesh import build_mesh
from parallel_backend.models.mmdit import MMDiT, MMDiTConfig

_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().view(torch.uint8).cpu().numpy().data)


def bytes_of(config: MMDiTConfig, dtype: torch.dtype) -> int:
    """Of a file with this model."""
    with torch.device("meta"):
        model = MMDiT(config, build_mesh(MeshSpec()), "native")
    return (sum(p.numel() for p in model.parameters()) + config.pos_embed_size**2 * config.hidden) * dtype.itemsize
