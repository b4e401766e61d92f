"""SDXL's ControlNets in the UNet's bands: the UNet's encoder over again, what it gives after 1x1 convolutions.

Sources: Zhang et al. 2023 (arXiv 2302.05543); one model for several kinds of control image: xinsir's ControlNet++ (Union, ProMax).
Shapes: B rows, C latent channels, Y X latent cells, L text tokens, E context width, A micro-conditioning width, W the width of
the first block, T kinds of control image, D width of the timestep's embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import ControlNetModel
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor, nn

from ..distributed.mesh import Mesh, MeshAxis
from ..distributed.stale import Step
from ..errors import InputError, UnsupportedError
from .prepared import PreparedPrompt
from .residuals import Residuals
from .shallow_unet import shallow_residuals
from .unet import InBands, UNetConfig, with_joined_projections

# Pixels of a control image, in each direction, for one latent cell.
PIXELS = 8
# Of what is told of one kind of control image.
TYPE_FREQUENCIES = 256
_OF_OUTPUTS = ("out_channels", "up_block_types", "reverse_transformer_layers_per_block")


@dataclass(frozen=True)
class UNetControlConfig(UNetConfig):
    """Sizes of one ControlNet. It has no output blocks.

    Args:
        hint_channels: of its control image.
        control_types: kinds of control image that it is told; 0 where it is made for one.
        bare_middle: the middle has an attention's projections, and no transformer block between them: diffusers' small ones.
    """

    hint_channels: int = 3
    control_types: int = 0
    bare_middle: bool = False

    def diffusers(self) -> dict[str, Any]:
        """The settings of diffusers' ControlNetModel, which knows no model without a middle: see `loadable_unet_control`."""
        settings = {name: value for name, value in super().diffusers().items() if name not in _OF_OUTPUTS}
        if self.mid_depth is None:
            settings["mid_block_type"] = "UNetMidBlock2D"
        elif self.bare_middle:
            settings["mid_block_type"] = "UNetMidBlock2DCrossAttn"
        return settings | {"conditioning_channels": self.hint_channels}

    def check_fits(self, unet: UNetConfig, name: str) -> None:
        """Raises: UnsupportedError: that UNet's activations, or its prompts, are of other shapes than this ControlNet's."""
        for what in ("context_width", "pooled_width", "block_channels", "layers_per_block"):
            ours, theirs = getattr(self, what), getattr(unet, what)
            if ours != theirs:
                raise UnsupportedError(
                    f"{name} is made for another model: its {what} is {ours}, the model's {theirs}.",
                    "Choose a ControlNet of this model, or the model of this ControlNet.",
                )

    def check_types(self, control_types: Sequence[int]) -> None:
        """Raises: InputError: a kind of control image that this ControlNet isn't told. One made for one kind takes no notice."""
        unknown = [kind for kind in control_types if not 0 <= kind < self.control_types]
        if self.control_types and unknown:
            raise InputError(
                f"The ControlNet knows {self.control_types} control types, 0 to {self.control_types - 1}; type {unknown[0]} is asked for.",
                "Choose another type, or load the ProMax file of this ControlNet, which knows 8.",
            )


