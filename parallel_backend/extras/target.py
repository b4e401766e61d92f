"""What an extra is made ready for: a model in its mesh, and latents of one size."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..distributed.band import Cut
from ..distributed.sites import Place
from ..errors import InputError
from ..models.mmdit import MMDiT
from ..models.network import TokenNetwork
from ..models.prediction import Predictor
from ..models.unet import BandUNet
from .kept_outputs import Samplings


@dataclass(frozen=True)
class Target:
    """`height` and `width` are the latent's.

    `samplings` have what extras keep from one evaluation for later, `made` what was made of tensors for models, as long as these are kept.
    """

    predictor: Predictor
    height: int
    width: int
    samplings: Samplings = field(default_factory=Samplings)
    made: MutableMapping[Tensor, list[tuple[ref[Predictor], Tensor]]] = field(default_factory=WeakIdKeyDictionary)

    @property
    def config(self) -> Any:
        """The network's."""
        return self.predictor.network.config

    @property
    def unet(self) -> BandUNet | None:
        """The network, where it is one."""
        network = self.predictor.network
        return network if isinstance(network, BandUNet) else None

    @property
    def mmdit(self) -> MMDiT | None:
        network = self.predictor.network
        model = network.model if isinstance(network, TokenNetwork) else None
        return model if isinstance(model, MMDiT) else None

    @property
    def places(self) -> Container[Place]:
        """Of a UNet's transformer blocks; a transformer has none of these."""
        return self.unet.places if self.unet is not None else ()

    def sides_at(self, place: Place) -> tuple[int, int]:
        """Rows and columns of tokens that the latent has at one of `places`."""
        return self._cut_at(place).sides

    def own_tokens(self, place: Place) -> range:
        """Those of this rank's band there, counted row by row."""
        cut = self._cut_at(place)
        first, last = cut.own_rows
        return range(first * cut.columns, last * cut.columns)

    def _cut_at(self, place: Place) -> Cut:
        assert self.unet is not None
        side, number, _ = place
        levels = [level for _, level in self.config.places]
        index = {"input": number, "output": -1 - number}.get(side, -1)
        return self.unet.cut_of(self.height, self.width).halved(levels[index])

    def here(self, tensor: Tensor) -> Tensor:
        """On the device and in the dtype of the model."""
        # Always another tensor: what was made of one is kept as long as that one is.
        return tensor.to(self.predictor.device, self.predictor.dtype, copy=True)

    def once(self, tensor: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """`make(tensor)`, made once for this model as long as the tensor is kept: for what is too large to be made at each evaluation.

        Args:
            make: the same for all that ask for this tensor; what it gives doesn't hold the tensor.
        """
        kept = [one for one in self.made.get(tensor, ()) if one[0]() is not None]
        found = next((own for model, own in kept if model() is self.predictor), None)
        if found is None:
            found = make(tensor)
            self.made[tensor] = [*kept, (ref(self.predictor), found)]
        return found


def check_known(named: Iterable[Any], known: Container[Any], what: str, target: Target) -> None:
    """Raises: InputError: one that the model hasn't."""
    for name in named:
        if name not in known:
            told = " ".join(map(str, name)) if isinstance(name, tuple) else str(name)
            raise InputError(
                f"{what[0].upper()}{what[1:]} {told} is named; this {target.config.family} has none of that number.",
                f"Name {what}s that it has, or remove the node that names it.",
            )
