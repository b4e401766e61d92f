"""Outputs of layers that a sampling keeps from one evaluation for later ones, on one rank.

Shapes: B rows, L tokens of this rank's band, D width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..models.extra import Row
from ..models.spread import Spread, chosen

# Each is as large as all attention layers' outputs: a second client's sampling may take turns with the first one's.
MOST_SAMPLINGS = 2


@dataclass(frozen=True)
class _Kept:
    """This rank's rows of an output, and among which others they are."""

    own_BLD: Tensor
    spread: Spread


@dataclass(eq=False)
class KeptOutputs:
    """Those of one sampling, by layer. All ranks keep and take the same ones, in one order.

    Args:
        size: height and width of the latents that were evaluated last.
        rows: of all ranks, in the last evaluation whose outputs were kept.
    """

    size: tuple[int, int] | None = None
    rows: tuple[Row, ...] = ()
    _kept: dict[Hashable, _Kept] = field(default_factory=dict)
    # By latent, over prompts: made where it is first asked for.
    _means: dict[Hashable, Tensor] = field(default_factory=dict)

    def __contains__(self, layer: Hashable) -> bool:
        return layer in self._kept or layer in self._means

    def has_rows(self, layer: Hashable) -> bool:
        """Whether its rows are still there by themselves: once a mean was taken, that alone is."""
        return layer in self._kept

    def keep(self, layer: Hashable, out_BLD: Tensor, spread: Spread) -> None:
        """In place of what was kept of it before."""
        self.rows = spread.rows
        self._means.pop(layer, None)
        self._kept[layer] = _Kept(out_BLD, spread)

    def taken(self, layer: Hashable) -> Tensor:
        """This rank's rows, of an evaluation of as many rows as that in which they were kept."""
        return self._kept[layer].own_BLD

    def mean(self, layer: Hashable, rows: Sequence[Row]) -> Tensor:
        """Of the latents of these rows, the mean over the prompts that were evaluated together.

        Comm: the first time, all-gathers of all rows to the ranks that they are on.
        """
        if layer not in self._means:
            kept = self._kept.pop(layer)
            self._means[layer] = _over_prompts(kept.spread.gather(kept.own_BLD), kept.spread.rows)
        return chosen(self._means[layer], [latent for _, latent in rows])


class Samplings(OrderedDict[str, KeptOutputs]):
    """What is kept of the last few, by their names."""

    def of(self, name: str) -> KeptOutputs:
        """That of this one; the one that has waited for longest may be gone for it."""
        self[name] = self.pop(name) if name in self else KeptOutputs()
        while len(self) > MOST_SAMPLINGS:
            self.popitem(last=False)
        return self[name]


def _over_prompts(every_BLD: Tensor, rows: Sequence[Row]) -> Tensor:
    """(latents, L, D): rows are prompt by prompt, in an order that all ranks have."""
    latents = 1 + max(latent for _, latent in rows)
    parts = every_BLD.split(latents)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total / len(parts)
