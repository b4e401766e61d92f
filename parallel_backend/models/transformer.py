"""What the transformers share: blocks in stages over the pp axis, tokens over ring and ulysses.

Shapes: B rows, L this rank's tokens of an evaluation, D hidden, P values of a patch, C latent channels, Y X latent
cells, E context width, A pooled width, N heads, H head dim, F = N * H.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from ..distributed.attention import (
    AddedKV,
    Joined,
    Memory,
    ParallelAttention,
    PipelinedKV,
    StaleKV,
    by_ring,
    in_ring_rank,
)
from ..distributed.collectives import Handle, all_gather, broadcast, start_receive, start_send
from ..distributed.graph_breaks import breaks_graph
from ..distributed.mesh import Mesh
from ..distributed.sites import FurtherText, TransformerSites
from ..distributed.stale import EXACT, Step, TokenKV
from ..errors import ConfigError
from ..fused.joint_heads import join_heads
from .prepared import PreparedPrompt
from .residuals import NONE, Residuals
from .steps_ahead import vectors_at
from .tokens import TEXT, Tokens, TokenSizes, own_text, patchify, tokens_for


@dataclass(frozen=True)
class Stream:
    """Queries, keys and values of text or image tokens, of this tp rank's heads; `norms_H`: weights of the RMS norms of each
    head's queries and keys, which are yet to come."""

    q_BLF: Tensor
    k_BLF: Tensor
    v_BLF: Tensor
    heads: int
    norms_H: tuple[Tensor | None, Tensor | None] = (None, None)

    @property
    def qkv_BLF(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_BLF, self.k_BLF, self.v_BLF

    def with_rows(self, again: Sequence[int]) -> Stream:
        """These rows once more, after all."""
        q, k, v = (with_rows(x, again) for x in self.qkv_BLF)
        return replace(self, q_BLF=q, k_BLF=k, v_BLF=v)


def with_rows(x: Tensor, again: Sequence[int]) -> Tensor:
    """These rows of `x` once more, after all."""
    return torch.cat([x, *(x[number : number + 1] for number in again)])


B = TypeVar("B", bound=nn.Module)
# (blocks, text tokens, image tokens) -> both after them.
Run: TypeAlias = Callable[[Sequence[B], Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Attend:
    """The attentions of one evaluation, and what acts beside them."""

    attention: ParallelAttention
    tokens: Tokens
    step: Step
    block: int = 0
    residuals: Residuals = NONE
    sites: TransformerSites = field(default_factory=TransformerSites)

    def of(self, block: int) -> Attend:
        """Those of one block."""
        return replace(self, block=block)

    def rows(self, latents: int) -> tuple[int, int]:
        """Of text and of image tokens, where there are so many latents."""
        further = self.sites.further
        return latents + (0 if further is None else len(further.beside)), latents

    @property
    def is_skipped(self) -> bool:
        """Whether this block hands its tokens on as they came."""
        return self.block in self.sites.skipped

    def through(
        self, run: Run[B], blocks: Sequence[B], c_BLD: Tensor, x_BLD: Tensor, first_input: Callable[[], Tensor]
    ) -> list[Tensor]:
        """Text and image tokens after a stage's blocks, of which `run` computes some; what a step cache has isn't computed.

        Args:
            first_input: of the first stage, what the first block's attention takes in of the image.
        """
        cache = self.step.cache
        if cache is None:
            return list(run(blocks, c_BLD, x_BLD))
        is_first, before = self.attention.mesh.pp.rank == 0, x_BLD
        ahead = cache.blocks_ahead if is_first else 0
        if is_first:  # others have decided before their tokens came
            c_BLD, x_BLD = run(blocks[:ahead], c_BLD, x_BLD)
            cache.taken(x_BLD - before if ahead else first_input())
        if cache.rest is not None:
            return [c_BLD, x_BLD + cache.rest]
        c_BLD, out = run(blocks[ahead:], c_BLD, x_BLD)
        cache.rest = out - x_BLD
        return [c_BLD, out]

    def with_residual(self, x_BLD: Tensor) -> Tensor:
        """Image tokens after this block, what a ControlNet gives for it added."""
        given = self.residuals.output
        added = given[self.block] if self.block < len(given) else None
        return x_BLD if added is None else x_BLD + added

    def joint(self, text: Stream, image: Stream, eps: float | None) -> tuple[Tensor, Tensor]:
        """Text and image tokens to all of both: (B, L, N * H) of each.

        Args:
            text: with its further rows, where extras have some.
            eps: of the norms of queries and keys; None is `RMS_EPS`.
        """
        further = self.sites.further
        if further is not None:
            image = image.with_rows(further.beside)
        joined = self._joined(text, image, eps)
        attended = self.attention.alone(joined) if self._is_alone else self._joint(joined)
        return attended if further is None else self._guided(further, *attended)

    @breaks_graph
    def _guided(self, further: FurtherText, text_BLF: Tensor, image_BLF: Tensor) -> tuple[Tensor, Tensor]:
        """Image tokens of the latents' rows alone. Comm: its own."""
        rows = list(image_BLF.split(1))
        count = len(rows) - len(further.beside)
        own, negative = (torch.cat(part) for part in ([rows[number] for number in further.beside], rows[count:]))
        for number, row in zip(
            further.beside, further.guided(own, negative, self.attention.mesh.tp).split(1), strict=True
        ):
            rows[number] = row
        return text_BLF, torch.cat(rows[:count])

    def image(self, image: Stream, eps: float | None) -> Tensor:
        """Image tokens to all image tokens."""
        q, k, v = (x[:, :0] for x in image.qkv_BLF)
        none = Stream(q, k, v, image.heads)
        joined = self._joined(none, image, eps)
        return (self.attention.alone(joined) if self._is_alone else self._image(joined))[1]

    def with_beside(self, image: Stream, attended_BLF: Tensor) -> Tensor:
        """What image tokens took from the joint attention, what extras give beside it added. Comm: theirs."""
        for work in self.sites.beside.get(self.block, ()):
            attended_BLF = attended_BLF + work(self, image)
        return attended_BLF

    @breaks_graph
    def image_and(self, image: Stream, kv_2BTNH: Tensor, eps: float | None) -> Tensor:
        """Image tokens to all image tokens and to these keys and values, of this tp rank's heads. Comm: as of any attention."""
        q, k, v = (x[:, :0] for x in image.qkv_BLF)
        joined = self._joined(Stream(q, k, v, image.heads), image, eps)
        counts, mesh = self.tokens.counts(self.tokens.image_segments), self.attention.mesh
        return self.attention(joined, counts, AddedKV(kv_2BTNH, mesh, by_ring(counts, mesh)))[1]

    @property
    def _is_alone(self) -> bool:
        """Whether this rank has all tokens, and nothing is remembered: compiled code then contains the attention."""
        kept, mesh = self.step.kept, self.attention.mesh
        return mesh.sp_degree == 1 and (kept is None or (kept.stale is None and kept.token_kv is None))

    def _joined(self, one: Stream, two: Stream, eps: float | None) -> Joined:
        (B, L, F), heads, parts = one.q_BLF.shape, one.heads, self.attention.mesh.ulysses.degree
        sent = join_heads(one.qkv_BLF, two.qkv_BLF, one.norms_H, two.norms_H, heads=heads, parts=parts, eps=eps)
        return Joined(sent, B, (L, two.q_BLF.shape[1]), heads, F // heads)

    @breaks_graph
    def _joint(self, joined: Joined) -> tuple[Tensor, Tensor]:
        return self._to(("joint", self.block), self.tokens.present, joined)

    @breaks_graph
    def _image(self, joined: Joined) -> tuple[Tensor, Tensor]:
        return self._to(("image", self.block), self.tokens.image_segments, joined)

    def _to(self, slot: tuple[str, int], present: tuple[int, ...], joined: Joined) -> tuple[Tensor, Tensor]:
        return self.attention(joined, self.tokens.counts(present), self._memory(slot, present))

    def _memory(self, slot: tuple[str, int], present: tuple[int, ...]) -> Memory | None:
        kept, stale = self.step.kept, self.step.stale
        mesh, tokens = self.attention.mesh, self.tokens
        if stale is not None:
            return StaleKV(stale, slot, self.step.phase, by_ring(tokens.counts(present), mesh))
        if kept is None or kept.token_kv is None:
            return None
        place = (*slot, self.step.branch)
        segments = list(range(len(tokens.segments)))
        if slot[0] == "image":
            segments.remove(TEXT)
        if place not in kept.token_kv:
            own = [in_ring_rank(counts, mesh) for counts in tokens.segments]
            kept.token_kv[place] = TokenKV([c if s in segments else [0] * len(c) for s, c in enumerate(own)])
        return PipelinedKV(kept.token_kv[place], present, by_ring(tokens.counts(segments), mesh))


class StagedTransformer(nn.Module):
    """A latent's velocity, computed by all ranks of a mesh; every rank has the whole input and output.

    A stage is a rank of the pp axis; it holds consecutive blocks. The first also takes latents and prompts in, the last
    makes the output of tokens.
    """

    def __init__(self, config: Any, mesh: Mesh, kernel: str) -> None:
        """Raises: ConfigError: tp * ulysses is more than the heads, or pp more than the blocks."""
        super().__init__()
        check_heads(config.heads, mesh)
        if mesh.pp.degree > config.depth:
            raise ConfigError(
                f"pp={mesh.pp.degree} needs as many blocks; this model has {config.depth}.", "Use fewer stages."
            )
        self.config, self.mesh = config, mesh
        self.attention = ParallelAttention(mesh, kernel)
        self.own_blocks = stage_blocks(self.block_costs(), mesh.pp.degree)[mesh.pp.rank]

    def block_costs(self) -> list[float]:
        """How long each block computes, in any unit."""
        return [1.0] * self.config.depth

    @property
    def is_first(self) -> bool:
        return self.mesh.pp.rank == 0

    @property
    def is_last(self) -> bool:
        return self.mesh.pp.rank == self.mesh.pp.degree - 1

    @abstractmethod
    def is_elsewhere(self, name: str) -> bool:
        """Whether a tensor of the checkpoint belongs to another stage."""

    @abstractmethod
    def embed_text(self, context_BLE: Tensor, first: int, last: int) -> Tensor:
        """(B, last - first, D): these tokens of the whole prompt. On the first stage."""

    @abstractmethod
    def embed_pooled(self, y_BA: Tensor) -> Tensor:
        """(B, D)."""

    @property
    @abstractmethod
    def vector_width(self) -> int:
        """W of `vectors`."""

    @abstractmethod
    def vectors(self, timesteps_B: Tensor, pooled_BD: Tensor) -> Tensor:
        """(B, W): what this stage's blocks and output take from the timestep and the embedded pooled prompt."""

    @abstractmethod
    def embed_patches(self, patches_BLP: Tensor, places: Tensor) -> Tensor:
        """(B, L, D). On the first stage."""

    @abstractmethod
    def run_blocks(
        self, c_BLD: Tensor, x_BLD: Tensor, vectors_BW: Tensor, places: Tensor, attend: Attend
    ) -> list[Tensor]:
        """Text and image tokens after this stage's blocks."""

    @abstractmethod
    def leave(self, x_BLD: Tensor, vectors_BW: Tensor) -> Tensor:
        """(B, L, P): the output of this rank's image tokens."""

    @abstractmethod
    def unpatchify(self, x_BLP: Tensor, shape: torch.Size) -> Tensor:
        """(B, C, Y, X) of all image tokens."""

    def tokens_for(self, height: int, width: int, text_tokens: int, num_patches: int = 1) -> Tokens:
        """Raises: InputError: see `tokens_for`."""
        config: TokenSizes = self.config
        return tokens_for(config, self.mesh, height, width, text_tokens, num_patches)

    def prepare(self, context_BLE: Tensor, y_BA: Tensor) -> PreparedPrompt:
        """`pooled`: (B, D), embedded; on the first stage `text`: (B, L, D), this rank's text tokens."""
        tensors = {"pooled": self.embed_pooled(y_BA)}
        if self.is_first:
            tensors["text"] = self.embed_text(context_BLE, *own_text(context_BLE.shape[1], self.mesh))
        return PreparedPrompt(context_BLE, y_BA, tensors)

    def forward(
        self,
        x_BCYX: Tensor,
        timesteps_B: Tensor,
        prepared: PreparedPrompt,
        places: Tensor,
        step: Step = EXACT,
        residuals: Residuals = NONE,
        sites: TransformerSites | None = None,
    ) -> Tensor:
        """The velocity at `x`.

        Args:
            x_BCYX: full latent, in the model's scale and dtype.
            timesteps_B: 1000 * sigma, fp32.
            prepared: from `prepare`, of the same rows; with `vectors` where these are there already.
                Where nothing was made of it yet, as in training, it is prepared here.
            places: of this rank's image tokens, patch after patch: rows of the position table, or rows and columns.
            residuals: of this rank's image tokens, after each block of the whole model.
            sites: where extras act.
        Returns: (B, C, Y, X), whole on every rank.
        Comm: as attention and tp say, one all-gather of the output tokens; under pp the tokens from stage to stage, and
            one broadcast of the output.
        """
        if not prepared.tensors:
            prepared = self.prepare(prepared.context, prepared.pooled)
        num_patches = step.kept.num_patches if step.kept is not None else 1
        tokens = self.tokens_for(x_BCYX.shape[2], x_BCYX.shape[3], prepared.context.shape[1], num_patches)
        vectors = vectors_at(prepared, timesteps_B, self.vectors)
        attend = Attend(self.attention, tokens, step, residuals=residuals, sites=sites or TransformerSites())
        if (further := attend.sites.further) is not None:
            prepared, vectors = self._with_further(further, prepared, timesteps_B, vectors)
        rows, dtype, device = attend.rows(len(x_BCYX)), x_BCYX.dtype, x_BCYX.device
        arriving = None if self.is_first else self.start_receive(rows, tokens, dtype, device)
        passed = self.stage(x_BCYX, prepared, places, vectors, attend, arriving)
        if self.mesh.pp.degree == 1:
            return passed
        if not self.is_last:
            start_send(passed, self.mesh.pp.rank + 1, self.mesh.pp).wait()
            passed = x_BCYX.new_empty(x_BCYX.shape)
        return broadcast(passed, self.mesh.pp.degree - 1, self.mesh.pp)

    def _with_further(
        self, further: FurtherText, prepared: PreparedPrompt, timesteps_B: Tensor, vectors_BW: Tensor
    ) -> tuple[PreparedPrompt, Tensor]:
        """With what is made of further rows of text after the others', in each evaluation anew."""
        own = self.prepare(further.context_BLE, further.pooled_BA)
        timesteps = torch.cat([timesteps_B[number : number + 1] for number in further.beside])
        vectors = torch.cat([vectors_BW, self.vectors(timesteps, own.tensors["pooled"])])
        if not self.is_first:
            return prepared, vectors
        text = torch.cat([prepared.tensors["text"], own.tensors["text"]])
        return replace(prepared, tensors={**prepared.tensors, "text": text}), vectors

    def stage(
        self,
        x_BCYX: Tensor,
        prepared: PreparedPrompt,
        places: Tensor,
        vectors_BW: Tensor,
        attend: Attend,
        arriving: Handle | None,
    ) -> Tensor:
        """This stage's part of an evaluation: what the next stage is sent, or on the last the output, whole.

        Args:
            x_BCYX: the rows of latent that the tokens are of; read on the first stage alone, elsewhere its shape counts.
            arriving: from the stage before; None on the first.
        """
        tokens, patch = attend.tokens, self.config.patch_size
        if arriving is None:
            first = tokens.first_image_token
            patches = tokens.take_image(patchify(x_BCYX, patch), first)
            # With later patches of a pipeline no text flows.
            c = prepared.tensors["text"][:, : tokens.text[1] - tokens.text[0]]
            x = self.embed_patches(patches, places)
        else:
            if attend.step.cache is not None:  # all stages decide together, the first one before it sends
                attend.step.cache.taken()
            sizes = [
                (*size, self.config.hidden) for size in zip(attend.rows(len(x_BCYX)), _lengths(tokens), strict=True)
            ]
            parts = arriving.wait().split([prod(size) for size in sizes])
            c, x = (part.view(size) for part, size in zip(parts, sizes, strict=True))
        c, x = self.run_blocks(c, x, vectors_BW, places, attend)
        if not self.is_last:
            return torch.cat([c.reshape(-1), x.reshape(-1)])
        out = self.leave(x, vectors_BW)
        for axis, counts in gathers(self.mesh, tokens.counts(tokens.image_segments)):
            out = all_gather(out, 1, counts, axis)
        return self.unpatchify(tokens.in_order(out), x_BCYX.shape)

    def start_receive(self, rows: tuple[int, int], tokens: Tokens, dtype: torch.dtype, device: torch.device) -> Handle:
        """What the stage before sends of these tokens, the text's and then the image's, of so many rows each."""
        count = sum(of_rows * length for of_rows, length in zip(rows, _lengths(tokens), strict=True))
        blank = torch.empty(count * self.config.hidden, dtype=dtype, device=device)
        return start_receive(blank, self.mesh.pp.rank - 1, self.mesh.pp)


def _lengths(tokens: Tokens) -> list[int]:
    """This rank's text and image tokens."""
    return [stop - start for start, stop in (tokens.text, (0, sum(b - a for a, b in tokens.image)))]


def stage_blocks(costs: Sequence[float], stages: int) -> list[range]:
    """Consecutive blocks for each stage, at least one, of costs as equal as cutting at the nearest block makes them."""
    reached = [sum(costs[:i]) for i in range(len(costs) + 1)]
    cuts = [0]
    for stage in range(1, stages):
        allowed = range(cuts[-1] + 1, len(costs) - (stages - stage) + 1)
        cuts.append(min(allowed, key=lambda i: abs(reached[i] - reached[-1] * stage / stages)))
    return [range(a, b) for a, b in zip(cuts, [*cuts[1:], len(costs)], strict=True)]


def check_heads(heads: int, mesh: Mesh) -> None:
    """Raises: ConfigError: tp * ulysses is more than the heads."""
    if mesh.tp.degree * mesh.ulysses.degree > heads:
        raise ConfigError(
            f"tp={mesh.tp.degree} * ulysses={mesh.ulysses.degree} spreads {heads} heads too thin.",
            "Use ring in place of a part of ulysses, or fewer ranks.",
        )


def gathers(mesh: Mesh, counts: list[int]) -> list[tuple[Any, list[int]]]:
    """Which axes the output tokens are gathered over, in this order, with each rank's count."""
    return [(mesh.ulysses, in_ring_rank(counts, mesh)), (mesh.ring, by_ring(counts, mesh))]
