"""ControlNets of SD3 and SD3.5, on the same tokens of the same ranks as the MMDiT that they steer.

Sources: Zhang et al. 2023 (arXiv 2302.05543), on the blocks of Esser et al. 2024 (arXiv 2403.03206). Parameter names are
ComfyUI's.
Shapes: as in mmdit.py.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed.attention import ParallelAttention
from ..distributed.collectives import Handle, broadcast, split_range
from ..distributed.mesh import Mesh, MeshAxis
from ..distributed.stale import Step
from ..distributed.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from ..errors import InputError
from ..fused.modulated_norm import modulated_norm
from ..quantized.weight import QuantizedWeight
from .mmdit import (
    EPS,
    FREQUENCIES,
    Embedder,
    JointBlock,
    MMDiT,
    MMDiTConfig,
    Modulation,
    PatchEmbed,
    StreamBlock,
    by_module,
    mlp_hidden,
    modulation_vectors,
    timestep_frequencies,
)
from .network import Positions
from .prepared import PreparedPrompt
from .residuals import Residuals
from .steps_ahead import vectors_at, with_vectors
from .tokens import own_text, padded, patchify, tokens_for
from .transformer import Attend, check_heads

Borrowed = Literal["", "x_embedder", "y_embedder"]


@dataclass(frozen=True)
class ControlConfig:
    """Sizes of one ControlNet, as its file's names and shapes give them.

    Args:
        model: of its blocks, of which there are `model.depth` that have an effect.
        repeats: to how many blocks of the main model, one after the other, each of its blocks adds.
        hint_channels: 16 of a latent; with a mask, 17.
        image_only: its blocks know no text; else they are the main model's own kind.
        borrowed: which embedder of the main model it takes. With the main model's of the pooled prompt, its own comes after
            that, there are no positions, and each of its blocks begins anew.
        control_type: what it follows: 0 blur, 1 canny, 2 depth; None where the file doesn't say.
    """

    model: MMDiTConfig
    repeats: tuple[int, ...]
    hint_channels: int
    image_only: bool = False
    borrowed: Borrowed = ""
    control_type: int | None = None

    @property
    def has_mask(self) -> bool:
        """Whether its hint has a mask after the channels of the latent."""
        return self.hint_channels == self.model.channels + 1

    @property
    def shifts_hint(self) -> bool:
        """Whether the hint's latent is (latent - shift) * scale as the model's own; else it is latent * scale."""
        return self.image_only


class ControlModel(nn.Module):
    """The weights of a ControlNet in a mesh; what stages of a pipeline share, each has whole."""

    def __init__(self, config: ControlConfig, mesh: Mesh) -> None:
        """Raises: ConfigError: tp * ulysses is more than the heads."""
        super().__init__()
        model, hidden = config.model, config.model.hidden
        check_heads(model.heads, mesh)
        self.config, self.tp = config, mesh.tp
        self.pos_embed_input = PatchEmbed(replace(model, channels=config.hint_channels))
        if config.borrowed != "x_embedder":
            self.x_embedder = PatchEmbed(model)
        self.t_embedder = Embedder(FREQUENCIES, hidden)
        self.y_embedder = Embedder(hidden if config.borrowed == "y_embedder" else model.pooled_width, hidden)
        self.kept = split_range(hidden, mesh.tp.degree, mesh.tp.rank)
        outs = (RowParallelLinear(hidden, hidden, self.kept, mesh.tp) for _ in range(model.depth))
        self.controlnet_blocks = nn.ModuleList(outs)

    @abstractmethod
    def modulations(self) -> Iterator[Modulation]:
        """Those of all blocks, in the order of use."""

    @abstractmethod
    def run_blocks(
        self, prepared: PreparedPrompt, x_BLD: Tensor, vectors: Iterator[list[Tensor]], attend: Attend
    ) -> list[Tensor]:
        """(B, L, D) for each block: what it adds to this rank's image tokens."""

    def embedded(self, context_BLE: Tensor, y_BA: Tensor) -> dict[str, Tensor]:
        """What it takes from a prompt: `pooled`, (B, D). `context`: this rank's tokens."""
        return {"pooled": self.y_embedder(y_BA)}

    def vectors(self, timesteps_B: Tensor, pooled_BD: Tensor) -> Tensor:
        """(B, W): the adaLN vectors of all blocks. Comm: as `modulation_vectors`."""
        # Not rounded to half precision first, as ComfyUI does: bf16 knows one timestep in four.
        times = timestep_frequencies(timesteps_B).to(pooled_BD.dtype)
        return modulation_vectors(list(self.modulations()), self.t_embedder(times) + pooled_BD, self.tp)

    def start_output(self, block: int, x_BLD: Tensor) -> Handle:
        """What that block adds. Comm: under tp one all-reduce of it, which runs while the next block computes."""
        return cast(RowParallelLinear, self.controlnet_blocks[block]).start(x_BLD[..., slice(*self.kept)])


