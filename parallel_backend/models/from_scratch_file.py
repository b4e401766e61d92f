"""Files of "Stable Diffusion 3 from scratch": `model_ema_*.pkl` with its `model_params_*.json`, or what `convert` made.

A pickle is opened by torch's weights-only reader, which builds tensors and runs nothing.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ..checkpoint_files.diffusion_part import FROM_SCRATCH_MARK
from ..checkpoint_files.pickled_file import is_pickled
from ..checkpoint_files.safetensors_file import safetensors_header
from ..errors import CheckpointError, UnsupportedError
from .checkpoint import TensorSource
from .from_scratch import FromScratchConfig
from .opened_file import open_diffusion

PARAMS = "model_params"
# What these files may say of kinds, and what of it is built here.
_KINDS = {
    "attn_type": ("softmax", "softmax_flash"),
    "MLP_type": ("swiglu", "swiglu_old", "gelu"),
    "positional_encoding": ("RoPE2d", "NoPE"),
    "kv_merge_attn": (False,),
    "qk_half_dim": (False,),
    "text_loss": (False,),
}
_DEFAULTS = {"MLP_type": "swiglu_old", "text_loss": False, "kv_merge_attn": False, "qk_half_dim": False}


def params_of(path: Path) -> dict[str, Any]:
    """The model's settings: of a pickle from the JSON file beside it, of a safetensors file from its header.

    Raises: CheckpointError: they are not there.
    """
    if is_pickled(path):
        beside = path.with_name(re.sub(r"^model(_ema)?", PARAMS, path.stem) + ".json")
        if not beside.is_file():
            raise CheckpointError(f"{path.name} needs {beside.name} beside it.", "Download both.")
        text = beside.read_text()
    else:
        text = safetensors_header(path).get("__metadata__", {}).get(PARAMS, "")
    try:
        params = json.loads(text)
    except ValueError:
        raise CheckpointError(
            f"The model's settings for {path.name} can't be read.", "Convert it again from its .pkl and .json."
        ) from None
    return _DEFAULTS | params


def from_scratch_config(source: TensorSource) -> FromScratchConfig:
    """Raises: UnsupportedError: a kind that isn't built here, by its name. CheckpointError: no settings."""
    params = params_of(source.path)
    for name, known in _KINDS.items():
        if params.get(name) not in known:
            raise UnsupportedError(
                f"{source.path.name} has {name}={params.get(name)!r}, which is not supported.",
                f"Supported is {' or '.join(map(repr, known))}.",
            )
    hidden, channels, patch_size, _ = source.shape("pos_enc.proj.weight")
    blocks = [int(match[1]) for name in source.names() if (match := re.match(r"blocks\.(\d+)\.", name))]
    return FromScratchConfig(
        depth=max(blocks) + 1,
        heads=int(params["num_heads"]),
        hidden=hidden,
        mlp_width=int(hidden * params["hidden_scale"]),
        mlp=params["MLP_type"],
        rotary=params["positional_encoding"] == "RoPE2d",
        channels=channels,
        patch_size=patch_size,
        context_width=source.shape("c_proj.weight")[1],
        pooled_width=source.shape("cond_MLP.weight")[1],
    )


def convert(path: Path, to: Path) -> None:
    """Writes a pickle and its settings as one safetensors file, names and values unchanged.

    Raises: CheckpointError, UnsupportedError: as opening it would.
    """
    source = open_diffusion(path)
    if FROM_SCRATCH_MARK not in source.names():
        raise CheckpointError(f"{path.name} is no from-scratch SD3 model.", "Use its model_ema_*.pkl.")
    from_scratch_config(source)
    tensors = {name: source.read(name).contiguous().clone() for name in source.names()}
    save_file(tensors, to, metadata={"format": "pt", PARAMS: json.dumps(params_of(path))})
