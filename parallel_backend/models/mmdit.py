"""The MMDiT of SD3 and SD3.5, sharded over a mesh. Parameter names are the checkpoint's.

Source: Esser et al. 2024 (arXiv 2403.03206), figure 2; SD3.5-medium adds a second, image-only attention.
Shapes: B rows, L this rank's tokens, D hidden, N heads of this tp rank, H head dim, C latent channels, Y X latent
cells, P values of a patch, E context width, A pooled width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed.collectives import all_gather, split_range, split_sizes
from ..distributed.mesh import Mesh, MeshAxis
from ..distributed.tensor_parallel import ColumnParallelLinear, RowParallelLinear, sharded_parameter
from ..fused.modulated_norm import modulated_norm
from .transformer import Attend, StagedTransformer, Stream

HEAD_DIM = 64
FREQUENCIES = 256
EPS = 1e-6
# A block with a second attention, in units of one without: 16 products of D x D for an image token in place of 12.
DUAL_COST = 4 / 3


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes of one MMDiT, as its checkpoint's header gives them."""

    family: str
    depth: int
    heads: int
    dual_blocks: tuple[int, ...]
    qk_norm: bool
    channels: int
    patch_size: int
    pos_embed_size: int
    context_width: int
    pooled_width: int
    mlp_width: int

    head_dim = HEAD_DIM
    extra_channels = 0

    @property
    def hidden(self) -> int:
        return self.heads * HEAD_DIM


