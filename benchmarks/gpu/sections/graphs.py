"""One CUDA graph of each evaluation: what launching ahead would gain."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from parallel_backend.bench.device_time import Call, captured, timed

from ..attention_kernels import tried
from ..options import Options
from ..report import NO_GPU, Report, Value
from ..sizes import Sizes, dtype_name, sizes_of
from ..weights import Tensors, mmdit_predictor, mmdit_tensors, relative_error, unet_predictor, unet_tensors
from . import sd35, sdxl


@torch.inference_mode()
def run(report: Report, options: Options) -> None:
    device, sizes = torch.device(options.device), sizes_of(options)
    dtype = sizes.dtypes[0]
    report.table(
        f"An evaluation launched one kernel after the other, and as one CUDA graph, {dtype_name(dtype)}, {sizes.side} px",
        *("evaluation", "ms", "ms as a graph", "times faster", "differs"),
    )
    tensors = unet_tensors(sizes.unet, device, dtype)
    unet = unet_predictor(tensors, sizes.unet, device, dtype)
    mmdit = mmdit_predictor(mmdit_tensors(sizes.mmdit, device, dtype), sizes.mmdit, device, dtype)
    cases: dict[str, Callable[[], Call]] = {
        "SDXL, 1 row": lambda: sdxl.evaluation(sizes, unet, 1),
        "SDXL, 2 rows": lambda: sdxl.evaluation(sizes, unet, 2),
        "SD3.5-Large, 1 row": lambda: sd35.evaluation(sizes, mmdit, 1),
        "SD3.5-Large, 2 rows": lambda: sd35.evaluation(sizes, mmdit, 2),
        **{
            f"SDXL, rank {sdxl.RANK} of patch={sdxl.BANDS}, {phase}, messages that take no time": partial(
                _band, sizes, device, tensors, phase
            )
            for phase in ("exact", "displaced")
        },
    }
    for name, make in cases.items():
        report.row(name, *tried(partial(_gain, make, sizes, device)))


def _band(sizes: Sizes, device: torch.device, tensors: Tensors, phase: str) -> Call:
    return sdxl.band_evaluations(sizes, device, tensors)[phase]


def _gain(make: Callable[[], Call], sizes: Sizes, device: torch.device) -> list[Value]:
    call = make()
    eager = timed(call, device, sizes.warm_up, sizes.repeats).whole
    if device.type != "cuda":
        return [eager, NO_GPU]
    expected = _one(call())
    graph, out = captured(call)
    replayed = timed(graph.replay, device, sizes.warm_up, sizes.repeats).whole
    return [eager, replayed, eager / replayed, relative_error(_one(out), expected)]


def _one(out: object) -> Tensor:
    return out if isinstance(out, Tensor) else torch.cat(out)  # type: ignore[arg-type]
