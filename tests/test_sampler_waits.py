"""No step makes the host wait for the GPU: not the samplers, nor their noise, which a thread draws ahead, nor the clocks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from fake_cuda.device import DEVICE, fake_cuda, on_cuda
from fake_cuda.watch import HostSyncError, Watch
from torch import Tensor

from parallel_backend.config import SAMPLERS, MeshSpec, SamplerSpec
from parallel_backend.distributed.collectives import all_gather
from parallel_backend.distributed.mesh import build_mesh
from parallel_backend.distributed.traffic import Timeline
from parallel_backend.errors import CancelledError
from parallel_backend.sampling import brownian, samplers
from parallel_backend.sampling.driver import SAMPLERS_BY_NAME, StepReport
from parallel_backend.sampling.image import sample_latent
from parallel_backend.sampling.noise import StepNoise
from parallel_backend.sampling.parameterization import Discrete, Flow, Parameterization

SHAPE = (1, 4, 8, 8)
BROWNIAN = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde")
MODELS = {"flow": Flow(3.0), "noise": Discrete(), "v": Discrete("v_prediction")}
CASES = [(s, m) for m in MODELS for s in SAMPLERS if s != "dpm_adaptive" and (m == "flow" or s != "euler_stochastic")]


def watched(
    sampler: str,
    model: Parameterization,
    mask: Tensor | None = None,
    share: Callable[[Tensor], Tensor] = lambda x: x,
) -> None:
    """A run on the fake device; from the first evaluation on, waiting is an error."""

    def outputs(x: Tensor, timestep: Tensor, step: int, sigma: Tensor) -> Sequence[Tensor]:
        assert x.device == DEVICE and timestep.device.type == "cpu"
        watch.armed = True
        return [x * 0.5, x * 0.25]

    spec = SamplerSpec(sampler=sampler, scheduler="normal", steps=5, cfg_scale=4.0)
    with fake_cuda(), torch.inference_mode(), Watch(armed=False) as watch:
        out = sample_latent(outputs, spec, model, latent=on_cuda(*SHAPE), mask=mask, share=share)
    assert watch.armed and out.shape == SHAPE and out.device == DEVICE


@pytest.mark.parametrize(("sampler", "model"), CASES)
def test_no_step_of_a_sampler_waits_for_the_gpu(sampler: str, model: str) -> None:
    watched(sampler, MODELS[model])


@pytest.mark.parametrize("model", MODELS)
def test_dpm_adaptive_waits_for_the_error_of_each_try_and_for_nothing_else(model: str) -> None:
    with pytest.raises(HostSyncError, match=r"_local_scalar_dense"):
        watched("dpm_adaptive", MODELS[model])
    watched("dpm_adaptive", MODELS[model], share=lambda error: torch.zeros(()))


def test_dpm_adaptive_goes_by_the_error_that_all_ranks_share() -> None:
    latent = torch.randn(*SHAPE, generator=torch.Generator().manual_seed(1))
    tries = []
    for error in (0.0, 0.9):
        seen: list[StepReport] = []
        sample_latent(
            lambda x, *_: [x.sin()],
            SamplerSpec(sampler="dpm_adaptive", cfg_scale=1.0),
            Flow(),
            latent=latent,
            share=lambda _, error=error: torch.tensor(error),  # type: ignore[misc]
            on_step=seen.append,
        )
        tries.append(len(seen))
    assert tries[0] < tries[1] < 200


def test_a_mask_waits_in_no_step_either() -> None:
    watched("ddim", Flow(3.0), torch.ones(1, 1, 64, 64))


def test_a_sampler_that_looks_at_its_latent_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def curious(x: Tensor, run: samplers.Run) -> samplers.Sampler:
        for i, sigma, _ in run.pairs:
            denoised = yield samplers.Evaluation(x, sigma, i)
            x = denoised if x.abs().max() > 1 else x
        return x

    monkeypatch.setitem(SAMPLERS_BY_NAME, "euler", curious)
    with pytest.raises(HostSyncError, match=r"_local_scalar_dense at .*test_sampler_waits"):
        watched("euler", Flow(3.0))


# -- Brownian noise, drawn ahead ---------------------------------------------------------------------------------


def drawn(sampler: str, ahead: bool, on_step: object = lambda report: None, seed: int = 3) -> Tensor:
    spec = SamplerSpec(sampler=sampler, scheduler="karras", steps=8, cfg_scale=1.0, seed=seed)
    latent = torch.randn(*SHAPE, generator=torch.Generator().manual_seed(1))
    return sample_latent(
        lambda x, *_: [x.sin()],
        spec,
        Discrete(),
        latent=latent,
        on_step=on_step,  # type: ignore[arg-type]
        draw_ahead=ahead,
    )


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("brownian")]


@pytest.mark.parametrize("sampler", BROWNIAN)
def test_noise_drawn_ahead_is_the_noise_drawn_in_its_step(sampler: str) -> None:
    seen: list[bool] = []
    ahead = drawn(sampler, True, lambda report: seen.append(bool(threads())))
    assert all(seen) and not threads()
    assert torch.equal(ahead, drawn(sampler, False)) and not torch.equal(ahead, drawn(sampler, True, seed=4))


@pytest.mark.parametrize("error", [CancelledError("The job was cancelled."), ZeroDivisionError()])
def test_the_drawing_thread_ends_with_a_job_that_fails_or_is_cancelled(error: Exception) -> None:
    def on_step(report: StepReport) -> None:
        if report.index == 2:
            raise error

    with pytest.raises(type(error)):
        drawn("dpmpp_sde", True, on_step)
    assert not threads()


def test_a_draw_that_fails_fails_the_job_and_ends_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: brownian.BrownianPath, interval: brownian.Interval) -> Tensor:
        raise MemoryError("no room")

    monkeypatch.setattr(brownian.BrownianPath, "increment", broken)
    with pytest.raises(MemoryError, match="no room"):
        drawn("dpmpp_2m_sde", True)
    assert not threads()


def test_few_draws_wait_and_none_is_made_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long job must not fill the memory with noise of its last steps."""
    made: list[brownian.Interval] = []
    increment = brownian.BrownianPath.increment

    def counted(self: brownian.BrownianPath, interval: brownian.Interval) -> Tensor:
        made.append(interval)
        return increment(self, interval)

    monkeypatch.setattr(brownian.BrownianPath, "increment", counted)
    sigmas = torch.linspace(10, 1, 40)
    intervals = [(sigmas[i], sigmas[i + 1]) for i in range(39)]
    with StepNoise(torch.zeros(1), sigmas, 0, lambda x: x, ahead=True) as noise:
        noise.foresee(intervals)
        for interval in intervals[:3]:
            noise.brownian(*interval)
    assert 3 <= len(made) <= 3 + brownian.AHEAD and made == intervals[: len(made)]


