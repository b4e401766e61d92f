"""CLIP text encoders of the true widths with three layers, in files that take little disk: weights are zero where a hole will do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

HALF = 2  # bytes
LAYERS = 3


def write_clip(path: Path, *, width: int, known_by: int = 1, seed: int = 0) -> Path:
    """clip_l is 768 wide, clip_g 1280. Layers add nothing; tokens keep their embeddings.

    Args:
        known_by: the layer of which ComfyUI looks for a weight, to tell clip_g (30) from the others.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    shapes = _shapes(width, LAYERS) | {f"text_model.encoder.layers.{known_by}.mlp.fc1.weight": [4 * width, width]}
    header: dict[str, dict[str, Any]] = {}
    offset = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * HALF
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        begin = file.tell()
        file.truncate(begin + offset)
        for name, shape in shapes.items():
            if "embedding.weight" in name:
                data = torch.randn(shape, generator=generator).mul_(0.02)
            elif "layer_norm" in name and name.endswith("weight"):
                data = torch.ones(shape)
            else:
                continue
            file.seek(begin + header[name]["data_offsets"][0])
            file.write(data.half().numpy().tobytes())
    return path


def _shapes(width: int, layers: int) -> dict[str, list[int]]:
    shapes = {
        "text_model.embeddings.token_embedding.weight": [49408, width],
        "text_model.embeddings.position_embedding.weight": [77, width],
        "text_model.final_layer_norm.weight": [width],
        "text_model.final_layer_norm.bias": [width],
        "text_projection.weight": [width, width],
    }
    for layer in range(layers):
        at = f"text_model.encoder.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{at}.self_attn.{part}.weight": [width, width], f"{at}.self_attn.{part}.bias": [width]}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{at}.{norm}.weight": [width], f"{at}.{norm}.bias": [width]}
        shapes |= {f"{at}.mlp.fc1.weight": [4 * width, width], f"{at}.mlp.fc1.bias": [4 * width]}
        shapes |= {f"{at}.mlp.fc2.weight": [width, 4 * width], f"{at}.mlp.fc2.bias": [width]}
    return shapes