class JointControl(ControlModel):
    """InstantX's kind: the first blocks of an MMDiT, with the prompt's tokens."""

    def __init__(self, config: ControlConfig, mesh: Mesh) -> None:
        super().__init__(config, mesh)
        model = config.model
        self.context_embedder = ColumnParallelLinear(model.context_width, model.hidden)
        self.joint_blocks = nn.ModuleList(JointBlock(model, mesh.tp, i) for i in range(model.depth))

    def modulations(self) -> Iterator[Modulation]:
        for block in self.joint_blocks:
            yield from cast(JointBlock, block).modulations()

    def embedded(self, context_BLE: Tensor, y_BA: Tensor) -> dict[str, Tensor]:
        # It was trained without the pooled prompt: to it, every prompt's is zeros.
        pooled = super().embedded(context_BLE, torch.zeros_like(y_BA))
        return {**pooled, "text": self.context_embedder(context_BLE)}

    def run_blocks(
        self, prepared: PreparedPrompt, x_BLD: Tensor, vectors: Iterator[list[Tensor]], attend: Attend
    ) -> list[Tensor]:
        c_BLD, under_way = prepared.tensors["text"], []
        for i, block in enumerate(self.joint_blocks):
            c_BLD, x_BLD = block(c_BLD, x_BLD, next(vectors), next(vectors), attend.of(i))
            under_way.append(self.start_output(i, x_BLD))
        return [output.wait() for output in under_way]


class ImageBlock(StreamBlock):
    """Image tokens attend to each other."""

    def __init__(self, config: MMDiTConfig, tp: MeshAxis) -> None:
        super().__init__(config, tp, pre_only=False, dual=False)

    def forward(self, x_BLD: Tensor, mod: list[Tensor], attend: Attend) -> Tensor:
        (x_in,) = modulated_norm(x_BLD, EPS, (mod[0], mod[1]))
        x_BLD = torch.addcmul(x_BLD, mod[2], self.attn.proj(attend.image(self.attn.stream(x_in), EPS)))
        return torch.addcmul(x_BLD, mod[5], self.mlp.fc2(mlp_hidden(self.mlp, x_BLD, mod)))


class ImageControl(ControlModel):
    """Stability's kind, of SD3.5-Large: blocks of image tokens alone."""

    def __init__(self, config: ControlConfig, mesh: Mesh) -> None:
        super().__init__(config, mesh)
        self.transformer_blocks = nn.ModuleList(ImageBlock(config.model, mesh.tp) for _ in range(config.model.depth))

    def modulations(self) -> Iterator[Modulation]:
        return (cast(ImageBlock, block).adaLN_modulation for block in self.transformer_blocks)

    def run_blocks(
        self, prepared: PreparedPrompt, x_BLD: Tensor, vectors: Iterator[list[Tensor]], attend: Attend
    ) -> list[Tensor]:
        under_way = []
        for i, block in enumerate(self.transformer_blocks):
            out = block(x_BLD, next(vectors), attend.of(i))
            under_way.append(self.start_output(i, out))
            if self.config.borrowed != "y_embedder":
                x_BLD = out
        return [output.wait() for output in under_way]