class HeadNorm(nn.Module):
    """The weight of an RMS norm of each head's queries or keys."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = sharded_parameter((HEAD_DIM,))


class SelfAttention(nn.Module):
    """Projections into and out of one attention, for this tp rank's heads."""

    def __init__(self, config: MMDiTConfig, tp: MeshAxis, with_proj: bool) -> None:
        super().__init__()
        hidden = config.hidden
        first, last = (h * HEAD_DIM for h in split_range(config.heads, tp.degree, tp.rank))
        self.qkv = ColumnParallelLinear(hidden, 3 * hidden, [(i * hidden + first, i * hidden + last) for i in range(3)])
        self.ln_q = HeadNorm() if config.qk_norm else None
        self.ln_k = HeadNorm() if config.qk_norm else None
        if with_proj:
            self.proj = RowParallelLinear(hidden, hidden, (first, last), tp)

    def stream(self, x_BLD: Tensor) -> Stream:
        q, k, v = self.qkv(x_BLD).chunk(3, dim=-1)
        norms = None if self.ln_q is None else self.ln_q.weight, None if self.ln_k is None else self.ln_k.weight
        return Stream(q, k, v, q.shape[-1] // HEAD_DIM, norms)


class Mlp(nn.Module):
    def __init__(self, config: MMDiTConfig, tp: MeshAxis) -> None:
        super().__init__()
        kept = split_range(config.mlp_width, tp.degree, tp.rank)
        self.fc1 = ColumnParallelLinear(config.hidden, config.mlp_width, [kept])
        self.fc2 = RowParallelLinear(config.mlp_width, config.hidden, kept, tp)


class Modulation(nn.Module):
    """adaLN: `count` vectors of D from the conditioning vector. Under tp each rank computes a share of the rows."""

    def __init__(self, hidden: int, count: int, tp: MeshAxis) -> None:
        super().__init__()
        kept = split_range(count * hidden, tp.degree, tp.rank)
        self.add_module("1", ColumnParallelLinear(hidden, count * hidden, [kept]))
        self.count = count

    def forward(self, activated_BD: Tensor) -> Tensor:
        return self.get_submodule("1")(activated_BD)


class StreamBlock(nn.Module):
    """One block's half for one stream, text or image."""

    def __init__(self, config: MMDiTConfig, tp: MeshAxis, *, pre_only: bool, dual: bool) -> None:
        super().__init__()
        self.pre_only, self.dual = pre_only, dual
        self.attn = SelfAttention(config, tp, with_proj=not pre_only)
        if dual:
            self.attn2 = SelfAttention(config, tp, with_proj=True)
        if not pre_only:
            self.mlp = Mlp(config, tp)
        self.adaLN_modulation = Modulation(config.hidden, 2 if pre_only else 9 if dual else 6, tp)


class JointBlock(nn.Module):
    """Text and image attend to each other; each has its own weights."""

    def __init__(self, config: MMDiTConfig, tp: MeshAxis, index: int) -> None:
        super().__init__()
        self.index = index
        self.context_block = StreamBlock(config, tp, pre_only=index == config.depth - 1, dual=False)
        self.x_block = StreamBlock(config, tp, pre_only=False, dual=index in config.dual_blocks)

    def modulations(self) -> tuple[Modulation, Modulation]:
        """The text stream's and the image stream's, in the order of use."""
        return self.context_block.adaLN_modulation, self.x_block.adaLN_modulation

    def forward(
        self,
        c_BLD: Tensor,
        x_BLD: Tensor,
        c_mod: list[Tensor],
        x_mod: list[Tensor],
        attend: Attend,
    ) -> tuple[Tensor, Tensor]:
        c_block, x_block = self.context_block, self.x_block
        (c_in,) = modulated_norm(c_BLD, EPS, (c_mod[0], c_mod[1]))
        of_dual = [(x_mod[6], x_mod[7])] if x_block.dual else []
        x_in, *x_in_2 = modulated_norm(x_BLD, EPS, (x_mod[0], x_mod[1]), *of_dual)
        image = x_block.attn.stream(x_in)
        c_attended, x_attended = attend.joint(c_block.attn.stream(c_in), image, EPS)
        x_attended = attend.with_beside(image, x_attended)
        del image  # memory that the products below take

        # The sums over tp run while the other stream's products are computed.
        x_sum = x_block.attn.proj.start(x_attended)
        c_sum = None if c_block.pre_only else c_block.attn.proj.start(c_attended)
        if x_block.dual:
            own_sum = x_block.attn2.proj.start(attend.image(x_block.attn2.stream(*x_in_2), EPS))
        x_BLD = torch.addcmul(x_BLD, x_mod[2], x_sum.wait())
        if x_block.dual:
            x_BLD = torch.addcmul(x_BLD, x_mod[8], own_sum.wait())
        x_sum = x_block.mlp.fc2.start(mlp_hidden(x_block.mlp, x_BLD, x_mod))
        if c_sum is not None:
            c_BLD = torch.addcmul(c_BLD, c_mod[2], c_sum.wait())
            c_sum = c_block.mlp.fc2.start(mlp_hidden(c_block.mlp, c_BLD, c_mod))
            c_BLD = torch.addcmul(c_BLD, c_mod[5], c_sum.wait())
        return c_BLD, torch.addcmul(x_BLD, x_mod[5], x_sum.wait())


class FinalLayer(nn.Module):
    def __init__(self, config: MMDiTConfig, tp: MeshAxis) -> None:
        super().__init__()
        self.linear = ColumnParallelLinear(config.hidden, config.patch_size**2 * config.channels)
        self.adaLN_modulation = Modulation(config.hidden, 2, tp)

    def forward(self, x_BLD: Tensor, mod: list[Tensor]) -> Tensor:
        return self.linear(*modulated_norm(x_BLD, EPS, (mod[0], mod[1])))


class Embedder(nn.Module):
    """Linear, SiLU, linear: of the timestep's frequencies, or of the pooled prompt."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"0": ColumnParallelLinear(width, hidden), "2": ColumnParallelLinear(hidden, hidden)})

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp["2"](F.silu(self.mlp["0"](x)))


class PatchEmbed(nn.Module):
    """Patches of latent cells to tokens; the checkpoint stores it as a convolution."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        patch = config.patch_size
        weight = sharded_parameter((config.hidden, config.channels, patch, patch))
        self.proj = nn.ParameterDict({"weight": weight, "bias": sharded_parameter((config.hidden,))})

    def forward(self, patches_BLP: Tensor) -> Tensor:
        return F.linear(patches_BLP, self.proj["weight"].flatten(1), self.proj["bias"])


class MMDiT(StagedTransformer):
    """SD3's and SD3.5's transformer; `places` are rows of its position table."""

    def __init__(self, config: MMDiTConfig, mesh: Mesh, kernel: str) -> None:
        super().__init__(config, mesh, kernel)
        if self.is_first:
            self.x_embedder = PatchEmbed(config)
        self.t_embedder = Embedder(FREQUENCIES, config.hidden)
        self.y_embedder = Embedder(config.pooled_width, config.hidden)
        if self.is_first:
            self.context_embedder = ColumnParallelLinear(config.context_width, config.hidden)
        self.joint_blocks = nn.ModuleDict({str(i): JointBlock(config, mesh.tp, i) for i in self.own_blocks})
        if self.is_last:
            self.final_layer = FinalLayer(config, mesh.tp)

    def block_costs(self) -> list[float]:
        return [DUAL_COST if i in self.config.dual_blocks else 1.0 for i in range(self.config.depth)]

    def is_elsewhere(self, name: str) -> bool:
        if match := re.match(r"joint_blocks\.(\d+)\.", name):
            return int(match[1]) not in self.own_blocks
        if name.startswith("final_layer."):
            return not self.is_last
        return name.startswith(("x_embedder.", "context_embedder.")) and not self.is_first

    def embed_text(self, context_BLE: Tensor, first: int, last: int) -> Tensor:
        return self.context_embedder(context_BLE[:, first:last])

    def embed_pooled(self, y_BA: Tensor) -> Tensor:
        return self.y_embedder(y_BA)

    @property
    def vector_width(self) -> int:
        return self.config.hidden * sum(module.count for module in self._modulations())

    def vectors(self, timesteps_B: Tensor, pooled_BD: Tensor) -> Tensor:
        """The adaLN vectors in the order of use. Comm: as `modulation_vectors`."""
        vector = self.t_embedder(timestep_frequencies(timesteps_B).to(pooled_BD.dtype)) + pooled_BD
        return modulation_vectors(self._modulations(), vector, self.mesh.tp)

    def _modulations(self) -> list[Modulation]:
        modules = [m for block in self._own() for m in block.modulations()]
        return [*modules, self.final_layer.adaLN_modulation] if self.is_last else modules

    def embed_patches(self, patches_BLP: Tensor, places: Tensor) -> Tensor:
        return self.x_embedder(patches_BLP) + places

    def run_blocks(
        self, c_BLD: Tensor, x_BLD: Tensor, vectors_BW: Tensor, places: Tensor, attend: Attend
    ) -> list[Tensor]:
        vectors = by_module(vectors_BW, self._modulations(), self.config.hidden)

        def run(blocks: Sequence[JointBlock], c_BLD: Tensor, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
            for block in blocks:
                own, c_mod, x_mod = attend.of(block.index), next(vectors), of_image(next(vectors), x_BLD)
                if not own.is_skipped:
                    c_BLD, x_BLD = block(c_BLD, x_BLD, c_mod, x_mod, own)
                x_BLD = own.with_residual(x_BLD)
            return c_BLD, x_BLD

        def first_input() -> Tensor:
            _, x_mod = islice(by_module(vectors_BW, self._modulations(), self.config.hidden), 2)
            shift, scale, *_ = of_image(x_mod, x_BLD)
            return modulated_norm(x_BLD, EPS, (shift, scale))[0]

        return attend.through(run, self._own(), c_BLD, x_BLD, first_input)

    def leave(self, x_BLD: Tensor, vectors_BW: Tensor) -> Tensor:
        last = vectors_BW[: len(x_BLD), None, -2 * self.config.hidden :]
        return self.final_layer(x_BLD, list(last.chunk(2, dim=2)))

    def unpatchify(self, x_BLP: Tensor, shape: torch.Size) -> Tensor:
        B, C, Y, X = shape
        patch = self.config.patch_size
        x = x_BLP.view(B, Y // patch, X // patch, patch, patch, C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(B, C, Y, X)

    def _own(self) -> list[JointBlock]:
        return [cast(JointBlock, block) for block in self.joint_blocks.values()]


def modulation_vectors(modules: Sequence[Modulation], vector_BD: Tensor, tp: MeshAxis) -> Tensor:
    """(B, W): the adaLN vectors of one module after the other, from the sum of the timestep's and the prompt's.

    Comm: under tp, one all-gather for all modules.
    """
    degree, hidden = tp.degree, vector_BD.shape[1]
    rows = [split_sizes(m.count * hidden, degree) for m in modules]
    activated = F.silu(vector_BD)
    local = torch.cat([m(activated) for m in modules], dim=1)
    if degree == 1:
        return local
    shares = all_gather(local, 1, [sum(r[i] for r in rows) for i in range(degree)], tp)
    by_rank = shares.split([sum(r[i] for r in rows) for i in range(degree)], dim=1)
    parts = [share.split([r[i] for r in rows], dim=1) for i, share in enumerate(by_rank)]
    return torch.cat([part for same in zip(*parts, strict=True) for part in same], dim=1)


def by_module(vectors_BW: Tensor, modules: Sequence[Modulation], hidden: int) -> Iterator[list[Tensor]]:
    """Each module's vectors, (B, 1, D) each: shift and scale before the attention, gate after it, the same of the MLP."""
    vectors = iter(vectors_BW.unsqueeze(1).split(hidden, dim=2))
    for module in modules:
        yield list(islice(vectors, module.count))


def of_image(vectors: Sequence[Tensor], x_BLD: Tensor) -> list[Tensor]:
    """A module's vectors of the image's rows: those of further text come after them."""
    return [vector[: len(x_BLD)] for vector in vectors]


def mlp_hidden(mlp: Mlp, x_BLD: Tensor, mod: Sequence[Tensor]) -> Tensor:
    return F.gelu(mlp.fc1(*modulated_norm(x_BLD, EPS, (mod[3], mod[4]))), approximate="tanh")


def timestep_frequencies(timesteps_B: Tensor) -> Tensor:
    """(B, 256): cosines, then sines, of the timestep at 128 geometric frequencies."""
    half = FREQUENCIES // 2
    rates = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=timesteps_B.device) / half)
    angles = timesteps_B.float()[:, None] * rates[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
