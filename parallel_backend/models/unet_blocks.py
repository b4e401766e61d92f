"""diffusers' UNet block by block, by the single-file layout's blocks: between them act extras that are named by these.

Shapes: B rows, C channels, Y rows of this rank's band, X columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from ..distributed.band import Band, Cut
from ..distributed.band_image import BandImage, Cutter
from ..distributed.sites import UNetSites
from .inputs import Inputs

Layers = Sequence[nn.Module]


@dataclass(frozen=True)
class BlockByBlock:
    """The model's output, as its own forward computes it, where something acts between its blocks.

    Args:
        places: `UNetConfig.places`.
        band: the layers' own: it follows an image that an extra makes smaller.
        cutter: cuts latents of any size.
    """

    model: Any
    places: Sequence[tuple[int, int]]
    band: Band
    cutter: Cutter

    def __call__(self, inputs: Inputs, sites: UNetSites) -> Tensor:
        """This rank's band. Comm: as layers and extras say; where sizes change, as `BandImage.resized`."""
        model, residuals, latent = self.model, inputs.residuals, self.band.cut
        embedding = model.time_embedding(model.get_time_embed(inputs.x, inputs.changing["timesteps"]))
        embedding = model.time_embed_act(embedding + model.get_class_embed(inputs.x, inputs.prepared.pooled))
        given = (embedding, inputs.prepared.context)
        added = partial(_with, latent, sites.scales_residuals)
        # The first convolution cuts the latent, which is whole until then.
        image = BandImage(inputs.x, latent, 0, self.cutter)
        skips: list[BandImage] = []
        for number, layers in enumerate(_input_blocks(model)):
            if (downsample := sites.downsample.get(number)) is not None:
                image = downsample(image, partial(_convolved, layers[0]))
            else:
                image = replace(self._run(layers, image, *given), level=self.places[number][1])
            skip, image = sites.after_block(number, added(_entry(residuals.input, number), image))
            skips.append(skip)
        if model.mid_block is not None:
            self.band.cut = image.latent
            out = model.mid_block(image.x, embedding, **_context_for(model.mid_block, inputs.prepared.context))
            image = image.with_band(out)
        image = added(residuals.middle, image)
        for work in sites.after_middle:
            changed = work(image)
            if image is skips[-1]:  # without a middle block they are one tensor, which ComfyUI changes in place
                skips[-1] = changed
            image = changed
        for number, (layers, upsamplers) in enumerate(_output_blocks(model)):
            skip = skips.pop()
            skip = added(_entry(residuals.output, len(skips)), skip)
            image, skip = sites.before_block(number, image, skip)
            image = self._run(layers, _joined(image, skip), *given)
            for upsampler in upsamplers:
                upsample = sites.upsample.get(number, _of_nearest)
                image = upsample(image, skips[-1], partial(self._upsampled, upsampler, skips[-1]))
        return model.conv_out(model.conv_act(model.conv_norm_out(image.x)))  # type: ignore[no-any-return]

    def _run(self, layers: Layers, image: BandImage, embedding: Tensor, context: Tensor) -> BandImage:
        self.band.cut, x = image.latent, image.x
        for layer in layers:
            if isinstance(layer, ResnetBlock2D):
                x = layer(x, embedding)
            elif isinstance(layer, Transformer2DModel):
                x = layer(x, encoder_hidden_states=context, return_dict=False)[0]
            else:
                x = layer(x)
        return image.with_band(x)

    def _upsampled(self, upsampler: nn.Module, skip: BandImage, image: BandImage) -> BandImage:
        """Of the latent of `skip`, its convolution done."""
        self.band.cut = skip.latent
        return skip.with_band(upsampler(image.x, skip.x.shape[2:]))


def _of_nearest(image: BandImage, skip: BandImage, convolve: Callable[[BandImage], BandImage]) -> BandImage:
    """In the size of the next skip connection, twice as large unless an extra has made one of them smaller."""
    return convolve(image if image.latent == skip.latent else image.resized_like(skip, "nearest"))


class _Kernel(nn.Module):
    """That of another convolution, with strides and places of its own."""

    def __init__(self, of: nn.Module, stride: int, dilation: int, columns: int) -> None:
        super().__init__()
        self.of: Any = of
        self.done: Any = {"stride": stride, "dilation": dilation, "padding": (0, columns)}

    def forward(self, x_BCYX: Tensor) -> Tensor:
        return F.conv2d(x_BCYX, self.of.weight, self.of.bias, **self.done)


def _convolved(downsampler: Any, x_BCYX: Tensor, *, stride: int, dilation: int, columns: int) -> Tensor:
    """By its kernel, as `Convolve` says. It is called, for what it does around that: with weights in slices it gathers them."""
    own = downsampler.conv
    downsampler.conv = _Kernel(own.conv, stride, dilation, columns)
    try:
        return downsampler(x_BCYX)  # type: ignore[no-any-return]
    finally:
        downsampler.conv = own


def _input_blocks(model: Any) -> Iterator[Layers]:
    yield [model.conv_in]
    for down in model.down_blocks:
        yield from _layers(down)
        yield from ([downsampler] for downsampler in down.downsamplers or ())


def _output_blocks(model: Any) -> Iterator[tuple[Layers, Layers]]:
    """Layers of each, and what makes the image larger at the end of a scale."""
    for up in model.up_blocks:
        *others, last = _layers(up)
        yield from ((layers, ()) for layers in others)
        yield last, up.upsamplers or ()


def _layers(block: Any) -> list[Layers]:
    """Of one of diffusers' blocks, those of each of its layers."""
    attentions = getattr(block, "attentions", None)
    return [[resnet] if attentions is None else [resnet, attentions[i]] for i, resnet in enumerate(block.resnets)]


def _context_for(middle: Any, context: Tensor) -> dict[str, Any]:
    return {"encoder_hidden_states": context} if getattr(middle, "has_cross_attention", False) else {}


def _entry(side: Sequence[Tensor | None], number: int) -> Tensor | None:
    return side[number] if number < len(side) else None


def _with(latent: Cut, scales: bool, residual: Tensor | None, image: BandImage) -> BandImage:
    """The residual added, which is of the latent's size: to an image that an extra made smaller only where it `scales`, as in ComfyUI."""
    if residual is None:
        return image
    if image.sides == latent.halved(image.level).sides:
        image = image.cut_as(latent)
    elif not scales:
        return image
    else:
        residual = BandImage(residual, latent, image.level, image.cutter).resized_like(image, "bilinear").x
    return image.with_band(image.x + residual)


def _joined(image: BandImage, skip: BandImage) -> BandImage:
    """Channels of both. Raises: RuntimeError: extras have left them in two sizes, perhaps on the ranks of some rows alone."""
    if image.sides != skip.sides:
        ours, theirs = (f"{height} x {width}" for height, width in (image.sides, skip.sides))
        raise RuntimeError(
            f"An output block has {ours} values (height x width), and {theirs} to join them with: the nodes that make blocks smaller "
            "need one factor."
        )
    return skip.with_band(torch.cat([image.cut_as(skip.latent).x, skip.x], dim=1))
