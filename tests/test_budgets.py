"""What an evaluation launches, sends and holds stays within the table of budgets; a VAE in two bands needs half."""

from __future__ import annotations

import msgspec
import pytest
import torch
from fake_cuda.budgets import BUDGETS, DECODES, Budget
from fake_cuda.device import DEVICE, fake_cuda
from fake_cuda.networks import Evaluations, kl_vae, predictor
from fake_cuda.watch import Watch

MIB = 2**20


def cost(budget: Budget) -> Budget:
    """The budget with what an evaluation of it costs: of the third, when what a job keeps is there."""
    mesh = budget.mesh
    with fake_cuda(budget.rank, mesh.world_size), torch.inference_mode():
        run = Evaluations(predictor(budget.config, mesh), (budget.pixels, budget.pixels), budget.displaced)
        prompts, axes = run.prompts, run.predictor.mesh.axes
        run.next(prompts=prompts)
        if budget.displaced:
            run.next("displaced", prompts)
        before = sum(axis.traffic.collectives for axis in axes)
        with Watch() as watch:
            run.next("displaced" if budget.displaced else "sync", prompts)
        exchanges = sum(axis.traffic.collectives for axis in axes) - before
    return budget._replace(
        launches=watch.launches.total(), exchanges=exchanges, mib=-(-watch.memory.peak // MIB)
    )


def check(name: str, budget: Budget, measured: Budget) -> None:
    for what in ("launches", "exchanges", "mib"):
        now, most = getattr(measured, what), getattr(budget, what)
        assert now <= most, f"{name}: {now} {what}, {most} are the most that budgets.py allows"


@pytest.mark.parametrize("name", BUDGETS)
def test_an_evaluation_keeps_to_its_budget(name: str) -> None:
    check(name, BUDGETS[name], cost(BUDGETS[name]))


@pytest.mark.parametrize("what", ["launches", "exchanges", "mib"])
def test_one_launch_exchange_or_mebibyte_too_many_is_told_with_both_numbers(what: str) -> None:
    budget = BUDGETS["SD3.5-Medium, one rank"]
    over = budget._replace(**{what: getattr(budget, what) + 1})
    with pytest.raises(AssertionError, match=f"name: {getattr(over, what)} {what}, {getattr(budget, what)} are the most"):
        check("name", budget, over)


def decode_peak(world_size: int, dtype: torch.dtype, pixels: int, encode: bool = False) -> int:
    """Bytes at the peak of a decode on rank 0, beside weights and latent."""
    with fake_cuda(0, world_size), torch.inference_mode():
        vae = kl_vae(dtype)
        with Watch(armed=False) as watch:
            if encode:
                vae.encode(torch.empty(1, pixels, pixels, 3))
            else:
                vae.decode(torch.empty(1, 16, pixels // 8, pixels // 8))
        return watch.memory.peak
