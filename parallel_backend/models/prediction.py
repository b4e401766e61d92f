"""One call of a resident model for rows of latents, spread over the mesh; with guidance, over cfg as well."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from operator import is_
from weakref import ref

import torch
from torch import Tensor

from ..config import MeshSpec
from ..distributed.cfg import gather_branches, own_branches
from ..distributed.collectives import split_range, split_sizes
from ..distributed.data import gather_batch, shard_batch
from ..distributed.mesh import Mesh, MeshAxis
from ..distributed.stale import Step
from ..errors import InputError
from .captured import CapturedNetwork
from .compiled import FirstTimes
from .control_use import ControlUse
from .extra import Extra, Row
from .families import Kind
from .network import Network
from .prepared import PreparedPrompt, PreparedPrompts
from .reports import ReportingExtra
from .residuals import NONE, Residuals
from .spread import UNKNOWN, Spread
from .steps_ahead import AHEAD_BYTES, PromptAtSteps
from .unet import micro_conditioning

# On the device: cond, uncond and what a few others take turns with.
KEPT_PROMPTS = 8
# What networks have made of prompts that step by step sampling asks with: SDXL's keys and values are 27 MB a row.
KEPT_PREPARED = 4


@dataclass(frozen=True)
class Prompt:
    """Text tokens (B, L, E) and pooled prompt (B, A), in the model's dtype and on its device, and the ControlNets on it.

    `concat`: (B, extra channels, Y, X), which the model takes beside the latent's own, where its input doesn't have them already.
    """

    context: Tensor
    pooled: Tensor
    concat: Tensor | None = None
    controls: tuple[ControlUse, ...] = ()

    def share(self, axis: MeshAxis) -> Prompt:
        """That of this rank's rows."""
        rows = self.context.shape[0]
        controls = tuple(use.share(axis, rows) for use in self.controls)
        concat = None if self.concat is None else shard_batch(self.concat, axis)
        return Prompt(shard_batch(self.context, axis), shard_batch(self.pooled, axis), concat, controls)

    def is_like(self, other: Prompt) -> bool:
        """Whether one call of the model can be of both."""
        same = [a is b for a, b in zip(self.controls, other.controls, strict=False)]
        return self.context.shape == other.context.shape and len(self.controls) == len(other.controls) and all(same)

    @classmethod
    def stacked(cls, prompts: Sequence[Prompt]) -> Prompt:
        """All of them, which are alike, one after the other, for as many times the rows."""
        if len(prompts) == 1:
            return prompts[0]
        context, pooled = torch.cat([p.context for p in prompts]), torch.cat([p.pooled for p in prompts])
        concats = [prompt.concat for prompt in prompts if prompt.concat is not None]
        controls = tuple(use.times(len(prompts)) for use in prompts[0].controls)
        return cls(context, pooled, torch.cat(concats) if concats else None, controls)


@dataclass(frozen=True)
class Branch:
    """An evaluation that guidance asks for.

    Args:
        number: which prompt its rows are of, for extras that differ by row: 0 cond, 1 uncond, others as they come.
        extras: which may act in it.
    """

    prompt: Prompt
    number: int = 0
    extras: tuple[Extra, ...] = ()

    def is_like(self, other: Branch) -> bool:
        """Whether one call of the model can be of both."""
        same = len(self.extras) == len(other.extras) and all(map(is_, self.extras, other.extras))
        return same and self.prompt.is_like(other.prompt)


@dataclass(frozen=True)
class _Ready:
    """A prompt as the model takes it, and the tensors that it was made of, as long as these are kept."""

    context: ref[Tensor]
    pooled: ref[Tensor]
    prompt: Prompt


@dataclass(frozen=True)
class Rows:
    """Latents (B, C, Y, X) with their timesteps (B,) and prompt, on every rank.

    Args:
        residuals: whole, for all rows or one for each of them, anywhere and in any dtype.
        extras: which may act; `which` rows these are, for those that differ by row, and among which others they are `spread`.
    """

    x: Tensor
    timesteps: Tensor
    prompt: Prompt
    residuals: Residuals = NONE
    extras: Sequence[Extra] = ()
    which: tuple[Row, ...] = ()
    spread: Spread = UNKNOWN

    def share(self, axis: MeshAxis) -> Rows:
        """Those of this rank of the axis."""
        rows = self.x.shape[0]

        def own(tensor: Tensor) -> Tensor:
            return shard_batch(tensor, axis) if tensor.shape[0] == rows else tensor

        x, times = shard_batch(self.x, axis), shard_batch(self.timesteps, axis)
        first, last = split_range(rows, axis.degree, axis.rank)
        residuals, which = self.residuals.each(own), self.which[first:last]
        return Rows(x, times, self.prompt.share(axis), residuals, self.extras, which)