class ControlTypes(nn.Module):
    """What a ControlNet for several kinds of control image has more than others."""

    def __init__(self, width: int, embedding_width: int, control_types: int) -> None:
        super().__init__()
        self.task_embedding = nn.Parameter(torch.empty(control_types, width))
        self.embedding = TimestepEmbedding(TYPE_FREQUENCIES * control_types, embedding_width)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention_v, self.attention_out = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.project = nn.Linear(width, width)

    def embedded(self, control_types: Sequence[int]) -> Tensor:
        """(1, D): which kinds there are, as the timestep is told; with none of them too."""
        table = self.task_embedding
        present_T = torch.zeros(table.shape[0], device=table.device)
        for kind in control_types:
            present_T[kind] = 1.0
        frequencies = get_timestep_embedding(present_T, TYPE_FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.embedding(frequencies.flatten()[None].to(table.dtype))

    def shift(self, prepared_BWYX: Tensor, control_type: int) -> Tensor:
        """(B, W, 1, 1): added to the whole embedded image.

        A transformer layer over one token, the image's mean and its kind: attention then gives the token's own value.
        """
        token_BW = prepared_BWYX.mean((2, 3)) + self.task_embedding[control_type]
        token_BW = token_BW + self.attention_out(self.attention_v(self.norm_1(token_BW)))
        inner = self.mlp_in(self.norm_2(token_BW))
        token_BW = token_BW + self.mlp_out(inner * torch.sigmoid(1.702 * inner))
        return self.project(token_BW)[:, :, None, None]


class BandControlNet(InBands):
    """What a ControlNet adds to the UNet's activations at a latent: each rank has that of its own band.

    Args:
        model: a `loadable_unet_control` with its weights.
    Its layers' slots are another model's never; two ControlNets of one job, or two uses of one, differ in `step.branch`.
    """

    config: UNetControlConfig

    def __init__(self, model: Any, config: UNetControlConfig, mesh: Mesh, kernel: str) -> None:
        # Embeddings are computed here and given to diffusers' model, which takes them as they are.
        self.embed_hint, model.controlnet_cond_embedding = model.controlnet_cond_embedding, nn.Identity()
        self.embed_y, model.class_embedding = model.class_embedding, nn.Identity()
        self.types: ControlTypes | None = model.types
        super().__init__(model, config, mesh, kernel, path="control")

    def prepare(self, hint_BCYX: Tensor) -> Tensor:
        """The embedded control image (B, W, Y, X), whole on every rank. Once per job: no step changes it.

        Args:
            hint_BCYX: 8 times the latent's height and width, in 0 to 1, in the model's dtype and on its device.
        Raises: InputError: other channels than the model takes, or sizes that are no whole cells.
        """
        channels, rows, columns = hint_BCYX.shape[1:]
        if channels != self.config.hint_channels:
            raise InputError(
                f"The control image has {channels} channels; this ControlNet takes {self.config.hint_channels}.",
                "Give it the kind of image that it was made for.",
            )
        if rows % PIXELS or columns % PIXELS:
            raise InputError(
                f"The control image has {rows} x {columns} pixels (height x width), which are no whole latent cells.",
                f"Scale it to {PIXELS} times the latent's size.",
            )
        return self.embed_hint(hint_BCYX)

    def check(self, prepared_BWYX: Tensor, control_types: Sequence[int], shape: Sequence[int]) -> None:
        """Raises: InputError: a control image or types that latents of that shape can't be computed with."""
        self.config.check_types(control_types)
        _check_prepared(prepared_BWYX, shape)

    def __call__(
        self,
        x_BCYX: Tensor,
        timesteps_B: Tensor,
        prepared: PreparedPrompt,
        prepared_BWYX: Tensor,
        step: Step,
        control_types: Sequence[int] = (),
    ) -> Residuals:
        """This rank's band of what is added, at full strength: `output`, one for each input block, and `middle`; in a shallow step
        `output` of the first input block alone, and nothing else is computed.

        Args:
            x_BCYX: full latent, scaled as the model takes it, in the model's dtype.
            prepared: from `prepare_prompt`.
            prepared_BWYX: from `prepare`; of B rows, or of one for all.
            control_types: kinds of this image, for a model that is told them. As in ComfyUI the image is embedded as the first.
        Raises: InputError: a control image of another size than the latent's, or a kind that the model doesn't know; on every
            rank alike, before anything is sent.
        Comm: as the layers say. In displaced steps the caller ends the evaluation of the stale tensors.
        """
        self.check(prepared_BWYX, control_types, x_BCYX.shape)
        with self.cut(x_BCYX, prepared, step) as band:
            start, stop = band.own_rows
            hint_BWYX = prepared_BWYX[:, :, start:stop]
            if self.types is not None and control_types:
                hint_BWYX = hint_BWYX + self.types.shift(prepared_BWYX, control_types[0])
            if step.is_shallow:
                return shallow_residuals(self.model, x_BCYX, hint_BWYX)
            embedding_BD = self.embed_y(prepared.pooled)
            if self.types is not None:
                embedding_BD = embedding_BD + self.types.embedded(control_types)
            output, middle = self.model(
                x_BCYX, timesteps_B, prepared.context, hint_BWYX, class_labels=embedding_BD, return_dict=False
            )
        return Residuals(output=list(output), middle=middle)


def _check_prepared(prepared_BWYX: Tensor, shape: Sequence[int]) -> None:
    rows, (height, width) = prepared_BWYX.shape[0], shape[2:]
    if tuple(prepared_BWYX.shape[2:]) != tuple(shape[2:]):
        had = [PIXELS * cells for cells in prepared_BWYX.shape[2:]]
        raise InputError(
            f"The control image has {had[0]} x {had[1]} pixels (height x width); a latent of {height} x {width} takes "
            f"{PIXELS * height} x {PIXELS * width}.",
            f"Scale it to {PIXELS} times the latent's size.",
        )
    if rows not in (1, shape[0]):
        raise InputError(
            f"There are {rows} control images for {shape[0]} latents.", "Give one for all, or one for each."
        )


def loadable_unet_control(config: UNetControlConfig, mesh: Mesh) -> Any:
    """As `loadable_unet`, of a ControlNet, whose weights are never sliced: it may be on one prompt alone, and all ranks that share
    slices have to gather them together."""
    model = with_joined_projections(ControlNetModel, config, replace(mesh, weights=MeshAxis("weights")))
    if config.mid_depth is None:
        model.mid_block = None
    width = config.block_channels[0]
    model.types = ControlTypes(width, 4 * width, config.control_types) if config.control_types else None
    return model
