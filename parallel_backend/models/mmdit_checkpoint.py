"""MMDiT files: recognised by their names and shapes, in the single-file and in the diffusers layout."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..distributed.tensor_parallel import Shard
from ..errors import CheckpointError
from .checkpoint import Piece, RenamedSource, TensorSource
from .left_over import first_of
from .mmdit import HEAD_DIM, MMDiTConfig
from .opened_file import open_diffusion

POS_EMBED = "pos_embed"
# Of positions of sizes and of their patches that are kept; a large one takes 40 MB, and its patches as much again.
KEPT_BYTES = 2**27
_TEXT_QUERY = "transformer_blocks.0.attn.add_q_proj.weight"
_OTHER_FAMILIES = (
    ("controlnet_blocks.0.weight", "a ControlNet"),
    ("input_blocks.0.0.weight", "a UNet (SDXL or SD1/SD2)"),
    ("down_blocks.0.resnets.0.conv1.weight", "a diffusers UNet (SDXL or SD1/SD2)"),
    ("double_blocks.0.img_attn.qkv.weight", "Flux"),
    ("decoder.conv_in.weight", "a VAE"),
    ("first_stage_model.decoder.conv_in.weight", "a checkpoint whose diffusion model is not an MMDiT"),
    ("text_model.embeddings.token_embedding.weight", "a text encoder"),
)


def open_mmdit(path: Path) -> TensorSource:
    """The MMDiT at `path`, under single-file names: a bare file, a full checkpoint, or a diffusers folder.

    Raises: CheckpointError: it holds something else; the message says what.
    """
    source = open_diffusion(path)
    names = set(source.names())
    if any(name.startswith("joint_blocks.") for name in names):
        return source
    if {_TEXT_QUERY, "pos_embed.pos_embed"} <= names and "controlnet_blocks.0.weight" not in names:
        return RenamedSource(source, diffusers_pieces(source))
    kind = next((kind for name, kind in _OTHER_FAMILIES if name in names), "something this version doesn't know")
    raise CheckpointError(
        f"{path.name} is {kind}; an SD3 or SD3.5 model (MMDiT) is needed here.",
        "Choose SD3-medium, SD3.5-medium or SD3.5-large.",
    )


def mmdit_config(source: TensorSource) -> MMDiTConfig:
    """Family and sizes, read from names and shapes alone.

    Raises: CheckpointError: a tensor that tells the sizes is missing.
    """
    names = set(source.names())
    needed = (
        "x_embedder.proj.weight",
        "pos_embed",
        "context_embedder.weight",
        "y_embedder.mlp.0.weight",
        "joint_blocks.0.x_block.mlp.fc1.weight",
    )
    missing = [name for name in needed if name not in names]
    if missing:
        raise CheckpointError(f"{source.path.name} lacks {', '.join(missing)}.", "The file is not whole; get it again.")
    hidden, channels, patch_size, _ = source.shape("x_embedder.proj.weight")
    blocks = [int(match[1]) for name in names if (match := re.match(r"joint_blocks\.(\d+)\.", name))]
    dual = tuple(
        sorted({int(m[1]) for n in names if (m := re.match(r"joint_blocks\.(\d+)\.x_block\.attn2\.qkv\.weight", n))})
    )
    qk_norm = "joint_blocks.0.x_block.attn.ln_q.weight" in names
    return MMDiTConfig(
        family="sd3.5-medium" if dual else "sd3.5-large" if qk_norm else "sd3-medium",
        depth=max(blocks) + 1,
        heads=hidden // HEAD_DIM,
        dual_blocks=dual,
        qk_norm=qk_norm,
        channels=channels,
        patch_size=patch_size,
        pos_embed_size=round(source.shape("pos_embed")[1] ** 0.5),
        context_width=source.shape("context_embedder.weight")[1],
        pooled_width=source.shape("y_embedder.mlp.0.weight")[1],
        mlp_width=source.shape("joint_blocks.0.x_block.mlp.fc1.weight")[0],
    )


@dataclass
class PositionTable:
    """The rows of the position table that this rank needs for one latent size, read from the file at first use.

    The full table of SD3.5-medium is 302 MB in fp16; a rank keeps only the crops that it has used.
    """

    source: TensorSource
    size: int
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self._crops: OrderedDict[tuple[int, int, tuple[tuple[int, int], ...]], Tensor] = OrderedDict()
        self._other: Tensor | None = None

    def replace(self, table: Tensor | None) -> None:
        """Another table (1, L, D) of the same size takes the place of the file's, which None brings back."""
        self._crops.clear()
        self._other = table

    def rows(self, rows: int, columns: int, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """(L, D) for tokens (first, one past last) of an image of rows x columns tokens; the crop is centred."""
        key = (rows, columns, tuple(ranges))
        if key not in self._crops:
            top, left = (self.size - rows) // 2, (self.size - columns) // 2
            wanted = []
            for first, last in ranges:
                for row in range(first // columns, -(-last // columns)):
                    start, stop = max(first, row * columns), min(last, (row + 1) * columns)
                    offset = (top + row) * self.size + left - row * columns
                    wanted.append((offset + start, offset + stop))
            if not wanted:  # of the smallest images, a rank may have no token
                crop = torch.empty(0, self.source.shape(POS_EMBED)[2])
            elif self._other is None:
                crop = self.source.read(POS_EMBED, Shard(1, tuple(wanted)))[0]
            else:
                crop = torch.cat([self._other[0, start:stop] for start, stop in wanted])
            self._crops[key] = crop.to(device=self.device, dtype=self.dtype, copy=True)
        self._crops.move_to_end(key)
        while len(self._crops) > 1 and sum(kept.nbytes for kept in self._crops.values()) > KEPT_BYTES:
            self._crops.popitem(last=False)
        return self._crops[key]


def diffusers_pieces(source: TensorSource, control_blocks: int | None = None) -> dict[str, list[Piece]]:
    """Single-file names of a diffusers SD3Transformer2DModel; q, k, v are joined, and adaLN halves swapped back.

    Args:
        control_blocks: of an SD3ControlNetModel, which has no final layer, how many blocks are wanted.
    """
    names = set(source.names())
    depth, hidden = control_blocks or diffusers_blocks(names), source.shape(_TEXT_QUERY)[0]
    pieces: dict[str, list[Piece]] = {"pos_embed": [Piece("pos_embed.pos_embed")]}

    def linear(ours: str, *theirs: str) -> None:
        for leaf in ("weight", "bias"):
            pieces[f"{ours}.{leaf}"] = [Piece(f"{name}.{leaf}") for name in theirs]

    def vectors(ours: str, theirs: str, *numbers: int) -> None:
        # diffusers' AdaLayerNormContinuous stores (scale, shift), the single file (shift, scale): they are given as 1, 0.
        rows = [(i * hidden, (i + 1) * hidden) for i in numbers]
        for leaf in ("weight", "bias"):
            pieces[f"{ours}.{leaf}"] = [Piece(f"{theirs}.{leaf}", *span) for span in rows]

    def norms(ours: str, query: str, key: str) -> None:
        if f"{query}.weight" in names:
            pieces[f"{ours}.ln_q.weight"] = [Piece(f"{query}.weight")]
            pieces[f"{ours}.ln_k.weight"] = [Piece(f"{key}.weight")]

    linear("x_embedder.proj", "pos_embed.proj")
    linear("context_embedder", "context_embedder")
    for ours, theirs in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder")):
        linear(f"{ours}.mlp.0", f"time_text_embed.{theirs}.linear_1")
        linear(f"{ours}.mlp.2", f"time_text_embed.{theirs}.linear_2")
    if control_blocks is None:
        linear("final_layer.linear", "proj_out")
        vectors("final_layer.adaLN_modulation.1", "norm_out.linear", 1, 0)
    for i in range(depth):
        theirs, x, c = f"transformer_blocks.{i}", f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block"
        linear(f"{x}.attn.qkv", *(f"{theirs}.attn.to_{p}" for p in "qkv"))
        linear(f"{c}.attn.qkv", *(f"{theirs}.attn.add_{p}_proj" for p in "qkv"))
        norms(f"{x}.attn", f"{theirs}.attn.norm_q", f"{theirs}.attn.norm_k")
        norms(f"{c}.attn", f"{theirs}.attn.norm_added_q", f"{theirs}.attn.norm_added_k")
        linear(f"{x}.attn.proj", f"{theirs}.attn.to_out.0")
        linear(f"{x}.adaLN_modulation.1", f"{theirs}.norm1.linear")
        linear(f"{x}.mlp.fc1", f"{theirs}.ff.net.0.proj")
        linear(f"{x}.mlp.fc2", f"{theirs}.ff.net.2")
        if f"{theirs}.attn2.to_q.weight" in names:
            linear(f"{x}.attn2.qkv", *(f"{theirs}.attn2.to_{p}" for p in "qkv"))
            norms(f"{x}.attn2", f"{theirs}.attn2.norm_q", f"{theirs}.attn2.norm_k")
            linear(f"{x}.attn2.proj", f"{theirs}.attn2.to_out.0")
        if i == depth - 1 and control_blocks is not None:
            # Nobody reads the text after it: of its six vectors, the two before the attention are enough.
            vectors(f"{c}.adaLN_modulation.1", f"{theirs}.norm1_context.linear", 0, 1)
        elif i == depth - 1:
            vectors(f"{c}.adaLN_modulation.1", f"{theirs}.norm1_context.linear", 1, 0)
        else:
            linear(f"{c}.adaLN_modulation.1", f"{theirs}.norm1_context.linear")
            linear(f"{c}.attn.proj", f"{theirs}.attn.to_add_out")
            linear(f"{c}.mlp.fc1", f"{theirs}.ff_context.net.0.proj")
            linear(f"{c}.mlp.fc2", f"{theirs}.ff_context.net.2")
    return _whole(source, pieces, "SD3Transformer2DModel" if control_blocks is None else "SD3ControlNetModel")


def _whole(source: TensorSource, pieces: dict[str, list[Piece]], kind: str) -> dict[str, list[Piece]]:
    """These, and under its own name all else that the file has. Raises: CheckpointError: it lacks one of these."""
    used, names = {piece.name for parts in pieces.values() for piece in parts}, set(source.names())
    if absent := sorted(used - names):
        raise CheckpointError(
            f"{source.path.name} is not a whole {kind}: {len(absent)} tensors are missing.",
            "Download it again.",
            f"missing: {first_of(absent)}",
        )
    return pieces | {name: [Piece(name)] for name in names - used}


def diffusers_blocks(names: Collection[str]) -> int:
    """How many blocks a diffusers transformer has."""
    return 1 + max(int(m[1]) for n in names if (m := re.match(r"transformer_blocks\.(\d+)\.", n)))