@dataclass(frozen=True)
class Call:
    """One call of the model: its prompt, and what the model and each ControlNet on it have made of that.

    Nothing is made of a prompt of no rows. `which` rows these are of a job's evaluation, the extras that may act on them, and how
    all of it are `spread`.
    """

    prompt: Prompt
    own: PreparedPrompt
    controls: tuple[PreparedPrompt, ...]
    which: tuple[Row, ...] = ()
    extras: tuple[Extra, ...] = ()
    spread: Spread = UNKNOWN

    @property
    def is_empty(self) -> bool:
        """Of no rows."""
        return self.own.context.shape[0] == 0

    def nbytes(self) -> int:
        """Of what was made."""
        return sum(prepared.nbytes() for prepared in (self.own, *self.controls))


@dataclass(frozen=True)
class Share:
    """What of a job's evaluations with guidance this rank computes: its branches of cfg, its rows of dp.

    Args:
        rows: of the whole latent.
        branches: of guidance, on all ranks.
        calls: of each evaluation. Where all prompts have equal length, this rank's are one call, for as many times the rows.
        stacked: how many branches a call is of.
        steps: of each call, the model's prompt at the steps of the job, and its ControlNets'.
    """

    mesh: Mesh
    rows: int
    branches: int
    calls: list[Call]
    stacked: int
    steps: list[list[PromptAtSteps]]

    @classmethod
    def of(
        cls,
        network: Network,
        mesh: Mesh,
        rows: int,
        branches: Sequence[Branch],
        prepare: Callable[[Prompt], Call],
    ) -> Share:
        """Of `rows` latents, each with these branches (cond, uncond and others)."""
        own = own_branches(branches, mesh.cfg)
        # By all branches, not by its own: ranks that gather slices of weights together make as many calls.
        stacked = len(own) if all(branch.is_like(branches[0]) for branch in branches) else 1
        latents = range(*split_range(rows, mesh.dp.degree, mesh.dp.rank))
        every = tuple((branch.number, i) for branch in branches for i in latents)
        over_cfg = Spread(every, ((mesh.cfg, (len(latents),) * len(branches)),))
        is_spread = len(own) < len(branches) == 2  # beyond two, nothing mixes their rows
        calls = []
        for first in range(0, len(own), stacked):
            together = own[first : first + stacked]
            call = prepare(Prompt.stacked([branch.prompt.share(mesh.dp) for branch in together]))
            which = tuple((branch.number, i) for branch in together for i in latents)
            spread = over_cfg if is_spread else Spread(which)
            calls.append(replace(call, which=which, extras=together[0].extras, spread=spread))
        most = AHEAD_BYTES // sum(1 + len(call.controls) for call in calls)
        steps = [
            [
                PromptAtSteps(network, call.own, most),
                *(
                    PromptAtSteps(use.network, p, most)
                    for use, p in zip(call.prompt.controls, call.controls, strict=True)
                ),
            ]
            for call in calls
        ]
        return cls(mesh, rows, len(branches), calls, stacked, steps)

    def foresee(self, timesteps: Sequence[Tensor]) -> None:
        """Those of the schedule, on the CPU, in their order."""
        for at_steps in self.steps:
            for prompt in at_steps:
                prompt.foresee([float(timestep) for timestep in timesteps])

    def at(self, timestep: Tensor, sigma: float | None) -> list[Call]:
        """The calls of an evaluation, with what networks take from its timestep, which is on the CPU.

        Comm: the networks', where that wasn't made ahead.
        """
        return [
            call if call.is_empty else self._at(call, at_steps, float(timestep), sigma)
            for call, at_steps in zip(self.calls, self.steps, strict=True)
        ]

    @staticmethod
    def _at(call: Call, at_steps: Sequence[PromptAtSteps], timestep: float, sigma: float | None) -> Call:
        own, *controls = at_steps
        of_controls = zip(call.prompt.controls, controls, call.controls, strict=True)
        added = tuple(at.at(timestep) if use.is_at(sigma) else prepared for use, at, prepared in of_controls)
        return replace(call, own=own.at(timestep), controls=added)

    def nbytes(self) -> int:
        """Of what was made of prompts and timesteps."""
        steps = sum(prompt.nbytes() for at_steps in self.steps for prompt in at_steps)
        return steps + sum(call.nbytes() for call in self.calls)

    def own_rows(self, x: Tensor) -> Tensor:
        """The rows of `x` that each call takes."""
        own = shard_batch(x, self.mesh.dp)
        return torch.cat([own] * self.stacked) if self.stacked > 1 else own

    def gather(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The output of every branch, all rows, on every rank, from those of this rank's calls.

        Comm: one all-gather of the output over cfg and one over dp.
        """
        own = [out for outputs_of_call in outputs for out in outputs_of_call.chunk(self.stacked)]
        branches = gather_branches(own, self.branches, self.mesh.cfg)
        return [gather_batch(out, self.rows, self.mesh.dp) for out in branches]


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

    def output(self, rows: Rows) -> Tensor:
        """The first of `output_and_reports`."""
        return self.output_and_reports(rows)[0]

    def output_and_reports(self, rows: Rows) -> list[Tensor]:
        """The model's output, fp32, exact; its rows spread over cfg, then dp: for callers that have made one batch of all.

        What is made of a prompt is made once for the same prompt, by identity. After it come what those extras that report have of
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
        out = self._local(local, call, Step())
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
