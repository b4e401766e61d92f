"""Evaluations as the product captures them, beside those that it launches one kernel after the other."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from parallel_backend.bench.device_time import Call, timed
from parallel_backend.models.captured import CapturedNetwork
from parallel_backend.models.cuda_graphs import CUDAGraphs
from parallel_backend.models.prediction import Predictor

from ..attention_kernels import tried
from ..options import Options
from ..report import NO_GPU, Report, Value
from ..sizes import Sizes, dtype_name, sizes_of
from ..weights import mmdit_predictor, mmdit_tensors, unet_predictor, unet_tensors
from . import sd35, sdxl


@torch.inference_mode()
def run(report: Report, options: Options) -> None:
    device, sizes = torch.device(options.device), sizes_of(options)
    dtype = sizes.dtypes[0]
    report.table(
        f"An evaluation launched one kernel after the other, and as one CUDA graph, {dtype_name(dtype)}, {sizes.side} px",
        *("evaluation", "ms", "host ms", "ms as a graph", "host ms", "times faster", "MiB of graphs", "the same bits"),
    )
    tensors = unet_tensors(sizes.unet, device, dtype)
    unet = unet_predictor(tensors, sizes.unet, device, dtype)
    mmdit = mmdit_predictor(mmdit_tensors(sizes.mmdit, device, dtype), sizes.mmdit, device, dtype)
    for rows in (1, 2):
        calls = [sdxl.evaluation(sizes, unet, rows) for _ in range(2)]
        report.row(f"SDXL, {rows} row{'s' * (rows - 1)}", *tried(partial(_gain, unet, calls, sizes)))
    for rows in (1, 2):
        calls = [sd35.evaluation(sizes, mmdit, rows) for _ in range(2)]
        report.row(f"SD3.5-Large, {rows} row{'s' * (rows - 1)}", *tried(partial(_gain, mmdit, calls, sizes)))
    for phase in ("exact", "displaced"):
        # What neighbours send is nothing: its values can't be compared.
        band = sdxl.band_predictor(sizes, device, tensors)
        name = f"SDXL, rank {sdxl.RANK} of patch={sdxl.BANDS}, {phase}, messages that take no time"
        report.row(name, *tried(partial(_gain, band, [sdxl.band_evaluations(sizes, band)[phase]], sizes)))


def _gain(predictor: Predictor, calls: list[Call], sizes: Sizes) -> list[Value]:
    """`calls`: of one kind, of other latents; the first is timed. Where there are several, results are compared."""
    device = predictor.device
    eager = timed(calls[0], device, sizes.warm_up, sizes.repeats)
    if device.type != "cuda":
        return [eager.whole, eager.host, NO_GPU]
    expected = [_one(call()) for call in calls]
    before = torch.cuda.memory_allocated(device)
    predictor.captured = CapturedNetwork(predictor.network, predictor.mesh, CUDAGraphs(device))
    try:
        for _ in range(2):  # one runs as ever, one is captured
            calls[-1]()
        same = all(torch.equal(_one(call()), wanted) for call, wanted in zip(calls, expected, strict=True))
        graph = timed(calls[0], device, sizes.warm_up, sizes.repeats)
        failed = "; ".join(predictor.captured.take_notes())
        taken = (torch.cuda.memory_allocated(device) - before) / 2**20
        compared = ("yes" if same else "NO") if len(calls) > 1 else ""
        figures: list[Value] = [graph.whole, graph.host, eager.whole / graph.whole, taken, compared]
        return [eager.whole, eager.host, *([failed] if failed else figures)]
    finally:
        predictor.captured.drop()
        predictor.captured = None


def _one(out: object) -> Tensor:
    return out if isinstance(out, Tensor) else torch.cat(out)  # type: ignore[arg-type]
