"""One evaluation of a model for a sampler that the client runs, from the request to its result."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isfinite

import torch
from torch import Tensor

from ..errors import InputError
from ..extras.reading import Extras, check_together
from ..models.extra import Row
from ..models.prediction import Predictor
from ..models.residuals import Residuals
from ..models.rows import Rows
from ..rpc.extras import LaterEvaluation
from ..rpc.host_copies import on_host, onto_device
from ..rpc.messages import Control, Forward, Result
from ..rpc.state import RankCost, Swap
from .control_nets import ControlNets
from .jobs import Job


def run_forward(
    body: Forward,
    given: Callable[[], list[Tensor]],
    job: Job,
    resident: Callable[[], tuple[Predictor, Swap]],
    control_nets: ControlNets,
    extras: Extras,
    device: torch.device,
) -> tuple[Result, list[Tensor]]:
    """The output and what extras report of its rows, on the CPU, and what it cost.

    Ranks agree once on all that each of them needs, many such jobs being in a row.

    Args:
        given: the request's tensors, or the error that this rank can't have them.
        resident: the model with this job's patches on its weights, or the error that it isn't held.
    Raises: BackendError: on every rank alike.
    """
    start = time.perf_counter()

    def prepare() -> tuple[Predictor, Rows, Swap]:
        tensors = given()
        predictor, swap = resident()
        x, timesteps = (onto_device(tensors[index], device) for index in (body.x, body.timesteps))
        context = tensors[body.context]
        predictor.check_input(x, context.shape[1] if context.ndim == 3 else 0)
        if timesteps.shape != x.shape[:1]:
            raise InputError(f"{list(timesteps.shape)} timesteps for {x.shape[0]} latents.", "Give one per latent.")
        prompt = predictor.prompt(context, tensors[body.pooled], x.shape[0])
        uses = control_nets.uses(body.controls, tensors, predictor, x, {}, is_patched=bool(body.patches.files))
        prompt = replace(prompt, controls=uses)
        residuals = _residuals(body.control, tensors, x.shape[0])
        predictor.network.own_residuals(residuals, x.shape[2], x.shape[3])  # which raises what doesn't fit
        if body.sigma is not None and not isfinite(body.sigma):
            raise InputError(f"Sigma {body.sigma} is not finite.", "Give that of the evaluation, or none.")
        evaluations: list[LaterEvaluation | Forward] = [*body.later, body]
        for one in evaluations:
            asked = extras.read(one.extras, tensors, predictor, (x.shape[2], x.shape[3]), one.branches)
            check_together(asked)
        for extra in asked:
            extra.check_tokens(context.shape[1])
        return predictor, Rows(x, timesteps, prompt, residuals, asked, _which(body.branches, x.shape[0])), swap

    predictor, rows, swap = job.control.agreed(prepare)
    output = on_host(predictor.output_and_reports(rows, body.sigma))  # which waits for the device
    notes = predictor.take_notes()
    ranks = [RankCost([], notes=notes)] if notes else []
    return Result(time.perf_counter() - start, 1, ranks, swap), output


def _which(branches: Sequence[int], rows: int) -> tuple[Row, ...]:
    """Raises: InputError: rows that can't be shared out among so many branches."""
    if not branches or rows % len(branches):
        raise InputError(f"{rows} rows came for {len(branches)} branches.", "Give as many rows for each.")
    return tuple((branch, row) for branch in branches for row in range(rows // len(branches)))


def _residuals(control: Control, tensors: Sequence[Tensor], rows: int) -> Residuals:
    """Those that a request names. Raises: InputError: not one for all latents, nor one for each."""

    def named(index: int | None) -> Tensor | None:
        if index is None:
            return None
        tensor = tensors[index]
        if tensor.ndim not in (3, 4) or tensor.shape[0] not in (1, rows):
            raise InputError(
                f"A ControlNet's residual of shape {list(tensor.shape)} came for {rows} latents.",
                f"Give 1 row, or {rows}.",
            )
        return tensor

    inputs, outputs = (list(map(named, side)) for side in (control.input, control.output))
    return Residuals(inputs, named(control.middle), outputs)
