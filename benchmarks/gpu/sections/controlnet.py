"""SDXL with a ControlNet on one GPU: what it takes beside the UNet's evaluation, in the ranks and left in another process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from diffusers import ControlNetModel
from torch import Tensor

from parallel_backend.bench.device_time import timed
from parallel_backend.distributed.stale import EXACT
from parallel_backend.models.control_use import ControlUse
from parallel_backend.models.prediction import Predictor
from parallel_backend.models.residuals import Residuals
from parallel_backend.models.rows import Prompt, Rows
from parallel_backend.models.unet_control import BandControlNet, UNetControlConfig, loadable_unet_control
from parallel_backend.small_checkpoints.unet_control import control_config

from ..busy import COLUMNS, busy_row
from ..options import Options
from ..report import Report
from ..sizes import CELL, Sizes, sizes_of
from ..weights import OnDevice, fill, joined, random_tensor, sdxl_prompts, unet_predictor, unet_tensors


@torch.inference_mode()
def run(report: Report, options: Options) -> None:
    device, sizes = torch.device(options.device), sizes_of(options)
    dtype = sizes.dtypes[0]
    predictor = unet_predictor(unet_tensors(sizes.unet, device, dtype), sizes.unet, device, dtype)
    control = unet_control(control_config(sizes.unet), predictor)
    prepared = control.prepare(torch.rand(1, 3, CELL * sizes.cells, CELL * sizes.cells, device=device, dtype=dtype))
    calls = evaluations(sizes, predictor, control, prepared)
    report.table(f"One evaluation of SDXL with a ControlNet, 2 rows, {sizes.side} px", *COLUMNS)
    times = {name: timed(call, device, sizes.warm_up, sizes.repeats) for name, call in calls.items()}
    for name, call in calls.items():
        report.row(*busy_row(name, times[name], call, device)[0])


def unet_control(config: UNetControlConfig, predictor: Predictor) -> BandControlNet:
    """With random weights made on the device."""
    with torch.device("meta"):
        model, theirs = loadable_unet_control(config, predictor.mesh), ControlNetModel(**config.diffusers())
    make = partial(random_tensor, device=predictor.device, dtype=predictor.dtype)
    tensors = {name: make(name, p.shape) for name, p in theirs.named_parameters()}
    fill(model, OnDevice(joined(tensors)).read)
    return BandControlNet(model.requires_grad_(False).eval(), config, predictor.mesh, "native")


def evaluations(
    sizes: Sizes, predictor: Predictor, control: BandControlNet, prepared: Tensor
) -> dict[str, Callable[[], object]]:
    """Without it, with it in the ranks, alone, and with its residuals coming from the CPU."""
    device, dtype = predictor.device, predictor.dtype
    plain = sdxl_prompts(sizes.unet, device, dtype, 2)
    used = [Prompt(p.context, p.pooled, None, (ControlUse(control, prepared),)) for p in plain]
    used[1] = Prompt(used[1].context, used[1].pooled, None, used[0].controls)
    x = torch.randn(1, sizes.unet.channels, sizes.cells, sizes.cells, device=device)
    both = plain[0] + plain[1]
    twice, times = torch.cat([x, x]), torch.full((2,), 500.0, device=device)
    given = twice.to(dtype), times, control.prepare_prompt(both.context, both.pooled), prepared
    found = control(*given, EXACT).each(Tensor.cpu)
    plain_share, used_share = (predictor.share(1, prompts) for prompts in (plain, used))
    rows = Rows(twice, times, both, Residuals(middle=found.middle, output=found.output))
    return {
        "without": lambda: predictor.outputs(x, torch.tensor(500), plain_share, EXACT),
        "ControlNet in the ranks": lambda: predictor.outputs(x, torch.tensor(500), used_share, EXACT),
        "ControlNet alone": lambda: control(*given, EXACT),
        "residuals from the CPU": lambda: predictor.output(rows),
    }