class TokenControlNet:
    """A ControlNet with its weights, beside the main model `base` and in its mesh: no residual leaves its rank.

    Under pp every stage computes it whole. What it borrows of `base` is read anew for each prompt or evaluation, with what lies on
    it.
    """

    def __init__(
        self,
        model: ControlModel,
        mesh: Mesh,
        kernel: str,
        device: torch.device,
        dtype: torch.dtype,
        base: MMDiT,
        positions: Positions | None,
    ) -> None:
        self.model, self.mesh, self.base, self.positions = model, mesh, base, positions
        self.config, self.device, self.dtype = model.config, device, dtype
        self.attention = ParallelAttention(mesh, kernel)

    def prepare(self, hint_BCYX: Tensor) -> Tensor:
        """What a job keeps of a hint, its latent in the model's scale: (B, C, Y, X), padded as the model's latents are.

        Raises: InputError: it hasn't the channels that this ControlNet takes.
        """
        wanted, mask = self.config.hint_channels, " and one of the mask" if self.config.has_mask else ""
        if hint_BCYX.ndim != 4 or hint_BCYX.shape[1] != wanted:
            raise InputError(
                f"The ControlNet's hint is {list(hint_BCYX.shape)}; it has to be [rows, {wanted}, height, width].",
                f"Encode its image with SD3's VAE: {self.config.model.channels} channels{mask}.",
            )
        return padded(hint_BCYX.to(device=self.device, dtype=self.dtype), self.config.model.patch_size)

    def prepare_prompt(self, context_BLE: Tensor, y_BA: Tensor) -> PreparedPrompt:
        """As the main model is given it, full: its text tokens of this rank and its pooled prompt, embedded."""
        own = context_BLE[:, slice(*own_text(context_BLE.shape[1], self.mesh))].to(self.dtype)
        return PreparedPrompt(context_BLE, y_BA, self.model.embedded(own, self._pooled(y_BA)))

    def at_steps(self, prepared: PreparedPrompt, timesteps: Sequence[float], most_bytes: int) -> list[PreparedPrompt]:
        """With `vectors`."""
        width = self.config.model.hidden * sum(module.count for module in self.model.modulations())
        return with_vectors(prepared, timesteps, most_bytes, width, self.model.vectors)

    def __call__(
        self,
        x_BCYX: Tensor,
        timesteps_B: Tensor,
        prepared: PreparedPrompt,
        prepared_BCYX: Tensor,
        step: Step,
        control_types: Sequence[int] = (),
    ) -> Residuals:
        """What is added to the main model's image tokens of this rank after each of its blocks, at strength 1.

        Args:
            x_BCYX, timesteps_B: full, as the main model gets them.
            prepared: from `prepare_prompt`; with `vectors` where these are there already.
            prepared_BCYX: of `prepare`; of as many rows as `x`, or of one for all.
            control_types: a union's; these are made for one kind, and take no notice.
            step: of no pipeline of patches. In displaced steps its `branch` is of this use alone, and the first evaluation
                of that is in sync. The main model ends the evaluation.
        Returns: (B, L, D) each; one that goes to several blocks is the same tensor.
        Raises: InputError: the latent and the hint are of different sizes, or too large.
        Comm: as attention and tp say, one all-reduce of each residual over tp, and under pp `x_embedder` where that is
            borrowed.
        """
        patch = self.config.model.patch_size
        whole = padded(x_BCYX.to(self.dtype), patch)
        self.check(prepared_BCYX, control_types, x_BCYX.shape)
        tokens = tokens_for(self._token_sizes, self.mesh, x_BCYX.shape[2], x_BCYX.shape[3], prepared.context.shape[1])
        x, hint = (tokens.take_image(patchify(t, patch)) for t in (whole, prepared_BCYX))
        x = self._embedded(x)
        if self.positions is not None:
            x = x + self.positions.rows(whole.shape[2] // patch, whole.shape[3] // patch, tokens.image)
        x = x + self.model.pos_embed_input(hint)
        vectors = vectors_at(prepared, timesteps_B, self.model.vectors)
        by_block = by_module(vectors, list(self.model.modulations()), self.config.model.hidden)
        outputs = self.model.run_blocks(prepared, x, by_block, Attend(self.attention, tokens, step))
        added = [out for out, count in zip(outputs, self.config.repeats, strict=True) for _ in range(count)]
        return Residuals(output=added[: self.base.config.depth])

    def check(self, prepared_BCYX: Tensor, control_types: Sequence[int], shape: Sequence[int]) -> None:
        """Raises: InputError: a hint that latents of that shape can't be computed with."""
        patch, sizes = self.config.model.patch_size, self._token_sizes
        limit = sizes.pos_embed_size
        if max(shape[2:]) > limit * patch:
            raise InputError(
                f"{shape[2] * 8}x{shape[3] * 8} pixels is larger than the ControlNet's position table.",
                f"Use sides of at most {limit * patch * 8} pixels with it.",
            )
        if [-(-side // patch) * patch for side in shape[2:]] != list(prepared_BCYX.shape[2:]):
            raise InputError(
                f"The ControlNet's hint is a latent of {prepared_BCYX.shape[3]}x{prepared_BCYX.shape[2]} cells, "
                f"the image's of {shape[3]}x{shape[2]}.",
                f"Scale the hint to {shape[3] * 8}x{shape[2] * 8} pixels before it is encoded.",
            )
        if prepared_BCYX.shape[0] not in (1, shape[0]):
            raise InputError(
                f"The ControlNet has {prepared_BCYX.shape[0]} hints for {shape[0]} images.",
                "Give one for all, or each one.",
            )

    @property
    def _token_sizes(self) -> MMDiTConfig:
        """Of those whose positions it has: its own, or, computed for any size, the main model's."""
        return self.base.config if self.config.image_only else self.config.model

    def _pooled(self, y_BA: Tensor) -> Tensor:
        if self.config.borrowed != "y_embedder":
            return y_BA.to(self.dtype)
        return self.base.y_embedder(y_BA.to(_dtype_of(self.base))).to(self.dtype)

    def _embedded(self, patches_BLP: Tensor) -> Tensor:
        """Tokens of patches, by the embedder of its own or by the main model's, which that one's first stage has.

        Comm: the main model's weights to the other stages.
        """
        if self.config.borrowed != "x_embedder":
            return self.model.x_embedder(patches_BLP)
        base, x = self.base, patches_BLP.to(_dtype_of(self.base))
        if base.mesh.pp.degree == 1:
            return base.x_embedder(x).to(self.dtype)
        weight, bias = self._of_first_stage("weight"), self._of_first_stage("bias")
        return F.linear(x, weight, bias).to(self.dtype)

    def _of_first_stage(self, leaf: str) -> Tensor:
        """A tensor of the main model's `x_embedder`, a kernel as a matrix."""
        base, config = self.base, self.base.config
        if base.is_first:
            own = base.x_embedder.proj[leaf]
            dense = own.dequantized() if isinstance(own, QuantizedWeight) else own.detach()
            dense = dense.flatten(1) if leaf == "weight" else dense
        else:
            columns = [config.channels * config.patch_size**2] if leaf == "weight" else []
            dense = torch.empty(config.hidden, *columns, dtype=_dtype_of(base), device=self.device)
        return broadcast(dense, 0, base.mesh.pp)


def _dtype_of(base: MMDiT) -> torch.dtype:
    return cast(Tensor, base.y_embedder.mlp["0"].bias).dtype
