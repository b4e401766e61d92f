"""SDXL's evaluation of one row on one GPU, and in bands: how much is launching, how much computing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from parallel_backend.bench.device_time import Profile, timed
from parallel_backend.config import MeshSpec
from parallel_backend.distributed.mesh import build_mesh
from parallel_backend.distributed.stale import EXACT, Step
from parallel_backend.models.prediction import Predictor

from ..busy import COLUMNS, busy_row, tell_slowest
from ..options import Options
from ..report import Report
from ..sizes import Sizes, dtype_name, sizes_of
from ..weights import Tensors, sdxl_prompts, unet_predictor, unet_tensors

BANDS, RANK = 4, 1


@torch.inference_mode()
def run(report: Report, options: Options) -> None:
    device, sizes = torch.device(options.device), sizes_of(options)
    calls: dict[str, Callable[[], object]] = {}
    for dtype in sizes.dtypes:
        tensors = unet_tensors(sizes.unet, device, dtype)
        alone = unet_predictor(tensors, sizes.unet, device, dtype)
        calls |= {
            f"{rows} row{'s' * (rows - 1)}, {dtype_name(dtype)}": evaluation(sizes, alone, rows) for rows in (1, 2)
        }
    report.table(f"One evaluation of SDXL, {sizes.side} px", *COLUMNS)
    _rows(report, sizes, device, calls)
    report.attempt("the bands", partial(_bands, report, sizes, device, tensors))


def _bands(report: Report, sizes: Sizes, device: torch.device, tensors: Tensors) -> None:
    name = f"rank {RANK} of patch={BANDS}, {dtype_name(next(iter(tensors.values())).dtype)}, messages take no time"
    report.table(f"One evaluation of a band of SDXL, {sizes.side} px", *COLUMNS)
    found = band_evaluations(sizes, band_predictor(sizes, device, tensors))
    _rows(report, sizes, device, {f"{name}, {phase}": call for phase, call in found.items()})


def _rows(report: Report, sizes: Sizes, device: torch.device, calls: dict[str, Callable[[], object]]) -> None:
    """A row of each; the slowest kernels of the last."""
    times = {name: timed(call, device, sizes.warm_up, sizes.repeats) for name, call in calls.items()}
    seen: Profile | None = None
    for name, call in calls.items():
        row, seen = busy_row(name, times[name], call, device)
        report.row(*row)
    tell_slowest(report, name, seen)


def evaluation(sizes: Sizes, predictor: Predictor, rows: int) -> Callable[[], list[Tensor]]:
    """An evaluation without guidance, or with it: two rows."""
    x = torch.randn(1, sizes.unet.channels, sizes.cells, sizes.cells, device=predictor.device)
    timestep = torch.tensor(500)
    share = predictor.share(1, sdxl_prompts(sizes.unet, predictor.device, predictor.dtype, rows))
    return lambda: predictor.outputs(x, timestep, share, EXACT)


def band_predictor(sizes: Sizes, device: torch.device, tensors: Tensors) -> Predictor:
    """Of one band. The process group is torch's fake one: neighbours answer at once, and with nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dtype = next(iter(tensors.values())).dtype
    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=BANDS)
    return unet_predictor(tensors, sizes.unet, device, dtype, mesh=build_mesh(MeshSpec(patch=BANDS)))


def band_evaluations(sizes: Sizes, predictor: Predictor) -> dict[str, Callable[[], Tensor]]:
    """An exact and a displaced evaluation of one band, of one row; by graphs where the predictor has them."""
    network, device, dtype = predictor.network, predictor.device, predictor.dtype
    (prompt,) = sdxl_prompts(sizes.unet, device, dtype, 1)
    x = torch.randn(1, sizes.unet.channels, sizes.cells, sizes.cells, device=device, dtype=dtype)
    given = x, torch.full((1,), 500.0, device=device), network.prepare(prompt.context, prompt.pooled)
    kept = network.new_job(displaced=True)
    network(*given, Step(0, "sync", kept=kept))  # displaced steps go on from one

    def evaluated(step: Step) -> Tensor:
        evaluate = predictor.captured or network
        return evaluate(*given, step)

    return {
        "exact": partial(evaluated, EXACT),
        "displaced": partial(evaluated, Step(1, "displaced", kept=kept)),
    }
