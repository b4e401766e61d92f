"""What an evaluation launches, sends and holds stays within the table of budgets; a VAE in two bands needs half."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fake_cuda.budgets import BUDGETS, DECODES, Budget
from fake_cuda.device import fake_cuda
from fake_cuda.networks import Evaluations, kl_vae, large, predictor
from fake_cuda.watch import Watch

from parallel_backend.distributed.band_norm import BandGroupNorm
from parallel_backend.models.transformer import Attend, Stream

MIB, GIB = 2**20, 2**30


def cost(budget: Budget) -> Budget:
    """The budget with what an evaluation of it costs: the second of a job, or where it is displaced the third."""
    mesh = budget.mesh
    before = ["sync", "displaced"] if budget.displaced else ["sync"]
    with fake_cuda(budget.rank, mesh.world_size), torch.inference_mode():
        run = Evaluations(predictor(budget.config, mesh), (budget.pixels, budget.pixels), budget.displaced)
        share, axes = run.share(), run.predictor.mesh.axes
        for phase in before:
            run.next(phase, share)
        started = sum(axis.traffic.collectives for axis in axes)
        with Watch() as watch:
            run.next("displaced" if budget.displaced else "sync", share)
        exchanges = sum(axis.traffic.collectives for axis in axes) - started
    return budget._replace(launches=watch.launches.total(), exchanges=exchanges, mib=-(-watch.memory.peak // MIB))


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
    with pytest.raises(
        AssertionError, match=f"name: {getattr(over, what)} {what}, {getattr(budget, what)} are the most"
    ):
        check("name", budget, over)


def test_a_launch_more_in_a_block_is_more_than_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in the model itself, one block in place of 38: a copy of what every block's attention is given."""
    budget = BUDGETS["SD3.5-Large, one rank"]._replace(config=large(1))
    before = cost(budget)
    joint = Attend.joint

    def wasteful(self: Attend, text: Stream, image: Stream, eps: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        return joint(self, text, replace(image, v_BLF=image.v_BLF.clone()), eps)

    monkeypatch.setattr(Attend, "joint", wasteful)
    after = cost(budget)
    assert after.launches == before.launches + 1 and after.mib >= before.mib
    with pytest.raises(AssertionError, match="launches"):
        check("one block", before, after)


def vae_peak(dtype: torch.dtype, world_size: int, pixels: int = 2048, *, encode: bool = False) -> int:
    """Bytes that rank 0 holds at most beside the weights."""
    with fake_cuda(0, world_size), torch.inference_mode():
        vae = kl_vae(dtype)
        with Watch(armed=False) as watch:
            if encode:
                vae.encode(torch.empty(1, pixels, pixels, 3))
            else:
                vae.decode(torch.empty(1, 16, pixels // 8, pixels // 8))
        return watch.memory.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_two_bands_of_a_vae_take_half_of_one(dtype: torch.dtype) -> None:
    alone = vae_peak(dtype, 1)
    assert vae_peak(dtype, 2) <= 0.51 * alone
    if dtype is torch.bfloat16:
        assert vae_peak(dtype, 2, encode=True) <= 0.51 * vae_peak(dtype, 1, encode=True)
        for world_size in (1, 4):
            peak = alone if world_size == 1 else vae_peak(dtype, world_size)
            assert peak <= DECODES[world_size] * GIB, f"{peak / GIB:.3f} GiB on {world_size} ranks"


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vae_knows_before_what_it_takes(dtype: torch.dtype, world_size: int) -> None:
    with fake_cuda(0, world_size):
        most = kl_vae(dtype).most_bytes(1024 // 8, 1024 // 8)
    assert 0.95 * most <= vae_peak(dtype, world_size, 1024) <= 1.02 * most
    assert vae_peak(dtype, world_size, 1024, encode=True) <= most


def test_a_copy_in_fp32_is_more_than_half_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the bands' group norm did once: the bound notices."""
    norm = BandGroupNorm.forward

    def wasteful(self: BandGroupNorm, x: torch.Tensor) -> torch.Tensor:
        copies = [x.float(), x.float()]
        return norm(self, x) if copies else x

    alone = vae_peak(torch.bfloat16, 1, 1024)
    monkeypatch.setattr(BandGroupNorm, "forward", wasteful)
    assert vae_peak(torch.bfloat16, 2, 1024) > 0.6 * alone