def test_noise_that_was_not_foreseen_is_not_given_out_for_another() -> None:
    sigmas = torch.linspace(10, 1, 4)
    with StepNoise(torch.zeros(1), sigmas, 0, lambda x: x, ahead=True) as noise:
        noise.foresee([(sigmas[0], sigmas[1]), (sigmas[1], sigmas[2])])
        with pytest.raises(AssertionError, match="was foreseen"):
            noise.brownian(sigmas[1], sigmas[2])


# -- what waiting costs to measure -------------------------------------------------------------------------------


def test_on_a_gpu_no_wait_is_timed_but_for_a_timeline(monkeypatch: pytest.MonkeyPatch) -> None:
    def marked(*_: object, **__: object) -> None:
        raise AssertionError("an event was made")

    with fake_cuda(0, 2):
        monkeypatch.setattr(torch.cuda, "Event", marked)
        mesh = build_mesh(MeshSpec(ulysses=2))
        traffic = mesh.ulysses.traffic
        all_gather(on_cuda(4), 0, [4, 4], mesh.ulysses)
        assert traffic.collectives == 1 and traffic.waited == 0.0
        stops: list[object] = []
        monkeypatch.setattr(torch.cuda, "synchronize", stops.append)
        with Timeline([traffic], DEVICE) as timeline:
            all_gather(on_cuda(4), 0, [4, 4], mesh.ulysses)
        assert traffic.waited > 0.0 and [row[0] for row in timeline.rows] == [1] and stops == [DEVICE, DEVICE]
