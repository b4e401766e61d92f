"""Files of ControlNets for SD3 and SD3.5: which kind they are, and how that is built beside the main model."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, UnsupportedError
from .checkpoint import Piece, RenamedSource, SafetensorsSource, TensorSource
from .control_positions import CentredSines
from .mmdit import HEAD_DIM, MMDiTConfig
from .mmdit_checkpoint import POS_EMBED, PositionTable, diffusers_blocks, diffusers_pieces, mmdit_config
from .mmdit_control import ControlConfig
from .network import Positions
from .opened_file import open_diffusion

CONTROL_TYPE = "control_type"
# Of Stability's kind: diffusers' names, and those that ComfyUI's layers have.
_DIFFUSERS_NAMES = (
    ("time_text_embed.timestep_embedder.linear_1.", "t_embedder.mlp.0."),
    ("time_text_embed.timestep_embedder.linear_2.", "t_embedder.mlp.2."),
    ("time_text_embed.text_embedder.linear_1.", "y_embedder.mlp.0."),
    ("time_text_embed.text_embedder.linear_2.", "y_embedder.mlp.2."),
    ("pos_embed.proj.", "x_embedder.proj."),
)
# How a name begins that tells the kind; the first that fits counts.
_OTHER_CONTROLNETS = (
    ("after_proj_list.", "Hunyuan-DiT"),
    ("double_blocks.0.img_attn.", "Flux"),
    ("controlnet_blocks.0.linear.", "Flux"),
    ("transformer_blocks.0.img_mlp.", "Qwen-Image"),
    ("control_blocks.0.after_proj.", "Qwen-Image"),
    ("controlnet_x_embedder.", "Flux"),
    ("zero_convs.", "a UNet (SDXL, SD1 or SD2)"),
    ("control_model.zero_convs.", "a UNet (SDXL, SD1 or SD2)"),
    ("controlnet_cond_embedding.", "a UNet (SDXL, SD1 or SD2)"),
    ("lora_controlnet", "a UNet (SDXL, SD1 or SD2)"),
)
_REMEDY = "Choose a ControlNet of SD3 or SD3.5: InstantX's kind, or Stability's for SD3.5-Large."


def is_mmdit_control(names: Collection[str]) -> bool:
    """Whether a file of these names is one of the two kinds."""
    found = set(names)
    if not {"controlnet_blocks.0.weight", "pos_embed_input.proj.weight"} <= found:
        return False
    return _is_image_only(found) or {"transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight"} <= found


def open_mmdit_control(path: Path) -> tuple[TensorSource, ControlConfig]:
    """The ControlNet at `path`, under the names of `ControlModel`, and its sizes.

    Raises:
        UnsupportedError: a ControlNet of another family.
        CheckpointError: no ControlNet, or one that isn't whole.
    """
    source = open_diffusion(path)
    names = set(source.names())
    if not is_mmdit_control(names):
        raise _refusal(path, names)
    return _open_image_only(source, names) if _is_image_only(names) else _open_joint(source, names)


def check_fits(config: ControlConfig, base: Any, name: str) -> None:
    """Raises: UnsupportedError: a ControlNet of these sizes is not one of a main model of those."""
    own = config.model
    if not isinstance(base, MMDiTConfig):
        raise UnsupportedError(
            f"{name} is a ControlNet of SD3 or SD3.5; the model is of another family.",
            "Choose an SD3 or SD3.5 model, or a ControlNet of the model's family.",
        )
    pairs = [("width", own.hidden, base.hidden), ("latent channels", own.channels, base.channels)]
    pairs.append(("patch size", own.patch_size, base.patch_size))
    if config.borrowed != "y_embedder":
        pairs.append(("pooled width", own.pooled_width, base.pooled_width))
    if not config.image_only:
        pairs.append(("context width", own.context_width, base.context_width))
    differs = [f"{what} {mine} (the model's is {theirs})" for what, mine, theirs in pairs if mine != theirs]
    if differs:
        raise UnsupportedError(
            f"{name} is a ControlNet of another model than {base.family}: {', '.join(differs)}.",
            "Choose one for this model: SD3-medium and SD3.5-medium have width 1536, SD3.5-large has 2432.",
        )


def positions(
    source: TensorSource, config: ControlConfig, device: torch.device, dtype: torch.dtype
) -> Positions | None:
    """Where a ControlNet's image tokens are; None where it isn't told."""
    if not config.image_only:
        return PositionTable(source, config.model.pos_embed_size, device, dtype)
    return None if config.borrowed == "y_embedder" else CentredSines(config.model.hidden, device, dtype)


def idle_tensors(source: TensorSource, config: ControlConfig) -> frozenset[str]:
    """Those that no rank reads when it loads: the table of positions, and blocks without an effect."""
    if config.image_only:
        return frozenset()
    outs = tuple(f"controlnet_blocks.{i}." for i in range(config.model.depth))
    blocks = [name for name in source.names() if name.startswith(("transformer_blocks.", "controlnet_blocks."))]
    return frozenset({POS_EMBED, *(name for name in blocks if not name.startswith(outs))})


def _is_image_only(names: Collection[str]) -> bool:
    return "transformer_blocks.0.adaLN_modulation.1.bias" in names


def _open_joint(found: TensorSource, names: set[str]) -> tuple[TensorSource, ControlConfig]:
    heads, blocks = found.shape("pos_embed.proj.weight")[0] // HEAD_DIM, diffusers_blocks(names)
    # Source of the count: ComfyUI. SD3's models have as many blocks as heads; their last one is added to by none.
    repeats = [heads // blocks] * (blocks - 1) + [heads // blocks - 1]
    while repeats and repeats[-1] < 1:
        repeats.pop()
    if not repeats:
        raise CheckpointError(
            f"{found.path.name} has {blocks} blocks for a model of {heads}, of which none would have an effect.",
            _REMEDY,
        )
    source = RenamedSource(found, diffusers_pieces(found, len(repeats)))
    hint = source.shape("pos_embed_input.proj.weight")[1]
    return source, ControlConfig(mmdit_config(source), tuple(repeats), hint)


def _open_image_only(found: TensorSource, names: set[str]) -> tuple[TensorSource, ControlConfig]:
    pieces = {_layer_name(name): [Piece(name)] for name in sorted(names - {CONTROL_TYPE})}
    # Where a file has a tensor under both names, that of the layer counts.
    pieces |= {name: [Piece(name)] for name in pieces.keys() & names}
    source = RenamedSource(found, pieces)
    needed = ("y_embedder.mlp.0.weight", "transformer_blocks.0.mlp.fc1.weight")
    if missing := [name for name in needed if name not in pieces]:
        raise CheckpointError(f"{found.path.name} lacks {', '.join(missing)}.", "The file is not whole; get it again.")
    hidden, pooled = source.shape("y_embedder.mlp.0.weight")
    _, hint, patch, _ = source.shape("pos_embed_input.proj.weight")
    blocks, heads = diffusers_blocks(names), hidden // HEAD_DIM
    model = MMDiTConfig(
        family="sd3.5-large",
        depth=blocks,
        heads=heads,
        dual_blocks=(),
        qk_norm=False,
        channels=hint,
        patch_size=patch,
        pos_embed_size=0,  # its positions are computed, for any size
        context_width=0,
        pooled_width=pooled,
        mlp_width=source.shape("transformer_blocks.0.mlp.fc1.weight")[0],
    )
    # Source of the count: ComfyUI.
    repeats = (-(-heads // blocks),) * blocks
    control_type = _control_type(found) if CONTROL_TYPE in names else None
    borrowed = "y_embedder" if hidden == pooled else "x_embedder"
    return source, ControlConfig(model, repeats, hint, True, borrowed, control_type)  # type: ignore[arg-type]


def _control_type(found: TensorSource) -> int:
    """It is stored as an integer or as a float."""
    if isinstance(found, SafetensorsSource):
        return round(found.number(CONTROL_TYPE))
    return round(float(found.read(CONTROL_TYPE).reshape(())))


def _layer_name(name: str) -> str:
    return next(
        (ours + name.removeprefix(theirs) for theirs, ours in _DIFFUSERS_NAMES if name.startswith(theirs)), name
    )


def _refusal(path: Path, names: Collection[str]) -> CheckpointError | UnsupportedError:
    for begin, family in _OTHER_CONTROLNETS:
        if any(name.startswith(begin) for name in names):
            return UnsupportedError(f"{path.name} is a ControlNet of {family}; the model is an SD3 or SD3.5.", _REMEDY)
    if "controlnet_blocks.0.weight" in names and any(re.match(r"transformer_blocks\.0\.norm1\.", n) for n in names):
        return UnsupportedError(
            f"{path.name} is Stability's ControlNet of SD3.5 in diffusers' layout, which ComfyUI doesn't open either.",
            "Use the single file of the same ControlNet, e.g. sd3.5_large_controlnet_canny.safetensors.",
        )
    return CheckpointError(f"{path.name} holds no ControlNet of SD3 or SD3.5.", _REMEDY)
