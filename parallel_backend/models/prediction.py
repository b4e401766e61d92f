"""One call of a resident model for rows of latents, spread over the mesh; with guidance, over cfg as well."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from weakref import ref

import torch
from torch import Tensor

from ..config import MeshSpec
from ..distributed.collectives import split_sizes
from ..distributed.mesh import Mesh, MeshAxis
from ..distributed.stale import Step
from ..errors import InputError
from .captured import CapturedNetwork
from .compiled import FirstTimes
from .extra import Extra
from .families import Kind
from .network import Network
from .prepared import PreparedPrompt, PreparedPrompts
from .reports import ReportingExtra
from .rows import Branch, Prompt, Rows
from .share import Call, Share
from .spread import Spread
from .unet import micro_conditioning

# On the device: cond, uncond and what a few others take turns with.
KEPT_PROMPTS = 8
# What networks have made of prompts that step by step sampling asks with: SDXL's keys and values are 27 MB a row.
KEPT_PREPARED = 4


@dataclass(frozen=True)
class _Ready:
    """A prompt as the model takes it, and the tensors that it was made of, as long as these are kept."""

    context: ref[Tensor]
    pooled: ref[Tensor]
    prompt: Prompt


def timesteps_of(timestep: Tensor, rows: int, device: torch.device) -> Tensor:
    """(rows,), fp32: one timestep, given on the CPU, for all rows.

    A GPU gets the number with the kernel that writes it: nothing is copied, and nobody waits.
    """
    return torch.full((rows,), float(timestep), dtype=torch.float32, device=device)


@dataclass
class Predictor:
    """A model in its mesh, ready to be asked.

    `captured` evaluates the network by graphs, where it is asked to; `compiling` tells of what is compiled, where blocks are.
    """

    network: Network
    mesh: Mesh
    dtype: torch.dtype
    device: torch.device
    kind: Kind
    captured: CapturedNetwork | None = field(init=False, default=None)
    compiling: FirstTimes | None = field(init=False, default=None)
    prepared: PreparedPrompts = field(init=False, default_factory=lambda: PreparedPrompts(KEPT_PREPARED))
    _prompts: OrderedDict[tuple[object, ...], _Ready] = field(init=False, default_factory=OrderedDict)

    @property
    def spec(self) -> MeshSpec:
        return self.mesh.spec

    def take_notes(self) -> list[str]:
        """What the user should know of its graphs since the last time."""
        return [] if self.captured is None else self.captured.take_notes()

    def check_latent(self, x: Tensor, text_tokens: int) -> None:
        """Raises: InputError: a latent that this model can't take."""
        channels = self.network.config.channels
        if x.ndim != 4 or x.shape[1] != channels:
            raise InputError(
                f"A latent of shape {list(x.shape)} came; this model needs (batch, {channels}, height / 8, width / 8).",
                self.kind.latent_remedy,
            )
        self.network.check_size(x.shape[2], x.shape[3], text_tokens)

    def check_input(self, x: Tensor, text_tokens: int) -> None:
        """As `check_latent`, of a latent that has its extra channels already."""
        channels, extra = self.network.config.channels, self.network.config.extra_channels
        if x.ndim != 4:
            self.check_latent(x, text_tokens)
        if x.shape[1] > channels and x.shape[1] != channels + extra:
            raise InputError(
                f"An input of {x.shape[1]} channels came; this model takes {self._taken()}.",
                f"{self.kind.latent_remedy} Leave out what puts others beside the latent (c_concat), or load the model for them.",
            )
        if extra and x.shape[1] == channels:
            self.concat(None, x)
        self.check_latent(x[:, :channels], text_tokens)

    def concat(self, given: Tensor | None, latent: Tensor) -> Tensor | None:
        """What goes in beside the latent: a row for each of its own, repeated where there are fewer, cut where there are more.

        Raises: InputError: this model takes none, or others.
        """
        extra = self.network.config.extra_channels
        if given is None and not extra:
            return None
        wanted = f"(batch, {extra}, {latent.shape[2]}, {latent.shape[3]})"
        if given is None:
            raise InputError(
                f"Nothing came beside the latent; this model takes {self._taken()}.",
                f"Give each Conditioning its concat of shape {wanted}: an inpainting model's mask and masked latent, an edit model's "
                "latent. ComfyUI makes it itself.",
            )
        if given.ndim != 4 or given.shape[0] < 1 or given.shape[1] != extra or given.shape[2:] != latent.shape[2:]:
            raise InputError(
                f"A concat of shape {list(given.shape)} came beside the latent; this model takes {self._taken()}.",
                f"Give it the shape {wanted}." if extra else "Leave it out, or load the model that it is for.",
            )
        return self._repeated(given, latent.shape[0]).to(self.device, self.dtype)

    def _taken(self) -> str:
        channels, extra = self.network.config.channels, self.network.config.extra_channels
        return f"the latent's {channels} and {extra} beside them" if extra else f"the latent's {channels} alone"

    def prompt(self, context: Tensor, pooled: Tensor, rows: int, sizes: Sequence[float] | None = None) -> Prompt:
        """A prompt for `rows` latents: repeated where it has fewer rows, cut where it has more.

        Of the same two tensors it is made once: a sampling step by step asks with them at every evaluation.

        Args:
            sizes: of micro-conditioning, where `pooled` doesn't hold them embedded already.
        Raises: InputError: widths of another model.
        """
        key = (id(context), id(pooled), rows, tuple(sizes or ()))
        ready = self._prompts.pop(key, None)
        if ready is None or ready.context() is not context or ready.pooled() is not pooled:
            ready = _Ready(ref(context), ref(pooled), self._checked_prompt(context, pooled, rows, sizes))
        self._prompts[key] = ready
        while len(self._prompts) > KEPT_PROMPTS:
            self._prompts.popitem(last=False)
        return ready.prompt

    def _checked_prompt(self, context: Tensor, pooled: Tensor, rows: int, sizes: Sequence[float] | None) -> Prompt:
        config = self.network.config
        if sizes is not None and pooled.ndim == 2:
            pooled = micro_conditioning(pooled, sizes)
        for tensor, dims, width, name in (
            (context, 3, config.context_width, "conditioning"),
            (pooled, 2, config.pooled_width, "pooled conditioning"),
        ):
            if tensor.ndim != dims or tensor.shape[-1] != width or tensor.shape[0] < 1:
                raise InputError(
                    f"The {name} has shape {list(tensor.shape)}; this model needs {dims} dims, the last of {width}.",
                    self.kind.prompt_remedy,
                )
        context, pooled = (self._repeated(t, rows).to(self.device, self.dtype) for t in (context, pooled))
        return Prompt(context, pooled)

    @staticmethod
    def _repeated(x: Tensor, rows: int) -> Tensor:
        return x.repeat(-(-rows // x.shape[0]), *[1] * (x.ndim - 1))[:rows] if x.shape[0] != rows else x

    def output(self, rows: Rows, sigma: float | None = None) -> Tensor:
        """The first of `output_and_reports`."""
        return self.output_and_reports(rows, sigma)[0]

    def output_and_reports(self, rows: Rows, sigma: float | None = None) -> list[Tensor]:
        """The model's output, fp32, exact; its rows spread over cfg, then dp: for callers that have made one batch of all.

        What is made of a prompt is made once for the same prompt, by identity. Of the rows' extras, those act that do at `sigma`. After it come what those extras that report have of
        all rows, in their order.
        Comm: the model's, `Network.prepare`'s, and one all-gather of each result over dp and one over cfg.
        """
        context, pooled = rows.prompt.context, rows.prompt.pooled
        stages, local = list[tuple[MeshAxis, tuple[int, ...]]](), rows
        for axis in self._axes_of(rows):
            stages.insert(0, (axis, tuple(split_sizes(local.x.shape[0], axis.degree))))
            local = local.share(axis)
        local = replace(local, spread=Spread(rows.which, tuple(stages)))
        call = self._prepared(local.prompt, lambda net, make: self.prepared.of(net, context, pooled, make))
        out = self._local(local, call, Step(sigma=sigma))
        reporting = [extra.of(local.which) for extra in rows.extras if isinstance(extra, ReportingExtra)]
        reports = [extra.take(self.device) for extra in reporting]
        return [local.spread.gather(result) for result in (out, *reports)]

    def _axes_of(self, rows: Rows) -> list[MeshAxis]:
        """Those over which these rows are spread, the outer first."""
        mesh, count = self.mesh, rows.x.shape[0]
        # Ranks that hold slices of one model's weights gather them together: all of them have rows, or none has.
        least, more = divmod(count, mesh.cfg.degree)
        uneven = mesh.weights.degree > 1 and more > 0 and least < mesh.dp.degree
        axes = [mesh.dp] if uneven else [mesh.cfg, mesh.dp]
        # What mixes rows exchanges them in each layer: all ranks of such an axis must have some.
        if any(extra.pairs for extra in rows.extras):
            axes, wanted = [], axes
            for axis in wanted:
                if count >= axis.degree:
                    axes.append(axis)
                    count //= axis.degree
        return axes

    def share(self, rows: int, prompts: Sequence[Prompt], extras: Sequence[Extra] = ()) -> Share:
        """What this rank computes of evaluations of `rows` latents with these prompts (cond, uncond), for a whole job.

        It holds as long as the weights stay. Comm: `Network.prepare`'s.
        """
        return self.share_of(rows, [Branch(prompt, number, tuple(extras)) for number, prompt in enumerate(prompts)])

    def share_of(self, rows: int, branches: Sequence[Branch]) -> Share:
        """As `share`, of branches that may differ in more than their prompts."""

        def prepare(prompt: Prompt) -> Call:
            return self._prepared(prompt, lambda _, make: make())

        return Share.of(self.network, self.mesh, rows, branches, prepare)

    def _prepared(self, prompt: Prompt, get: Callable[[object, Callable[[], PreparedPrompt]], PreparedPrompt]) -> Call:
        """`get`: (network, how to make it) -> what that network makes of the prompt."""
        context, pooled = prompt.context, prompt.pooled
        if context.shape[0] == 0:
            nothing = PreparedPrompt(context, pooled, {})
            return Call(prompt, nothing, tuple(nothing for _ in prompt.controls))
        own = get(self.network, lambda: self.network.prepare(context, pooled))
        uses = [(use.network, partial(use.network.prepare_prompt, context, pooled)) for use in prompt.controls]
        return Call(prompt, own, tuple(get(*use) for use in uses))

    def outputs(self, x: Tensor, timestep: Tensor, share: Share, step: Step) -> list[Tensor]:
        """The model's output for each branch (cond, uncond, others), fp32; branches spread over cfg, the batch over dp.

        Args:
            x: (B, C, Y, X), of as many rows as `share` is of.
            timestep: one for all rows, on the CPU.
        Comm: the model's, `Share.at`'s and `Share.gather`'s.
        """
        own = share.own_rows(x)
        times = timesteps_of(timestep, own.shape[0], self.device)
        outputs = [
            self._local(
                Rows(own, times, call.prompt, extras=call.extras, which=call.which, spread=call.spread),
                call,
                replace(step, branch=branch),
            )
            for branch, call in enumerate(share.at(timestep, step.sigma))
        ]
        return share.gather(outputs)

    def _local(self, rows: Rows, call: Call, step: Step) -> Tensor:
        x, prompt = rows.x, rows.prompt
        if x.shape[0] == 0:  # fewer rows than ranks of dp: all ranks of this share wait together
            if step.cache is not None:  # which ranks decide together
                step.cache.taken()
            return x[:, : self.network.config.channels].float()
        own = self.network.own_residuals(rows.residuals, x.shape[2], x.shape[3])
        added, given = own.each(lambda tensor: tensor.to(self.device, self.dtype)), x.to(self.dtype)
        latent = given[:, : self.network.config.channels]  # what lies beside it is the model's alone
        for use, prepared in zip(prompt.controls, call.controls, strict=True):
            added = added + use.residuals(latent, rows.timesteps, prepared, step)
        if prompt.concat is not None:
            given = torch.cat([given, prompt.concat], dim=1)
        evaluate = self.captured or self.network
        sigma, acting = step.sigma, [extra.of(rows.which) for extra in rows.extras if extra.is_at(step.sigma)]
        extras = tuple(extra.at(sigma).among(rows.spread) for extra in acting)
        kind = (prompt.context.shape[1], step.phase)
        with nullcontext() if self.compiling is None else self.compiling.told(x, *kind):
            return evaluate(given, rows.timesteps, call.own, step, added, extras).float()
