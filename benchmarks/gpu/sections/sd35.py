"""SD3.5-Large's step with guidance on one GPU: every kernel, eager and compiled; who waits; how busy the GPU is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from parallel_backend.bench.device_time import timed
from parallel_backend.config import SamplerSpec
from parallel_backend.distributed.kernels import Use, resolve_kernel
from parallel_backend.distributed.stale import EXACT
from parallel_backend.models.compiled import compile_blocks
from parallel_backend.models.mmdit import HEAD_DIM, JointBlock
from parallel_backend.models.network import TokenNetwork
from parallel_backend.models.prediction import Predictor
from parallel_backend.models.rows import Prompt
from parallel_backend.models.transformer import StagedTransformer
from parallel_backend.sampling.image import sample_latent
from parallel_backend.sampling.parameterization import Flow

from ..attention_kernels import NAMES, attention_kernels, tried
from ..busy import COLUMNS, busy_row, tell_slowest
from ..options import Options
from ..report import NO_GPU, Report, Value
from ..sizes import Sizes, dtype_name, sizes_of
from ..timing import synchronizations
from ..weights import mmdit_predictor, mmdit_tensors, relative_error, sd3_prompts

SAMPLERS = ("euler", "dpmpp_2m", "uni_pc", "dpmpp_2m_sde")
STEPS = 4


@torch.inference_mode()
def run(report: Report, options: Options) -> None:
    device, sizes = torch.device(options.device), sizes_of(options)
    predictors = _predictors(sizes, device)
    first, last = predictors[0], predictors[-1]
    _steps(report, sizes, predictors, compiled=False)
    attention_kernels(report, sizes, device)
    if last is not first:
        report.attempt("compiling", partial(_compiled_steps, report, sizes, first))
    report.attempt("the waits", partial(_waits, report, sizes, last))
    # The profiler slows what comes after it.
    report.attempt("the profile", partial(_busy, report, sizes, last, "eager"))
    if last is not first:
        report.attempt("the compiled profile", partial(_busy, report, sizes, first, "compiled"))
    # What takes longest comes last: a limit then costs least.
    report.attempt("compiling", partial(_compiled_steps, report, sizes, last))


def _compiled_steps(report: Report, sizes: Sizes, predictor: Predictor) -> None:
    compile_blocks(_model(predictor), JointBlock)
    _steps(report, sizes, [predictor], compiled=True)


def _predictors(sizes: Sizes, device: torch.device) -> list[Predictor]:
    """One for each dtype, of equal weights."""
    first, *others = sizes.dtypes
    tensors = mmdit_tensors(sizes.mmdit, device, first)
    predictors = [mmdit_predictor(tensors, sizes.mmdit, device, first)]
    for dtype in others:
        cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        predictors.append(mmdit_predictor(cast, sizes.mmdit, device, dtype))
    return predictors


def evaluation(sizes: Sizes, predictor: Predictor, prompts: int = 2) -> Callable[[], list[Tensor]]:
    """A step's model call with guidance: two rows."""
    x = torch.randn(1, sizes.mmdit.channels, sizes.cells, sizes.cells, device=predictor.device)
    timestep = torch.tensor(500.0)
    share = predictor.share(1, sd3_prompts(sizes.text, predictor.device, predictor.dtype, prompts))
    return lambda: predictor.outputs(x, timestep, share, EXACT)


def _steps(report: Report, sizes: Sizes, predictors: list[Predictor], compiled: bool) -> None:
    how = "compiled" if compiled else "eager"
    report.table(
        f"SD3.5-Large, {sizes.side} px, guidance, one GPU, {how}",
        "dtype",
        "kernel",
        "ms a step",
        "of the host",
        "image differs from native's",
    )
    for predictor in predictors:
        call = evaluation(sizes, predictor)
        plain = torch.cat(call())
        for name in NAMES:
            report.row(
                dtype_name(predictor.dtype), name, *tried(partial(_with_kernel, name, predictor, call, plain, sizes))
            )
        _model(predictor).attention.kernel = "native"


def _with_kernel(
    name: str, predictor: Predictor, call: Callable[[], list[Tensor]], plain: Tensor, sizes: Sizes
) -> list[Value]:
    """Raises: ConfigError: the kernel isn't here."""
    resolve_kernel(name, Use(predictor.device, predictor.dtype, False, sizes.mmdit.heads, HEAD_DIM))
    _model(predictor).attention.kernel = name
    out = torch.cat(call())
    spent = timed(call, predictor.device, sizes.warm_up, sizes.repeats)
    return [spent.whole, spent.host, relative_error(out, plain)]


def _waits(report: Report, sizes: Sizes, predictor: Predictor) -> None:
    report.table("Where a run makes the host wait for the GPU", "sampler", "waits a step", "where")
    if predictor.device.type != "cuda":
        report.row("all", NO_GPU)
        return
    prompts = sd3_prompts(sizes.text, predictor.device, predictor.dtype)
    for sampler in SAMPLERS:
        run_it = partial(_sampled, sizes, predictor, prompts, sampler)
        run_it()
        found = synchronizations(run_it)
        where = ", ".join(f"{place} x{count}" for place, count in found.items())
        report.row(sampler, sum(found.values()) / STEPS, where)


def _sampled(sizes: Sizes, predictor: Predictor, prompts: list[Prompt], sampler: str) -> Tensor:
    latent = torch.zeros(1, sizes.mmdit.channels, sizes.cells, sizes.cells, device=predictor.device)
    spec = SamplerSpec(sampler=sampler, steps=STEPS)
    share = predictor.share(1, prompts)
    return sample_latent(lambda x, t, *_: predictor.outputs(x, t, share, EXACT), spec, Flow(), latent=latent)


def _busy(report: Report, sizes: Sizes, predictor: Predictor, how: str) -> None:
    report.table(f"One evaluation of SD3.5-Large, 2 rows, native, {dtype_name(predictor.dtype)}, {how}", *COLUMNS)
    call = evaluation(sizes, predictor)
    row, seen = busy_row(how, timed(call, predictor.device, sizes.warm_up, sizes.repeats), call, predictor.device)
    report.row(*row)
    tell_slowest(report, f"it, {how}", seen)


def _model(predictor: Predictor) -> StagedTransformer:
    assert isinstance(predictor.network, TokenNetwork)
    return predictor.network.model
