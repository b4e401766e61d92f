"""The MMDiT of "Stable Diffusion 3 from scratch", sharded over a mesh. Parameter names are the checkpoint's.

Source: the public repository gmongaras/Stable-Diffusion-3-From-Scratch. Beside SD3: rotary positions in two dimensions
in place of a table, SwiGLU or GELU, two text encoders with norms of their own, a learned scale of time, and no biases in
attention and modulation. Modulations are small here and kept whole under tp.
Shapes: B rows, L this rank's tokens, D hidden, N heads of this tp rank, H head dim, E context width, A pooled width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed.collectives import split_range
from ..distributed.mesh import Mesh, MeshAxis
from ..distributed.tensor_parallel import ColumnParallelLinear, RowParallelLinear, sharded_parameter
from ..fused.joint_heads import RMS_EPS
from ..fused.modulated_norm import modulated_norm
from .transformer import Attend, StagedTransformer, Stream

# Tokens of the first text encoder (Gemma); those after them are the second's (ModernBERT).
FIRST_TEXT_TOKENS = 77
LAYER_NORM_EPS = 1e-5
# Vectors of a block's image tokens; its text's come after them.
OF_IMAGE = 6


@dataclass(frozen=True)
class FromScratchConfig:
    """Sizes and kinds, as the file and its `model_params_*.json` give them."""

    depth: int
    heads: int
    hidden: int
    mlp_width: int
    mlp: str
    rotary: bool
    channels: int
    patch_size: int
    context_width: int
    pooled_width: int
    family: str = "sd3-from-scratch"
    pos_embed_size: int = 4096  # rotary positions have no table that ends
    extra_channels = 0

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


class JointAttention(nn.Module):
    """Attention of image (x) and text (c) tokens together; each stream has its own projections and norms."""

    def __init__(self, config: FromScratchConfig, tp: MeshAxis, last: bool) -> None:
        super().__init__()
        self.head_dim, hidden = config.head_dim, config.hidden
        kept = tuple(h * config.head_dim for h in split_range(config.heads, tp.degree, tp.rank))
        for stream in "xc":
            for part in ("query", "key", "value"):
                projection = ColumnParallelLinear(hidden, hidden, [(kept[0], kept[1])], bias=False)
                self.add_module(f"{part}_proj_{stream}", projection)
            self.add_module(f"q_norm_{stream}", HeadNorm(config.head_dim))
            self.add_module(f"k_norm_{stream}", HeadNorm(config.head_dim))
            if stream == "x" or not last:
                out = RowParallelLinear(hidden, hidden, (kept[0], kept[1]), tp, bias=False)
                self.add_module(f"out_proj_{stream}", out)
        if config.rotary:
            self.rotary_emb = nn.ParameterDict({"freqs": sharded_parameter((config.head_dim // 4,), fp32=True)})

    def stream(self, of: str, tokens_BLD: Tensor, positions_L2: Tensor | None) -> Stream:
        """Image tokens are normed, and turned by their row and column."""
        query, key, value = (self.get_submodule(f"{part}_proj_{of}")(tokens_BLD) for part in ("query", "key", "value"))
        heads = query.shape[-1] // self.head_dim
        q_norm, k_norm = (cast(HeadNorm, self.get_submodule(f"{part}_norm_{of}")) for part in "qk")
        if positions_L2 is None:
            return Stream(query, key, value, heads, (q_norm.weight, k_norm.weight))
        angles = rotary_angles(positions_L2, self.rotary_emb["freqs"])
        query, key = (
            rotate(norm(x.unflatten(-1, (heads, -1))), angles).flatten(2)
            for norm, x in ((q_norm, query), (k_norm, key))
        )
        return Stream(query, key, value, heads)


class HeadNorm(nn.Module):
    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = sharded_parameter((head_dim,))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, RMS_EPS)


class SwiGLU(nn.Module):
    """w3(silu(first half of w12(x)) * second half)."""

    def __init__(self, config: FromScratchConfig, tp: MeshAxis) -> None:
        super().__init__()
        width, (first, last) = config.mlp_width, split_range(config.mlp_width, tp.degree, tp.rank)
        self.w12 = ColumnParallelLinear(config.hidden, 2 * width, [(first, last), (width + first, width + last)])
        self.w3 = RowParallelLinear(width, config.hidden, (first, last), tp)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class GeluMlp(nn.Module):
    def __init__(self, config: FromScratchConfig, tp: MeshAxis) -> None:
        super().__init__()
        kept = split_range(config.mlp_width, tp.degree, tp.rank)
        self.lin_up = ColumnParallelLinear(config.hidden, config.mlp_width, [kept])
        self.lin_down = RowParallelLinear(config.mlp_width, config.hidden, kept, tp)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin_down(F.gelu(self.lin_up(x)))


class NamedMlp(nn.Module):
    """SwiGLU one level deeper, as newer files name it."""

    def __init__(self, config: FromScratchConfig, tp: MeshAxis) -> None:
        super().__init__()
        self.MLP = SwiGLU(config, tp)

    def forward(self, x: Tensor) -> Tensor:
        return self.MLP(x)


MLPS: dict[str, Callable[[FromScratchConfig, MeshAxis], nn.Module]] = {
    "swiglu": NamedMlp,
    "swiglu_old": SwiGLU,
    "gelu": GeluMlp,
}


class Norm(nn.Module):
    """A layer norm, shifted and scaled by the conditioning vector."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.c_shift = ColumnParallelLinear(hidden, hidden, bias=False)
        self.c_scale = ColumnParallelLinear(hidden, hidden, bias=False)

    def vectors(self, y_BD: Tensor) -> list[Tensor]:
        """Shift and scale, (B, D) each."""
        return [self.c_shift(y_BD), self.c_scale(y_BD)]

    def forward(self, x_BLD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
        return modulated_norm(x_BLD, LAYER_NORM_EPS, (shift_B1D, scale_B1D))[0]


class Block(nn.Module):
    """Text and image attend to each other; each has its own weights. The last block gives image tokens only."""

    def __init__(self, config: FromScratchConfig, tp: MeshAxis, index: int) -> None:
        super().__init__()
        hidden, last = config.hidden, index == config.depth - 1
        self.index, self.last, self.rotary = index, last, config.rotary
        self.y_proj = nn.ModuleDict({"0": ColumnParallelLinear(hidden, hidden)})
        self.attn = JointAttention(config, tp, last)
        self.norm1_x, self.norm2_x, self.norm1_c = Norm(hidden), Norm(hidden), Norm(hidden)
        self.MLP_x = MLPS[config.mlp](config, tp)
        self.scale1_x = ColumnParallelLinear(hidden, hidden, bias=False)
        self.scale2_x = ColumnParallelLinear(hidden, hidden, bias=False)
        if not last:
            self.MLP_c = MLPS[config.mlp](config, tp)
            self.norm2_c = Norm(hidden)
            self.scale1_c = ColumnParallelLinear(hidden, hidden, bias=False)
            self.scale2_c = ColumnParallelLinear(hidden, hidden, bias=False)

    @property
    def vector_count(self) -> int:
        return OF_IMAGE + (2 if self.last else 6)

    def vectors(self, y_BD: Tensor) -> list[Tensor]:
        """(B, D) each: shift and scale before the image's attention, gate after it, the same of its MLP; then the text's."""
        y = F.silu(self.y_proj["0"](y_BD))
        image = [*self.norm1_x.vectors(y), self.scale1_x(y), *self.norm2_x.vectors(y), self.scale2_x(y)]
        text = self.norm1_c.vectors(y)
        return (
            [*image, *text]
            if self.last
            else [*image, *text, self.scale1_c(y), *self.norm2_c.vectors(y), self.scale2_c(y)]
        )

    def forward(
        self, x: Tensor, c: Tensor, vectors: Sequence[Tensor], positions_L2: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        """`vectors`: (B, 1, D) each."""
        attn, of_x, of_c = self.attn, vectors[:OF_IMAGE], vectors[OF_IMAGE:]
        of_image = attn.stream("x", self.norm1_x(x, *of_x[:2]), positions_L2 if self.rotary else None)
        of_text = attn.stream("c", self.norm1_c(c, *of_c[:2]), None)
        c_attended, x_attended = attend.joint(of_text, of_image, None)
        x = torch.addcmul(x, attn.get_submodule("out_proj_x")(x_attended), of_x[2])
        x = torch.addcmul(x, self.MLP_x(self.norm2_x(x, *of_x[3:5])), of_x[5])
        if not self.last:
            c = torch.addcmul(c, attn.get_submodule("out_proj_c")(c_attended), of_c[2])
            c = torch.addcmul(c, self.MLP_c(self.norm2_c(c, *of_c[3:5])), of_c[5])
        return x, c


class PatchProjection(nn.Module):
    """Patches to tokens; the checkpoint stores it as a convolution."""

    def __init__(self, hidden: int, channels: int, patch: int) -> None:
        super().__init__()
        self.weight = sharded_parameter((hidden, channels, patch, patch))

    def forward(self, patches_BLP: Tensor) -> Tensor:
        return F.linear(patches_BLP, self.weight.flatten(1))


class FromScratch(StagedTransformer):
    """SD3 from scratch; `places` are row and column of each image token."""

    def __init__(self, config: FromScratchConfig, mesh: Mesh, kernel: str) -> None:
        super().__init__(config, mesh, kernel)
        hidden, patch = config.hidden, config.patch_size
        self.blocks = nn.ModuleDict({str(i): Block(config, mesh.tp, i) for i in self.own_blocks})
        self.t_emb2 = ColumnParallelLinear(hidden, hidden, bias=False)
        self.cond_MLP = ColumnParallelLinear(config.pooled_width, hidden, bias=False)
        self.time_scale = sharded_parameter((1,), fp32=True)
        if self.is_first:
            self.c_proj = ColumnParallelLinear(config.context_width, hidden, bias=False)
            self.c_proj2 = ColumnParallelLinear(config.context_width, hidden, bias=False)
            self.pre_c_norm, self.pre_c_norm2 = HeadNorm(config.context_width), HeadNorm(config.context_width)
            self.learnable_scalar, self.learnable_scalar2 = sharded_parameter((1,)), sharded_parameter((1,))
            self.pos_enc = nn.ModuleDict({"proj": PatchProjection(hidden, config.channels, patch)})
            self.patch_emb = ColumnParallelLinear(hidden, hidden)
        if self.is_last:
            self.out_norm = Norm(hidden)
            self.out_proj = ColumnParallelLinear(hidden, config.channels * patch**2)

    def is_elsewhere(self, name: str) -> bool:
        part = name.split(".")[0]
        if part == "blocks":
            return int(name.split(".")[1]) not in self.own_blocks
        if part in ("out_norm", "out_proj"):
            return not self.is_last
        return part not in ("t_emb2", "cond_MLP", "time_scale") and not self.is_first

    def embed_text(self, context_BLE: Tensor, first: int, last: int) -> Tensor:
        """The prompt is the first encoder's 77 tokens, then the second's; all zeros for none."""
        split = max(first, min(FIRST_TEXT_TOKENS, last))
        one, two = context_BLE[:, first:split], context_BLE[:, split:last]
        embedded = [
            self.c_proj(self.learnable_scalar * self.pre_c_norm(one)),
            self.c_proj2(self.learnable_scalar2 * self.pre_c_norm2(two)),
        ]
        return torch.cat(embedded, dim=1)

    def embed_pooled(self, y_BA: Tensor) -> Tensor:
        return self.cond_MLP(y_BA)

    @property
    def vector_width(self) -> int:
        return self.config.hidden * (sum(block.vector_count for block in self._own()) + 2 * self.is_last)

    def vectors(self, timesteps_B: Tensor, pooled_BD: Tensor) -> Tensor:
        """What every block projects for itself, and the output's norm."""
        times = time_waves(timesteps_B / 1000 * self.time_scale, self.config.hidden)
        y = self.t_emb2(times.to(pooled_BD.dtype)) + pooled_BD
        vectors = [vector for block in self._own() for vector in block.vectors(y)]
        return torch.cat([*vectors, *self.out_norm.vectors(y)] if self.is_last else vectors, dim=1)

    def _own(self) -> list[Block]:
        return cast(list[Block], list(self.blocks.values()))

    def embed_patches(self, patches_BLP: Tensor, places: Tensor) -> Tensor:
        return self.patch_emb(self.pos_enc["proj"](patches_BLP))

    def run_blocks(
        self, c_BLD: Tensor, x_BLD: Tensor, vectors_BW: Tensor, places: Tensor, attend: Attend
    ) -> list[Tensor]:
        each = vectors_BW.unsqueeze(1).split(self.config.hidden, dim=2)
        vectors = iter(each)

        def run(blocks: Sequence[Block], c_BLD: Tensor, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
            for block in blocks:
                own = attend.of(block.index)
                x_BLD, c_BLD = block(x_BLD, c_BLD, list(islice(vectors, block.vector_count)), places, own)
                x_BLD = own.with_residual(x_BLD)
            return c_BLD, x_BLD

        own_blocks = self._own()
        return attend.through(run, own_blocks, c_BLD, x_BLD, lambda: own_blocks[0].norm1_x(x_BLD, *each[:2]))

    def leave(self, x_BLD: Tensor, vectors_BW: Tensor) -> Tensor:
        shift, scale = vectors_BW[:, None, -2 * self.config.hidden :].chunk(2, dim=2)
        return self.out_proj(self.out_norm(x_BLD, shift, scale))

    def unpatchify(self, x_BLP: Tensor, shape: torch.Size) -> Tensor:
        """In a patch, channels come first."""
        B, C, Y, X = shape
        patch = self.config.patch_size
        x = x_BLP.view(B, Y // patch, X // patch, C, patch, patch)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(B, C, Y, X)


# A few numbers a token: of some sizes, each in patches of a pipeline.
KEPT_PLACES = 64


@dataclass(frozen=True)
class GridPositions:
    """Rows and columns of image tokens, which no file has to give."""

    device: torch.device
    _made: dict[Hashable, Tensor] = field(default_factory=dict, compare=False)

    def rows(self, rows: int, columns: int, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """(L, 2): row and column of tokens (first, one past last) of an image of rows x columns tokens."""
        key = (columns, tuple(ranges))
        if key not in self._made:
            index = torch.cat([torch.arange(first, last, device=self.device) for first, last in ranges])
            if len(self._made) >= KEPT_PLACES:
                self._made.clear()
            self._made[key] = torch.stack([index // columns, index % columns], dim=1).float()
        return self._made[key]


def rotary_angles(positions_L2: Tensor, frequencies: Tensor) -> Tensor:
    """(L, H / 2): half of a head's pairs turn with the row, half with the column."""
    return (positions_L2[:, :, None] * frequencies.float()).flatten(1)


def rotate(x_BLNH: Tensor, angles: Tensor) -> Tensor:
    """Each pair of neighbouring values turned by its angle."""
    cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
    first, second = x_BLNH.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2).to(x_BLNH.dtype)


def time_waves(times_B: Tensor, width: int) -> Tensor:
    """(B, width): sines of the even rates, then cosines of the odd ones."""
    rates = 10_000.0 ** (2 * torch.arange(width, dtype=torch.float32, device=times_B.device) / width)
    angles = times_B.float()[:, None] / rates
    return torch.cat([angles[:, ::2].sin(), angles[:, 1::2].cos()], dim=1)
