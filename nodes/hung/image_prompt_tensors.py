"""What a picture's attentions come to for the ranks: keys, values and masks of all places, a row for each prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor

from ...parallel_backend.errors import UnsupportedError
from ...parallel_backend.rpc.extras import ImagePrompt, PlaceName
from .asked_patch import Heard
from .prompt_rows import PromptRow


def prompts_of(
    found: Sequence[tuple[PlaceName, Heard]], rows: Sequence[PromptRow], dtype: torch.dtype, **settings: Any
) -> list[ImagePrompt[Tensor]]:
    """One, or none where it adds nothing; beside regional prompts one for each set of a row's prompts to which it adds the same.

    Args:
        rows: of which the tensors are. dtype: of the ranks' model.
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
        return []
    values, shares = torch.cat(parts, dim=1), torch.cat(masks, dim=1)
    both, is_masked = torch.cat([values, shares], dim=1), bool((shares != 1).any())
    made: list[tuple[Tensor, ImagePrompt[Tensor]]] = []
    for prompt, of_prompt in _by_prompt(rows).items():
        named = _distinct_rows(both, of_prompt)
        chosen = list(named)
        regions = None if prompt is None else [prompt]
        before = made[-1] if made else None
        if before and before[1].rows == list(named.values()) and torch.equal(before[0], both[chosen]):
            regions = [*(before[1].regions or ()), *(regions or ())]
            made[-1] = before[0], msgspec.structs.replace(before[1], regions=regions)
            continue
        asked = ImagePrompt(
            places=places,
            tokens=tokens,
            rows=list(named.values()),
            keys_values=values[chosen].to(dtype).cpu(),
            masks=shares[chosen].to(dtype).cpu() if is_masked else None,
            regions=regions,
            **settings,
        )
        made.append((both[chosen], asked))
    return [asked for _, asked in made]


def _by_prompt(rows: Sequence[PromptRow]) -> Mapping[int | None, Mapping[int, PromptRow]]:
    """Rows by their number, of each prompt that rows attend to; those of uncond have their own alone."""
    found: dict[int | None, dict[int, PromptRow]] = {}
    for number, row in enumerate(rows):
        found.setdefault(row.prompt, {})[number] = row
    return found


def _distinct_rows(all_BN: Tensor, rows: Mapping[int, PromptRow]) -> dict[int, tuple[int, int | None]]:
    """By their number, those that are kept, and what for: a branch has one where its latents' are alike."""
    by_entry: dict[int, list[int]] = {}
    for number, row in rows.items():
        by_entry.setdefault(row.entry, []).append(number)
    named: dict[int, tuple[int, int | None]] = {}
    of_branches: dict[int, Tensor] = {}
    for numbers in by_entry.values():
        branch, own = rows[numbers[0]].branch, all_BN[numbers]
        if branch in of_branches:
            if not torch.equal(own, of_branches[branch]):
                raise UnsupportedError(
                    "An image prompt gives two prompts of one kind, evaluated together, different keys and values.",
                    "Have one positive and one negative prompt, or remove the node that hangs it on the MODEL.",
                )
            continue
        of_branches[branch] = own
        alike = bool((own == own[:1]).all())
        kept = numbers[:1] if alike else numbers
        named |= {number: (branch, None if alike else rows[number].latent) for number in kept}
    return named
