"""The outermost level of a UNet by itself, on what the deeper ones gave an earlier evaluation; and what a ControlNet gives it.

Source: DeepCache (Ma et al. 2023, arXiv 2312.00858), section 3.3.
Shapes: B rows, C channels, Y X cells of this rank's band, W the width of the first block, D width of the timestep's embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .residuals import Residuals


def shallow_output(
    model: Any, x_BCYX: Tensor, timesteps_B: Tensor, context_BLE: Tensor, given: Mapping[str, Any], deep_BCYX: Tensor
) -> Tensor:
    """What diffusers' model makes of `x`, of whose blocks it computes the first one going down and the last one going up.

    Args:
        given: as the model's own forward takes it by name: `class_labels`, residuals for the skip connections.
        deep_BCYX: what entered the last block going up, in an evaluation of the same rows and sizes.
    """
    emb = model.time_embedding(model.get_time_embed(sample=x_BCYX, timestep=timesteps_B))
    emb = model.time_embed_act(emb + model.get_class_embed(sample=x_BCYX, class_labels=given["class_labels"]))
    skips = _skips(model, x_BCYX, emb, context_BLE)
    added = given.get("down_block_additional_residuals")
    if added is not None:
        skips = [skip + residual for skip, residual in zip(skips, added, strict=False)]
    up = model.up_blocks[-1]
    prompt = {"encoder_hidden_states": context_BLE} if _attends(up) else {}
    out = up(hidden_states=deep_BCYX, temb=emb, res_hidden_states_tuple=tuple(skips), **prompt)
    return model.conv_out(model.conv_act(model.conv_norm_out(out)))  # type: ignore[no-any-return]


def shallow_residuals(
    model: Any, x_BCYX: Tensor, timesteps_B: Tensor, context_BLE: Tensor, hint_BWYX: Tensor, embedding_BD: Tensor
) -> Residuals:
    """Those of diffusers' ControlNet that `shallow_output` uses, as its own forward gives them."""
    times = model.time_proj(timesteps_B).to(x_BCYX.dtype)
    emb = model.time_embedding(times) + model.class_embedding(embedding_BD)
    skips = _skips(model, x_BCYX, emb, context_BLE, hint_BWYX)
    outs = zip(model.controlnet_down_blocks, skips, strict=False)  # the deeper levels' aren't made
    return Residuals(output=[out(skip) for out, skip in outs])


def _skips(
    model: Any, x_BCYX: Tensor, emb: Tensor, context_BLE: Tensor, hint_BWYX: Tensor | None = None
) -> list[Tensor]:
    """What the first block going down hands to the last one going up; `hint`: added to what goes into it."""
    down, x_BCYX = model.down_blocks[0], model.conv_in(x_BCYX)
    if hint_BWYX is not None:
        x_BCYX = x_BCYX + hint_BWYX
    skips = [x_BCYX]
    for number, resnet in enumerate(down.resnets):
        x_BCYX = resnet(x_BCYX, emb)
        if _attends(down):
            x_BCYX = down.attentions[number](x_BCYX, encoder_hidden_states=context_BLE, return_dict=False)[0]
        skips.append(x_BCYX)
    return skips


def _attends(block: nn.Module) -> bool:
    return bool(getattr(block, "has_cross_attention", False))
