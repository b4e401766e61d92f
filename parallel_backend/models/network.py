"""What a family's network looks like to those who ask it, whatever it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from ..distributed.sites import TransformerSites
from ..distributed.stale import Kept, StaleExchanges, Step
from ..errors import InputError, UnsupportedError
from .extra import Extra
from .inputs import Inputs
from .prepared import PreparedPrompt
from .residuals import NONE, Residuals, check_count, check_residual
from .steps_ahead import with_vectors
from .tokens import Tokens, padded
from .transformer import StagedTransformer


class Network(Protocol):
    """A model with its weights, in its mesh."""

    @property
    def step_caches(self) -> Sequence[str]:
        """The methods that it knows, the usual one first."""
        ...

    @property
    def config(self) -> Any: ...
    def check_size(self, height: int, width: int, text_tokens: int) -> None: ...
    def most_patches(self, height: int) -> int:
        """In how many parts that flow through a pipeline a latent of that height can be cut."""
        ...

    def new_job(self, displaced: bool, num_patches: int = 1) -> Kept:
        """Raises: UnsupportedError: displaced steps are asked for, and this model has none in its mesh."""
        ...

    def prepare(self, context: Tensor, pooled: Tensor) -> PreparedPrompt:
        """What evaluations take from a prompt alone, for all of them. Comm: where weights are sliced, those that it takes."""
        ...

    def at_steps(
        self, prepared: PreparedPrompt, timesteps: Sequence[float], most_bytes: int, /
    ) -> list[PreparedPrompt]:
        """As `Timed` says. Comm: under tp one all-gather."""
        ...

    def own_residuals(self, whole: Residuals, height: int, width: int) -> Residuals:
        """This rank's part of what is to be added in an evaluation of a latent of that size. Raises: InputError: it doesn't fit."""
        ...

    def inputs(
        self,
        x: Tensor,
        timesteps: Tensor,
        prepared: PreparedPrompt,
        step: Step,
        residuals: Residuals = NONE,
        extras: Sequence[Extra] = (),
        /,
    ) -> Inputs:
        """All that `evaluate` reads of a call, as tensors: what is looked up by a number of the step is looked up here."""
        ...

    def evaluate(self, inputs: Inputs, step: Step, /) -> Tensor:
        """The output. Of the step it looks at phase and branch, and at what the job keeps: a graph of it holds for other steps."""
        ...

    def __call__(
        self,
        x: Tensor,
        timesteps: Tensor,
        prepared: PreparedPrompt,
        step: Step,
        residuals: Residuals = NONE,
        extras: Sequence[Extra] = (),
        /,
    ) -> Tensor:
        """`evaluate` of `inputs`."""
        ...


class Positions(Protocol):
    """What a transformer is told of the places of image tokens."""

    def rows(self, rows: int, columns: int, ranges: Sequence[tuple[int, int]]) -> Tensor: ...


class TokenNetwork:
    """A transformer, bound to its positions."""

    step_caches = ("first_block", "teacache")

    def __init__(self, model: StagedTransformer, positions: Positions) -> None:
        self.model, self.positions, self.config = model, positions, model.config

    def check_size(self, height: int, width: int, text_tokens: int) -> None:
        """Raises: InputError: a latent that this model can't take."""
        self.model.tokens_for(height, width, text_tokens)

    def most_patches(self, height: int) -> int:
        return -(-height // self.config.patch_size)

    def new_job(self, displaced: bool, num_patches: int = 1) -> Kept:
        mesh = self.model.mesh
        if not displaced:
            return Kept()
        if mesh.pp.degree > 1:
            return Kept(token_kv={}, num_patches=num_patches)
        if mesh.ring.degree > 1:
            return Kept(stale=StaleExchanges(mesh.ring))
        raise UnsupportedError(
            f"{self.config.family} has displaced steps on two or more pp or ring ranks; here is {mesh.spec.describe()}.",
            "Set pp or ring in Mesh Config, or leave displaced off.",
        )

    def prepare(self, context: Tensor, pooled: Tensor) -> PreparedPrompt:
        """This rank's text tokens on the first stage, and the embedded pooled prompt."""
        return self.model.prepare(context, pooled)

    def at_steps(self, prepared: PreparedPrompt, timesteps: Sequence[float], most_bytes: int) -> list[PreparedPrompt]:
        """With `vectors`, of this stage."""
        return with_vectors(prepared, timesteps, most_bytes, self.model.vector_width, self.model.vectors)

    def own_residuals(self, whole: Residuals, height: int, width: int) -> Residuals:
        """This rank's tokens of residuals that are whole, (B, L, D). Raises: InputError: they don't fit."""
        if not whole:
            return whole
        config, patch = self.config, self.config.patch_size
        if whole.middle is not None or any(tensor is not None for tensor in whole.input):
            raise InputError("The ControlNet is one of a UNet.", f"Use one of {config.family}.")
        check_count(whole.output, config.depth, "output")
        tokens = self.model.tokens_for(height, width, text_tokens=1)
        sizes = [-(-height // patch) * -(-width // patch), config.hidden]

        def own(tensor: Tensor) -> Tensor:
            check_residual(tensor, "the image tokens", sizes)
            return tokens.take_image(tensor)

        return whole.each(own)

    def inputs(
        self,
        x: Tensor,
        timesteps: Tensor,
        prepared: PreparedPrompt,
        step: Step,
        residuals: Residuals = NONE,
        extras: Sequence[Extra] = (),
    ) -> Inputs:
        patch, (_, _, Y, X) = self.config.patch_size, x.shape
        num_patches = step.kept.num_patches if step.kept is not None else 1
        tokens = self.model.tokens_for(Y, X, prepared.context.shape[1], num_patches)
        places = self.places((*x.shape[:2], Y + -Y % patch, X + -X % patch), tokens)
        return Inputs(x, {"timesteps": timesteps}, prepared, {"places": places}, residuals, extras)

    def evaluate(self, inputs: Inputs, step: Step) -> Tensor:
        x, (timesteps, places) = inputs.x, (inputs.changing["timesteps"], inputs.lasting["places"])
        whole = padded(x, self.config.patch_size)
        sites = TransformerSites()
        for extra in inputs.extras:
            extra.on_transformer(sites)
        out = self.model(whole, timesteps, inputs.prepared, places, step, inputs.residuals, sites)
        if step.stale is not None:
            step.stale.end_evaluation()
        return out[:, :, : x.shape[2], : x.shape[3]]

    def __call__(
        self,
        x: Tensor,
        timesteps: Tensor,
        prepared: PreparedPrompt,
        step: Step,
        residuals: Residuals = NONE,
        extras: Sequence[Extra] = (),
    ) -> Tensor:
        return self.evaluate(self.inputs(x, timesteps, prepared, step, residuals, extras), step)

    def places(self, shape: Sequence[int], tokens: Tokens) -> Tensor:
        """Of this rank's tokens of a padded latent (B, C, Y, X)."""
        patch = self.config.patch_size
        return self.positions.rows(shape[2] // patch, shape[3] // patch, tokens.image)
