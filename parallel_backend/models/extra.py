"""What hangs inside a model, as one rank applies it: in places of its network, at evaluations between two sigmas.

An image prompt, skipped blocks, a perturbed attention. The kinds are in `parallel_backend/extras`, one file each.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

from torch import Tensor

from ..distributed.sites import BlockName, TransformerSites, UNetSites

if TYPE_CHECKING:
    from .spread import Spread

# Numbers of prompts; others come as they do.
COND, UNCOND = 0, 1
# A row of an evaluation: of which prompt it is, and which latent of a batch.
Row: TypeAlias = tuple[int, int]
E = TypeVar("E", bound="Extra")


@dataclass(frozen=True, kw_only=True)
class Extra:
    """One of them. Its fields are numbers, names and tensors, in tuples and mappings: what a graph of an evaluation must know.

    Args:
        start, end: sigmas; it acts from the first on, which is the greater one, to the second, both included.
    """

    start: float = inf
    end: float = 0.0
    _of_rows: dict[tuple[Row, ...], Any] = field(init=False, repr=False, compare=False, default_factory=dict)

    # As errors call it.
    name: ClassVar[str] = "an extra"
    # It acts on each token by itself, so that displaced steps, in which others' tokens are old, can have it.
    by_token: ClassVar[bool] = False
    # It mixes rows of both prompts, which are evaluated at once.
    pairs: ClassVar[bool] = False

    # It mixes rows of other latents of the batch, too.
    across_batch: ClassVar[bool] = False
    # It keeps something from an evaluation for later, which no graph may hold.
    has_memory: ClassVar[bool] = False
    # Attentions that it acts on are not computed: ranks tell each other nothing there.
    omits_attention: ClassVar[bool] = False
    # Text beyond that of the latents' rows goes through a transformer with it.
    has_text: ClassVar[bool] = False
    # It acts on what a UNet's blocks give each other.
    between_blocks: ClassVar[bool] = False
    # The blocks within see a picture of another size than the latent's.
    resizes: ClassVar[bool] = False
    # It is another one at nearly every evaluation, so that graphs of them would not be done again.
    is_drawn: ClassVar[bool] = False

    @property
    def comes_and_goes(self) -> bool:
        """Whether an attention that it omits is computed in some steps, and not in others."""
        return self.omits_attention and (self.start < inf or self.end > 0)

    @property
    def has_sizes(self) -> bool:
        """Whether it holds something for each token that a latent of its size has at its places."""
        return False

    def is_at(self, sigma: float | None) -> bool:
        """Whether it acts there; outside of a sampling, where no sigma is known, it does."""
        return sigma is None or self.end <= sigma <= self.start

    def meets(self, other: Extra) -> bool:
        """Whether both act at some sigma."""
        return min(self.start, other.start) >= max(self.end, other.end)

    def check(self, branches: Iterable[int]) -> None:
        """Before the first evaluation, on every rank. Raises: InputError: it has nothing for rows of one of these branches."""

    def check_beside(self, others: Sequence[Extra]) -> None:
        """As `check`, of all that come with it. Raises: InputError: it can't act without another, or beside one."""

    def check_tokens(self, tokens: int) -> None:
        """As `check`, of the prompt's tokens. Raises: InputError: a prompt of so many can't be computed with it."""

    def check_inside(self, sides: Mapping[BlockName, tuple[int, int]]) -> None:
        """As `check`, of the rows and columns of tokens that each block has, whatever resizes them. Raises: InputError: it has
        something for others."""

    def of(self: E, rows: tuple[Row, ...]) -> E:
        """That of an evaluation of these rows; the same object for the same rows."""
        if rows not in self._of_rows:
            self._of_rows[rows] = self._chosen(rows)
        return self._of_rows[rows]  # type: ignore[no-any-return]

    def _chosen(self: E, rows: Sequence[Row]) -> E:
        """As `of`, made now. What does not differ by row is the same for all."""
        return self

    def at(self, sigma: float | None) -> Extra:
        """What is evaluated there; None where no sigma is known. It may differ from sigma to sigma in its tensors alone."""
        return self

    def among(self, spread: Spread) -> Extra:
        """That of this rank's rows among all that are evaluated at once."""
        return self

    def on_unet(self, sites: UNetSites) -> None:
        """It is put in its places. Where a family has none, it has no effect, as in ComfyUI."""

    def on_transformer(self, sites: TransformerSites) -> None:
        """As `on_unet`."""

    def tensors(self) -> Iterator[Tensor]:
        """In a fixed order."""
        return (tensor for value in self._values() for tensor in _tensors(value))

    def form(self) -> Hashable:
        """All but the tensors' values. Where it acts is not part of it: only those that act are evaluated."""
        return type(self), *(_form(value) for value in self._values())

    def each(self: E, change: Callable[[Tensor], Tensor]) -> E:
        """`change` done to every tensor."""
        own = {f.name: _each(getattr(self, f.name), change) for f in fields(self) if f.init}
        return replace(self, **own)

    def _values(self) -> list[Any]:
        return [getattr(self, f.name) for f in fields(self) if f.init and f.name not in ("start", "end")]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (tensor for part in value.values() for tensor in _tensors(part))
    elif isinstance(value, tuple):
        yield from (tensor for part in value for tensor in _tensors(part))


def _form(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return None  # shapes, strides and dtypes are looked at where all tensors are
    if isinstance(value, Mapping):
        return tuple((key, _form(part)) for key, part in value.items())
    if isinstance(value, tuple):
        return tuple(_form(part) for part in value)
    return value  # type: ignore[no-any-return]


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _each(part, change) for key, part in value.items()}
    return tuple(_each(part, change) for part in value) if isinstance(value, tuple) else value
