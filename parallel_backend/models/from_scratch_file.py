"""Files of "Stable Diffusion 3 from scratch": `model_ema_*.pkl` with its `model_params_*.json`, or what `convert` made.

A pickle is opened by torch's weights-only reader, which builds tensors and runs nothing.
"""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint_files.diffusion_part import FROM_SCRATCH_MARK
from ..checkpoint_files.safetensors_file import PICKLED, check_stamp, safetensors_header, stamp
from ..distributed.tensor_parallel import Shard
from ..errors import CheckpointError, UnsupportedError
from .checkpoint import SafetensorsSource, TensorSource
from .from_scratch import FromScratchConfig

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


class PickleSource:
    """The tensors of a weights-only pickle, mapped and read in parts."""

    def __init__(self, path: Path) -> None:
        """Raises: CheckpointError: damaged, or a pickle that wants to run code."""
        self.path, self._stamp = path, stamp(path)
        self.bytes_read = 0
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            words = str(error).splitlines()[0]
            raise CheckpointError(
                f"{path.name} is a pickle of more than tensors, and opening it would run code ({words}).",
                "Don't trust it; get the model's own file.",
            ) from None
        except (RuntimeError, OSError, EOFError, KeyError) as error:
            raise CheckpointError(f"{path.name} can't be read: {error}.", "Download it again.") from None
        if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
            raise CheckpointError(f"{path.name} holds no table of tensors.", "Use model_ema_*.pkl.")
        # Files of a distributed run have its wrapper's name in front.
        self._tensors: dict[str, Tensor] = {name.removeprefix("module."): t for name, t in loaded.items()}

    def check_unchanged(self) -> None:
        check_stamp(self.path, self._stamp)

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def held_bytes(self, name: str, shard: Shard | None) -> int | None:
        return None

    def read(self, name: str, shard: Shard | None = None) -> Tensor:
        whole = self._tensors[name]
        parts = [whole] if shard is None else [whole.narrow(shard.dim, a, b - a) for a, b in shard.ranges]
        self.bytes_read += sum(part.numel() * part.element_size() for part in parts)
        return parts[0] if len(parts) == 1 else torch.cat(parts, shard.dim if shard else 0)


def is_from_scratch(source: TensorSource) -> bool:
    return FROM_SCRATCH_MARK in source.names()


def params_of(path: Path) -> dict[str, Any]:
    """The model's settings: of a pickle from the JSON file beside it, of a safetensors file from its header.

    Raises: CheckpointError: they are not there.
    """
    if path.suffix in PICKLED:
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
    source = PickleSource(path)
    if not is_from_scratch(source):
        raise CheckpointError(f"{path.name} is no from-scratch SD3 model.", "Use its model_ema_*.pkl.")
    from_scratch_config(source)
    tensors = {name: source.read(name).contiguous().clone() for name in source.names()}
    save_file(tensors, to, metadata={"format": "pt", PARAMS: json.dumps(params_of(path))})


def open_from_scratch(path: Path) -> TensorSource:
    return PickleSource(path) if path.suffix in PICKLED else SafetensorsSource(path)
