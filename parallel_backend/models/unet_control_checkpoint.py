"""SDXL ControlNet files: recognised by their names and shapes, in the single-file and in the diffusers layout."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from ..checkpoint_files.header import entries_of
from ..checkpoint_files.unet_control_files import PREFIX, is_control_lora, is_difference, is_unet_control
from ..errors import CheckpointError, UnsupportedError
from .checkpoint import Piece, RenamedSource, TensorSource
from .opened_file import open_source
from .unet_checkpoint import diffusers_name, joined, layers_per_block, unet_sizes
from .unet_control import UNetControlConfig

_ADAPTER_MARKS = ("body.", "adapter.body.")

_FIRST, _LAST = 0, 14  # of input_hint_block's convolutions; between any two is an activation
_TYPES = {
    "task_embedding": "types.task_embedding",
    "control_add_embedding.": "types.embedding.",
    "transformer_layes.0.ln_1.": "types.norm_1.",
    "transformer_layes.0.ln_2.": "types.norm_2.",
    "transformer_layes.0.attn.out_proj.": "types.attention_out.",
    "transformer_layes.0.mlp.c_fc.": "types.mlp_in.",
    "transformer_layes.0.mlp.c_proj.": "types.mlp_out.",
    "spatial_ch_projs.": "types.project.",
}
# Queries, keys and values one under the other.
_IN_PROJECTION = "transformer_layes.0.attn.in_proj_"


def open_unet_control(path: Path) -> tuple[RenamedSource, UNetControlConfig]:
    """The ControlNet at `path` under diffusers' names, queries, keys and values joined, and its sizes.

    Raises: CheckpointError: not a whole ControlNet. UnsupportedError: one of another kind; the message says which.
    """
    names = entries_of(path)
    _refuse_others(names, path.name)
    source = open_source(path, PREFIX if any(name.startswith(PREFIX) for name in names) else "")
    layers = layers_per_block(source)
    by_theirs = {control_name(name, layers): name for name in source.names()}
    pieces = joined({theirs: [Piece(ours)] for theirs, ours in by_theirs.items()})
    for leaf in ("weight", "bias"):
        if (found := by_theirs.get(_IN_PROJECTION + leaf)) is not None:
            third = source.shape(found)[0] // 3
            pieces[f"types.attention_v.{leaf}"] = [Piece(found, 2 * third)]
            del pieces[_IN_PROJECTION + leaf]
    return RenamedSource(source, pieces), _config(by_theirs, source)


def _refuse_others(names: Collection[str], file_name: str) -> None:
    if is_control_lora(names):
        raise UnsupportedError(
            f"{file_name} is a Control-LoRA: it needs the weights of a model under its own.",
            "Use the whole ControlNet that does the same (controlnet-canny-sdxl and others).",
        )
    if is_difference(names):
        raise UnsupportedError(
            f"{file_name} is a DiffControlNet: it has differences from a model's weights.", "Use a whole ControlNet."
        )
    if any(name.startswith(_ADAPTER_MARKS) for name in names):
        raise UnsupportedError(f"{file_name} is a T2I adapter.", "Use a ControlNet that does the same.")
    if not is_unet_control(names):
        raise CheckpointError(f"{file_name} holds no ControlNet of a UNet.", "Choose an SDXL ControlNet.")


def control_name(name: str, layers: int) -> str:
    """diffusers' name, or that of our own module, for a tensor of either layout; `layers` is as `layers_per_block` counts them."""
    for theirs, ours in _TYPES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    if match := re.fullmatch(r"zero_convs\.(\d+)\.0\.(.+)", name):
        return f"controlnet_down_blocks.{match[1]}.{match[2]}"
    if match := re.fullmatch(r"input_hint_block\.(\d+)\.(.+)", name):
        number = int(match[1])
        inner = {_FIRST: "conv_in", _LAST: "conv_out"}.get(number, f"blocks.{number // 2 - 1}")
        return f"controlnet_cond_embedding.{inner}.{match[2]}"
    if name.startswith("middle_block_out.0."):
        return name.replace("middle_block_out.0.", "controlnet_mid_block.")
    return diffusers_name(name, layers)


def _config(names: dict[str, str], source: TensorSource) -> UNetControlConfig:
    sizes = unet_sizes(names, source, "ControlNet", has_output=False)
    if sizes.extra_channels:
        raise UnsupportedError(
            f"{source.path.name} takes {sizes.channels + sizes.extra_channels} channels; a latent has {sizes.channels}.",
            "Use a ControlNet of a text-to-image model.",
        )
    hint, tasks = names.get("controlnet_cond_embedding.conv_in.weight"), names.get("types.task_embedding")
    if hint is None:
        raise CheckpointError(f"{source.path.name} lacks the embedding of its image.", "Get the file again.")
    return UNetControlConfig(
        **vars(sizes) | {"up_depths": ()},
        hint_channels=source.shape(hint)[1],
        control_types=source.shape(tasks)[0] if tasks is not None else 0,
        bare_middle=sizes.mid_depth == 0 and "mid_block.attentions.0.norm.weight" in names,
    )
