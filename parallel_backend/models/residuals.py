"""What a ControlNet gives a diffusion model in one evaluation: tensors that are added to its activations.

Sources: Zhang et al. 2023 (arXiv 2302.05543); T2I-Adapter: Mou et al. 2023 (arXiv 2302.08453).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Residuals:
    """Tensors by the place at which they are added, each of this rank's band or tokens alone; None where nothing is.

    Args:
        input: of a UNet, (B, C, Y, X) to what each input block gives, in their order: the blocks of the single-file layout, the
            first of which is the first convolution.
        middle: of a UNet, to what the middle block gives.
        output: of a UNet, to what each input block hands on to the output blocks, in the input blocks' order; of a transformer,
            (B, L, D) to the image tokens after each block.
    """

    input: Sequence[Tensor | None] = ()
    middle: Tensor | None = None
    output: Sequence[Tensor | None] = ()

    def __bool__(self) -> bool:
        return next(self.tensors(), None) is not None

    def tensors(self) -> Iterator[Tensor]:
        return (tensor for tensor in (*self.input, self.middle, *self.output) if tensor is not None)

    def each(self, change: Callable[[Tensor], Tensor]) -> Residuals:
        """`change` done to every tensor; to one that stands in several places, once."""
        changed: dict[int, Tensor] = {}

        def done(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            if id(tensor) not in changed:
                changed[id(tensor)] = change(tensor)
            return changed[id(tensor)]

        return Residuals([done(t) for t in self.input], done(self.middle), [done(t) for t in self.output])

    def __add__(self, other: Residuals) -> Residuals:
        def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return b if a is None else a if b is None else a + b

        inputs = [both(a, b) for a, b in zip_longest(self.input, other.input)]
        outputs = [both(a, b) for a, b in zip_longest(self.output, other.output)]
        return Residuals(inputs, both(self.middle, other.middle), outputs)


NONE = Residuals()


def check_residual(tensor: Tensor, where: str, sizes: Sequence[int]) -> None:
    """Raises: InputError: it isn't (rows, *sizes)."""
    if list(tensor.shape[1:]) != list(sizes):
        raise InputError(
            f"A ControlNet's residual for {where} has shape {list(tensor.shape)}; this model and latent need (rows, "
            f"{', '.join(map(str, sizes))}).",
            "Use a ControlNet of the model's own family, and sides of the picture that divide by 64.",
        )


def check_count(tensors: Sequence[object], most: int, name: str) -> None:
    """Raises: InputError: more than the model has places."""
    if len(tensors) > most:
        raise InputError(
            f"A ControlNet has {len(tensors)} {name} residuals; this model has {most} places for them.",
            "Use a ControlNet of the model's own family.",
        )
