"""What previews cost a step of SDXL, and a latent its way to the card and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from parallel_backend.bench.device_time import Call, timed
from parallel_backend.config import SamplerSpec
from parallel_backend.distributed.stale import EXACT
from parallel_backend.rank.step_messages import StepMessages, step_messages
from parallel_backend.rpc.host_copies import on_host, onto_device
from parallel_backend.rpc.messages import StepDone
from parallel_backend.sampling.driver import StepReport
from parallel_backend.sampling.image import sample_latent
from parallel_backend.sampling.parameterization import Discrete

from ..options import Options
from ..report import Report
from ..sizes import sizes_of
from ..weights import sdxl_prompts, unet_predictor, unet_tensors

STEPS = 10


@torch.inference_mode()
def run(report: Report, options: Options) -> None:
    device, sizes = torch.device(options.device), sizes_of(options)
    dtype = sizes.dtypes[0]
    predictor = unet_predictor(unet_tensors(sizes.unet, device, dtype), sizes.unet, device, dtype)
    share = predictor.share(1, sdxl_prompts(sizes.unet, device, dtype, 2))
    latent = torch.randn(1, sizes.unet.channels, sizes.cells, sizes.cells, device=device)

    def outputs(x: Tensor, timestep: Tensor, *_: object) -> Sequence[Tensor]:
        return predictor.outputs(x, timestep, share, EXACT)

    ways: dict[str, Callable[[], StepMessages | None]] = {
        "none": lambda: None,
        "copied in their step": lambda: StepMessages(_copied, None),
        "copied beside the next step": lambda: step_messages(_taken, device, tells=True),
    }
    report.table(f"SDXL, {sizes.side} px, guidance, {STEPS} steps of euler", "previews", "ms a step")
    for name, make in ways.items():
        spent = timed(_sampling(outputs, latent, make), device, 1, sizes.repeats)
        report.row(name, spent.whole / STEPS)
    report.table("A latent of 2 MB between the CPU and the card", "copy", "ms", "of the host")
    here = torch.randn(2, 16, 128, 128)
    there = here.to(device)
    copies: dict[str, Call] = {
        "to the card": lambda: here.to(device, copy=True),
        "to the card, by pinned memory": lambda: onto_device(here, device),
        "from the card": lambda: there.cpu(),
        "from the card, by pinned memory": lambda: on_host([there]),
    }
    for name, call in copies.items():
        spent = timed(call, device, 3, 10 * sizes.repeats)
        report.row(name, spent.whole, spent.host)


def _sampling(
    outputs: Callable[..., Sequence[Tensor]],
    latent: Tensor,
    make: Callable[[], StepMessages | None],
) -> Call:
    spec = SamplerSpec(scheduler="normal", steps=STEPS, cfg_scale=5.0)

    def sampled() -> None:
        messages = make()

        def on_step(done: StepReport) -> None:
            if messages is not None:
                messages.tell(StepDone(done.index, done.total), [done.x, done.denoised])

        sample_latent(outputs, spec, Discrete(), latent=latent, on_step=on_step)
        if messages is not None:
            messages.finish()

    return sampled


def _copied(done: StepDone, tensors: Sequence[Tensor]) -> None:
    for x in tensors:
        x.cpu()


def _taken(done: StepDone, tensors: Sequence[Tensor]) -> None:
    """They lie in the host's memory."""
