"""SDXL UNet files: recognised by their names and shapes, in the single-file and in the diffusers layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from ..checkpoint_files.diffusion_part import diffusion_prefix
from ..checkpoint_files.header import entries_of
from ..checkpoint_files.sampling_marks import EDM_PLAIN, EDM_V, V_PREDICTION, ZERO_SNR
from ..config import ContinuousSampling
from ..errors import BackendError, CheckpointError, InputError, UnsupportedError
from ..quantized.whole_file import WholeFile
from .checkpoint import Piece, RenamedSource, TensorSource
from .opened_file import open_source
from .unet import HEAD_DIM, UNetConfig

LATENT_CHANNELS = 4
# (context width, micro-conditioning width) of the families.
_FAMILIES = {(2048, 2816): "sdxl", (1280, 2560): "sdxl-refiner"}
_EDM = "edm_"
# Of Playground 2.5, whose files don't say it, and of CosXL where its file doesn't: ComfyUI's, and the models' own.
_PLAYGROUND = ContinuousSampling("edm", "log", 0.002, 80.0, 0.5)
_SIGMA_MAX, _SIGMA_MIN = 120.0, 0.002

# What LCM's distilled UNets have more than others: a layer that takes the guidance scale.
_GUIDANCE = ("time_embedding.cond_proj.weight", "time_embed.cond_proj.weight")
_JOINED = ("to_q", "to_k", "to_v")

_TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "class_embedding.linear_1",
    "label_emb.0.2": "class_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def is_unet(names: Collection[str]) -> bool:
    """Whether a diffusion model of these names is a UNet of the Stable Diffusion line, of whatever version."""
    return "input_blocks.0.0.weight" in names or "down_blocks.0.resnets.0.conv1.weight" in names


def open_unet(path: Path) -> tuple[RenamedSource, UNetConfig]:
    """The UNet at `path` under diffusers' names, queries, keys and values joined, and its sizes.

    Raises: CheckpointError: not a whole UNet. UnsupportedError: a UNet of another kind; the message says which.
    """
    entries = entries_of(path)
    source = open_source(path, diffusion_prefix(entries))
    flags = {V_PREDICTION, ZERO_SNR, *EDM_PLAIN, *EDM_V}.intersection(entries)
    layers = layers_per_block(source)
    by_theirs = {diffusers_name(name, layers): name for name in source.names() if name not in flags}
    pieces = joined({theirs: [Piece(ours)] for theirs, ours in by_theirs.items()})
    config = unet_sizes(by_theirs, source)
    edm = _edm_sampling(path, flags)
    by_v = edm is None and V_PREDICTION in flags
    config = replace(config, v_prediction=by_v, zero_snr=by_v and ZERO_SNR in flags, edm=edm)
    return RenamedSource(source, pieces), config


def _edm_sampling(path: Path, marks: Collection[str]) -> ContinuousSampling | None:
    """What the file's marks say of a model that knows any sigma of a range; None where they say nothing of it.

    Raises: CheckpointError: they say it in no way that can be used.
    """
    if all(mark in marks for mark in EDM_PLAIN):
        return _PLAYGROUND
    if EDM_V[0] not in marks:
        return None
    values = WholeFile(path, _EDM)
    try:
        high, low = (
            float(values[mark.removeprefix(_EDM)].item()) if mark in marks else usual
            for mark, usual in zip(EDM_V, (_SIGMA_MAX, _SIGMA_MIN), strict=True)
        )
        return ContinuousSampling("v_prediction", "log", low, high)
    except BackendError as error:
        raise CheckpointError(f"{path.name} has marks of EDM that can't be used: {error}", "Get it again.") from error
    except RuntimeError:  # of a tensor with more than one value
        raise CheckpointError(f"{path.name}: {EDM_V[0]} is not one number.", "Get it again.") from None


def unet_places(source: RenamedSource, config: UNetConfig) -> Callable[[str], tuple[str, int]]:
    """Tells where the tensor of a single-file name lies: in which of the joined ones, and from which of its rows on.

    What it gives raises InputError where the model has no tensor of that name.
    """
    layers, places = config.layers_per_block, {}
    for whole, pieces in source.pieces.items():
        row = 0
        for piece in pieces:
            places[diffusers_name(piece.name, layers)] = whole, row
            row += source.inner.shape(piece.name)[0] if len(pieces) > 1 else 0

    def place(name: str) -> tuple[str, int]:
        found = places.get(diffusers_name(name, layers))
        if found is None:
            raise InputError(f"{source.path.name} has no weight {name}.", "Remove the node that patches it.")
        return found

    return place


def diffusers_name(name: str, layers: int) -> str:
    """diffusers' name for a tensor of either layout; `layers` is as `layers_per_block` counts them."""
    if not name.startswith(("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")):
        return name.replace("add_embedding.", "class_embedding.")
    stem, _, leaf = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{leaf}"
    match = re.fullmatch(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.(.+)", stem)
    if match is None:
        return name
    side, number, rest = match[1], int(match[2]), match[3]
    if side == "middle_block":
        return f"mid_block.{'attentions.0' if number == 1 else f'resnets.{number // 2}'}.{_inner(rest)}.{leaf}"
    part, _, rest = rest.partition(".")
    if side == "input_blocks":
        block, layer = divmod(number - 1, layers + 1)
        if rest == "op":
            return f"down_blocks.{block}.downsamplers.0.conv.{leaf}"
        where = f"down_blocks.{block}"
    else:
        block, layer = divmod(number, layers + 1)
        if rest == "conv":
            return f"up_blocks.{block}.upsamplers.0.conv.{leaf}"
        where = f"up_blocks.{block}"
    return f"{where}.{'resnets' if part == '0' else 'attentions'}.{layer}.{_inner(rest)}.{leaf}"


def _inner(rest: str) -> str:
    return _RESNET.get(rest, rest)


def layers_per_block(source: TensorSource) -> int:
    """Residual blocks before the first downsampling."""
    names, number = set(source.names()), 1
    while f"input_blocks.{number}.0.in_layers.0.weight" in names:
        number += 1
    return number - 1


def joined(pieces: dict[str, list[Piece]]) -> dict[str, list[Piece]]:
    """Self-attention's q, k, v as one tensor and cross-attention's k, v as one, where the file has them all."""
    found = {}
    for name, (piece,) in pieces.items():
        stem, _, part = name.removesuffix(".weight").rpartition(".")
        parts = _JOINED if stem.endswith("attn1") else _JOINED[1:]
        theirs = [f"{stem}.{p}.weight" for p in parts]
        if part not in parts or not all(other in pieces for other in theirs):
            found[name] = [piece]
        elif part == parts[0]:
            found[f"{stem}.to_{''.join(p[-1] for p in parts)}.weight"] = [pieces[other][0] for other in theirs]
    return found


def unet_sizes(
    names: dict[str, str], source: TensorSource, what: str = "UNet", *, has_output: bool = True
) -> UNetConfig:
    """Sizes, read from names and shapes alone.

    Args:
        names: by diffusers' name, the source's.
        what: the kind of model, in messages.
    Raises: as `open_unet`.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in names:
            raise CheckpointError(f"{source.path.name} lacks {name}.", "The file is not whole; get it again.")
        return source.shape(names[name])

    def count(pattern: str) -> int:
        return 1 + max((int(m[1]) for name in names if (m := re.match(pattern, name))), default=-1)

    _check_inputs(names, source.path.name, what)
    taken = shape("conv_in.weight")[1]
    channels = shape("conv_out.weight")[0] if has_output else LATENT_CHANNELS
    if channels != LATENT_CHANNELS or taken < channels:
        raise UnsupportedError(
            f"{source.path.name} takes {taken} channels and gives {channels}; SDXL's latents have {LATENT_CHANNELS}.",
            "Choose an SDXL model: of text to image, inpainting or editing.",
        )
    blocks = count(r"down_blocks\.(\d+)\.")
    layers = count(r"down_blocks\.0\.resnets\.(\d+)\.")
    pooled = shape("class_embedding.linear_1.weight")[1]
    down = tuple(_depths(names, f"down_blocks.{i}", layers, count) for i in range(blocks))
    up = tuple(_depths(names, f"up_blocks.{i}", layers + 1, count) for i in range(blocks))
    context = _context_width(names, source, pooled)
    family = _FAMILIES.get((context, pooled))
    if family is None:
        raise UnsupportedError(
            f"{source.path.name} takes prompts of widths {context} and {pooled}; SDXL's are {list(_FAMILIES)}.",
            "Choose an SDXL model: base, refiner, turbo, lightning, SSD-1B or KOALA.",
        )
    heads = next((name for name in names if name.endswith("attn1.to_q.weight")), None)
    if heads is not None and shape(heads)[0] % HEAD_DIM:
        raise UnsupportedError(f"{source.path.name} has heads of another width than {HEAD_DIM}.", "Use an SDXL model.")
    return UNetConfig(
        family=family,
        channels=channels,
        block_channels=tuple(shape(f"down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(blocks)),
        layers_per_block=layers,
        down_depths=down,
        up_depths=up,
        mid_depth=_mid_depth(names, count),
        context_width=context,
        pooled_width=pooled,
        extra_channels=taken - channels,
    )


def _check_inputs(names: Collection[str], file: str, what: str) -> None:
    """Raises: UnsupportedError: it takes more beside latent, timestep and prompt than SDXL's do, or less."""
    if guidance := sorted(set(_GUIDANCE).intersection(names)):
        raise UnsupportedError(
            f"{file} is a whole LCM UNet: its guidance embedding ({guidance[0]}) takes a scale that no sampler gives.",
            "Use the model that it was made from with the LCM LoRA (lcm-lora-sdxl), which needs none; ComfyUI's own loader "
            "draws without the embedding.",
        )
    if "class_embedding.linear_1.weight" not in names:
        raise UnsupportedError(
            f"{file} is a {what} without micro-conditioning (SD1 or SD2).", f"Choose an SDXL {what}."
        )


def _context_width(names: dict[str, str], source: TensorSource, pooled: int) -> int:
    """That of the prompt's tokens; where nothing attends to them, as in small ControlNets, that of the family."""
    of_family = next((context for context, width in _FAMILIES if width == pooled), 0)
    return next((source.shape(names[name])[1] for name in names if name.endswith("attn2.to_k.weight")), of_family)


def _depths(names: dict[str, str], block: str, layers: int, count: Callable[[str], int]) -> tuple[int, ...]:
    """Transformer blocks of each layer of a block: of all of its layers, or of none."""
    place = re.escape(block)
    depths = tuple(count(rf"{place}\.attentions\.{layer}\.transformer_blocks\.(\d+)\.") for layer in range(layers))
    if any(depths) and not all(depths):
        raise UnsupportedError(f"{block} has attention in some layers only: {depths}.", "Use an SDXL model.")
    return depths


def _mid_depth(names: dict[str, str], count: Callable[[str], int]) -> int | None:
    """Transformer blocks in the middle; None without a middle block, 0 where it is one residual block."""
    if "mid_block.resnets.0.conv1.weight" not in names:
        return None
    return count(r"mid_block\.attentions\.0\.transformer_blocks\.(\d+)\.")
