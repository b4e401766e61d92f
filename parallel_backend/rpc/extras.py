"""What hangs inside a model, as requests name it: one struct a kind, of numbers, names and tensors.

In a request a tensor is its place among the request's tensors (T is int); a client gives the tensor itself (T is Tensor), and a
rank has it again. Which fields hold tensors, each struct says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias, TypeVar

import msgspec
from msgspec import Struct

T = TypeVar("T")
X = TypeVar("X", bound="ExtraSpec")
# See distributed/sites.py.
PlaceName: TypeAlias = tuple[str, int, int]


class ExtraSpec(Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """Of any kind.

    Args:
        start, end: sigmas between which it acts; None from the first, or to the last.
    """

    start: float | None = None
    end: float | None = None

    tensor_fields: ClassVar[tuple[str, ...]] = ()
    # An evaluation with it gives a tensor of its rows back, after the output.
    reports: ClassVar[bool] = False
    # It mixes rows of both prompts, which are evaluated at once.
    pairs: ClassVar[bool] = False

    def each(self: X, change: Callable[[Any], Any]) -> X:
        """`change` done to every tensor, in a fixed order."""
        return msgspec.structs.replace(
            self, **{name: _each(getattr(self, name), change) for name in self.tensor_fields}
        )

    def tensors(self) -> list[Any]:
        """Those that it names, each as often as it does."""
        found: list[Any] = []
        self.each(found.append)
        return found


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _each(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_each(part, change) for part in value]
    return None if value is None else change(value)


class SkipBlocks(ExtraSpec, frozen=True):
    """These joint blocks of an MMDiT hand text and image tokens on as they came: skip-layer guidance's weaker model."""

    blocks: list[int]


class PerturbedAttention(ExtraSpec, frozen=True):
    """Self-attentions of a UNet in which each token sees itself alone.

    Source: perturbed-attention guidance (Ahn et al. 2024, arXiv 2403.17377), section 4.
    """

    places: list[PlaceName]


class BlurQueries(ExtraSpec, frozen=True):
    """Self-attentions of a UNet whose queries are blurred over the picture: smoothed energy guidance's weaker model.

    Source: Hong 2024 (arXiv 2408.00760), section 4.2.

    Args:
        blur: the Gaussian's standard deviation in tokens; None: each query is the mean of all.
    """

    places: list[PlaceName]
    blur: float | None


class NormalizedGuidance(ExtraSpec, frozen=True):
    """What a UNet's self-attentions give for cond, guided away from what they give for uncond; its L1 norm grows `tau`-fold at most.

    Does nothing where one of the two is not evaluated. Source: normalized attention guidance (Chen et al. 2025, arXiv 2505.21179).

    Args:
        alpha: how much of that takes the place of what they give for cond.
    """

    scale: float
    alpha: float
    tau: float
    pairs = True


class ReportScores(ExtraSpec, frozen=True):
    """How much each token is looked at in a UNet's self-attention: the report, of all tokens of the picture, is their softmax scores
    summed over queries, their mean over heads; of uncond's rows, zeros of others.

    Source: self-attention guidance (Hong et al. 2023, arXiv 2210.00939), section 4.2.
    """

    place: PlaceName
    reports = True


class TiledAttention(ExtraSpec, frozen=True):
    """Self-attentions of a UNet in tiles of queries, each of which looks at a strip of tokens: see extras/tiled_attention.py.

    Args:
        tiles: by place, tiles along both sides of the grid as which tokens are counted, and the grid's sides.
    """

    places: list[PlaceName]
    tiles: list[tuple[int, int, int, int]]


AnyExtra: TypeAlias = SkipBlocks | PerturbedAttention | BlurQueries | NormalizedGuidance | ReportScores | TiledAttention
