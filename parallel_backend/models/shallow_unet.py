"""The outermost blocks of a UNet by themselves, on what the deeper ones gave an earlier evaluation; and what a ControlNet gives them.

They are the first convolution and the last output block, which one skip connection joins: the shallowest cut, DeepCache's first skip
branch. On the small trained UNet the whole outermost level (the cut before) is no nearer to the exact picture and more work: at interval
2, 0.71 of it at 45.2 dB beside 0.64 at 45.4; of SDXL's evaluation at 1024 pixels it is 6.6 % of the operations, this 1.5 %. Two levels
are 57 dB at 0.92, which fewer reused evaluations give as well.
Source: DeepCache (Ma et al. 2023, arXiv 2312.00858), section 3.3.
Shapes: B rows, C channels, Y X cells of this rank's band, W the width of the first block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .residuals import Residuals


def shallow_output(
    model: Any, x_BCYX: Tensor, timesteps_B: Tensor, context_BLE: Tensor, given: Mapping[str, Any], deep_BCYX: Tensor
) -> Tensor:
    """What diffusers' model makes of `x`, of whose blocks it computes the first one going down and the last one going up.

    Args:
        given: as the model's own forward takes it by name: `class_labels`, residuals for the skip connections.
        deep_BCYX: as `on_deep` is told, in an evaluation of the same rows and sizes.
    """
    emb = model.time_embedding(model.get_time_embed(sample=x_BCYX, timestep=timesteps_B))
    emb = model.time_embed_act(emb + model.get_class_embed(sample=x_BCYX, class_labels=given["class_labels"]))
    skip, added = model.conv_in(x_BCYX), given.get("down_block_additional_residuals")
    if added is not None:
        skip = skip + added[0]
    up = model.up_blocks[-1]
    out = up.resnets[-1](torch.cat([deep_BCYX, skip], dim=1), emb)
    if getattr(up, "has_cross_attention", False):
        out = up.attentions[-1](out, encoder_hidden_states=context_BLE, return_dict=False)[0]
    return model.conv_out(model.conv_act(model.conv_norm_out(out)))  # type: ignore[no-any-return]


def on_deep(model: Any, tell: Callable[[Tensor], None]) -> None:
    """From now on, `tell` is called with what the deeper blocks give the last one going up, in each whole evaluation."""
    width = model.config.block_out_channels[0]

    def arrived(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        tell(inputs[0][:, :-width])  # before the skip connection's channels

    model.up_blocks[-1].resnets[-1].register_forward_pre_hook(arrived)


def shallow_residuals(model: Any, x_BCYX: Tensor, hint_BWYX: Tensor) -> Residuals:
    """That of diffusers' ControlNet which `shallow_output` uses, as its own forward gives it."""
    return Residuals(output=[model.controlnet_down_blocks[0](model.conv_in(x_BCYX) + hint_BWYX)])
