"""What a picture's attentions come to for the ranks: keys, values and masks of all places, a row for each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...parallel_backend.errors import UnsupportedError
from ...parallel_backend.rpc.extras import ImagePrompt, PlaceName
from .asked_patch import Heard


def prompt_of(
    found: Sequence[tuple[PlaceName, Heard]], layout: Sequence[int], dtype: torch.dtype, **settings: Any
) -> ImagePrompt[Tensor] | None:
    """None where it adds nothing.

    Args:
        layout: which prompts the rows are of, as many rows for each. dtype: of the ranks' model.
        settings: the others of an ImagePrompt.
    Raises: UnsupportedError: different ones for two prompts that count as one.
    """
    places, tokens, parts, masks = [], [], [], []
    for place, one in found:
        most = one.share.abs().argmax(1, keepdim=True)
        weight_B1 = one.share.gather(1, most)
        if not weight_B1.any():
            continue
        places.append(place)
        tokens.append(one.k.shape[1])
        # All forms are linear in the values.
        parts.append(torch.cat([one.k.float(), one.v.float() * weight_B1[:, :, None]], dim=-1).flatten(1))
        masks.append(torch.where(weight_B1 != 0, one.share / weight_B1, 1.0))
    if not places:
        return None
    values, shares = torch.cat(parts, dim=1), torch.cat(masks, dim=1)
    rows = _distinct_rows(torch.cat([values, shares], dim=1), layout)
    chosen, named = list(rows), list(rows.values())
    is_masked = bool((shares != 1).any())
    return ImagePrompt(
        places=places,
        tokens=tokens,
        rows=named,
        keys_values=values[chosen].to(dtype).cpu(),
        masks=shares[chosen].to(dtype).cpu() if is_masked else None,
        **settings,
    )


def _distinct_rows(all_BN: Tensor, layout: Sequence[int]) -> dict[int, tuple[int, int | None]]:
    """By their number, those that are kept, and what for: a prompt has one where its latents' are alike."""
    named: dict[int, tuple[int, int | None]] = {}
    of_prompts: dict[int, Tensor] = {}
    latents = len(all_BN) // len(layout)
    for number, prompt in enumerate(layout):
        own = all_BN[number * latents : (number + 1) * latents]
        if prompt in of_prompts:
            if not torch.equal(own, of_prompts[prompt]):
                raise UnsupportedError(
                    "An image prompt gives two prompts of one kind, evaluated together, different keys and values.",
                    "Have one positive and one negative prompt, or remove the node that hangs it on the MODEL.",
                )
            continue
        of_prompts[prompt] = own
        alike = bool((own == own[:1]).all())
        named |= {number * latents + i: (prompt, None if alike else i) for i in range(1 if alike else latents)}
    return named
