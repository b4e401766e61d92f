"""What hangs inside a model, on one GPU: whether it gives what the CPU gives, what it takes, and where the host waits for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from hung_inside import LATENTS, OF_MMDITS, OF_UNETS, ROWS, TOKENS, Make, later
from torch import Tensor

from parallel_backend.bench.device_time import timed
from parallel_backend.extras.reading import read_extra
from parallel_backend.extras.target import Target
from parallel_backend.models.prediction import Predictor, timesteps_of
from parallel_backend.models.rows import Prompt, Rows

from ..options import Options
from ..report import NO_GPU, Report
from ..sizes import TINY, Sizes, dtype_name, sizes_of
from ..timing import synchronizations
from ..weights import mmdit_predictor, mmdit_tensors, relative_error, unet_predictor, unet_tensors

CPU = torch.device("cpu")


@torch.inference_mode()
def run(report: Report, options: Options) -> None:
    device, sizes = torch.device(options.device), sizes_of(options)
    report.table("Each in fp32 on small models, beside the CPU", "model", "inside", "relative error")
    for model, cases in (("UNet", OF_UNETS), ("MMDiT", OF_MMDITS)):
        here, there = small_models(model, device)
        for name, make in cases.items():
            report.attempt(name, partial(_compare, report, model, name, make, here, there))
    dtype = sizes.dtypes[0]
    title = f"One evaluation of SDXL, {LATENTS} latents with guidance, {sizes.side} px, {dtype_name(dtype)}"
    report.table(title, "inside", "ms", "of the host", "waits")
    of = unet_predictor(unet_tensors(sizes.unet, device, dtype), sizes.unet, device, dtype)
    for name, make in {"nothing": nothing, **OF_UNETS}.items():
        report.attempt(name, partial(_time, report, name, make, of, sizes))


def nothing(target: Target) -> list[Any]:
    del target
    return []


def small_models(model: str, device: torch.device) -> tuple[Predictor, Predictor]:
    """Of the same weights: on the CPU, and on the device."""
    config: Any = TINY.unet if model == "UNet" else TINY.mmdit
    make: Callable[..., Predictor] = unet_predictor if model == "UNet" else mmdit_predictor
    tensors = (unet_tensors if model == "UNet" else mmdit_tensors)(config, CPU, torch.float32)
    there = {name: tensor.to(device) for name, tensor in tensors.items()}
    return make(tensors, config, CPU, torch.float32), make(there, config, device, torch.float32)


def evaluation(of: Predictor, make: Make, cells: int) -> Callable[[], list[Tensor]]:
    """Of numbers that are the same on any device: outputs of square latents, cond's and uncond's, and what is reported beside."""
    torch.manual_seed(4)
    config, target = of.network.config, Target(of, cells, cells)
    x = torch.randn(LATENTS, config.channels, cells, cells).to(of.device)
    given = [(torch.randn(1, TOKENS, config.context_width), torch.randn(1, config.pooled_width)) for _ in range(2)]
    prompt = Prompt.stacked([of.prompt(*pair, LATENTS) for pair in given])
    times = timesteps_of(torch.tensor(500.0), 2 * LATENTS, of.device)
    rows, specs = Rows(torch.cat([x, x]), times, prompt, which=tuple(ROWS)), make(target)
    of.output_and_reports(replace(rows, extras=[read_extra(spec, target) for spec in specs]))  # keeps what others take
    rows = replace(rows, extras=[read_extra(spec, target) for spec in later(specs)])
    return lambda: of.output_and_reports(rows)


def _compare(report: Report, model: str, name: str, make: Make, *on: Predictor) -> None:
    expected, out = (evaluation(of, make, TINY.cells)() for of in on)
    report.row(model, name, max(relative_error(there.cpu(), here) for there, here in zip(out, expected, strict=True)))


def _time(report: Report, name: str, make: Make, of: Predictor, sizes: Sizes) -> None:
    call = evaluation(of, make, sizes.cells)
    spent = timed(call, of.device, sizes.warm_up, sizes.repeats)
    waits: Mapping[str, int] = synchronizations(call) if of.device.type == "cuda" else {}
    told = ", ".join(f"{place} x {count}" for place, count in waits.items())
    report.row(name, spent.whole, spent.host, told if of.device.type == "cuda" else NO_GPU)
