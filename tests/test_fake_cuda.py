"""The CUDA path without CUDA: on every mesh no operation mixes devices, and in no model does the host wait for the GPU.

All meshes of up to eight ranks, both ends of each: PARALLEL_MMDIT_ALL_MESHES=1 pytest tests/test_fake_cuda.py
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
from fake_cuda.device import DEVICE, fake_cuda, on_cuda
from fake_cuda.networks import (
    Config,
    Evaluations,
    from_scratch,
    kl_vae,
    large,
    medium,
    predictor,
    shallow_sdxl,
    taesd,
)
from fake_cuda.watch import HostSyncError, MixedDevicesError, Watch
from torch import Tensor

from parallel_backend.config import MMDIT_AXES, MeshSpec, StepCache
from parallel_backend.distributed.step_cache import BranchCache, StepCaches
from parallel_backend.models.pipeline import Pipeline
from parallel_backend.models.vae import BandVAE

ALL = os.environ.get("PARALLEL_MMDIT_ALL_MESHES") == "1"


def meshes(axes: tuple[str, ...], worlds: tuple[int, ...] = (1, 2, 3, 4, 8)) -> list[MeshSpec]:
    """Those of axes of 1, 2 or 3 ranks.

    An axis of more ranks runs the same lines more often: two have a first and a last rank, three have one between them, and
    shares that don't divide. dp leaves the others fewer pictures and nothing else: with cfg it is there, and alone.
    """
    found = [mesh for world in (range(1, 9) if ALL else worlds) for mesh in MeshSpec.all_of(world, axes)]
    return [m for m in found if ALL or (max(m.degrees.values()) <= 3 and (m.dp == 1 or m.world_size <= m.dp * m.cfg))]


def ends(mesh: MeshSpec) -> list[int]:
    """The first and the last rank of an axis; where several meet, the last of all."""
    return sorted({0, mesh.world_size - 1} if ALL or mesh.world_size <= 3 else {mesh.world_size - 1})


# Two blocks, or one a stage: the first (with two attentions, in SD3.5-medium), and the last, which ends the text's half.
TRANSFORMERS: list[tuple[str, MeshSpec]] = [
    *(("large", mesh) for mesh in meshes(MMDIT_AXES)),
    # What these families have beside SD3.5-large is in their blocks: every axis of those beside every other.
    *(
        (name, mesh)
        for name in ("medium", "from scratch")
        for mesh in meshes(MMDIT_AXES, (4,))
        if mesh.dp * mesh.cfg == 1
    ),
]


def shallow(name: str, mesh: MeshSpec) -> Config:
    depth = max(2, mesh.pp)
    return {"large": large(depth), "medium": medium(depth, dual=1), "from scratch": from_scratch(depth)}[name]


def named(value: object) -> str | None:
    return value.describe() if isinstance(value, MeshSpec) else None


def checked(config: Config, mesh: MeshSpec, rank: int, tokens: tuple[int, int] = (77, 77), displaced: int = 0) -> None:
    """One evaluation in sync and `displaced` others."""
    with fake_cuda(rank, mesh.world_size), torch.inference_mode():
        run = Evaluations(predictor(config, mesh), (512, 768), displaced > 0, tokens, rows=mesh.dp)
        for phase in ("sync", *("displaced",) * displaced):
            with Watch() as watch:
                out = run.next(phase)  # type: ignore[arg-type]
            assert [x.shape for x in out] == [run.shape] * 2 and out[0].device == DEVICE and watch.launches["addmm"]


@pytest.mark.parametrize(("name", "mesh"), TRANSFORMERS, ids=named)
def test_a_transformers_evaluation_stays_on_its_device(name: str, mesh: MeshSpec) -> None:
    for rank in ends(mesh):
        # Prompts of two lengths are two calls, those of one length are two rows.
        checked(shallow(name, mesh), mesh, rank, (154, 77) if mesh.world_size == 2 else (77, 77))


@pytest.mark.parametrize("form", ["fp8", "fp8 by rows", "fp8 products", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS"])
@pytest.mark.parametrize("config", [medium(2, dual=1), shallow_sdxl()], ids=["medium", "sdxl"])
def test_quantised_weights_stay_on_their_device(form: str, config: Config) -> None:
    with fake_cuda(), torch.inference_mode():
        run = Evaluations(predictor(config, MeshSpec(), form=form), (512, 768))
        run.next()  # after which constants are on the device
        with Watch() as watch:
            out = run.next()
        assert out[0].device == DEVICE and watch.launches.total()


@pytest.mark.parametrize("mesh", [MeshSpec(ring=2), MeshSpec(ring=3), MeshSpec(cfg=2, ring=2, ulysses=2)], ids=named)
def test_displaced_ring_steps_stay_on_their_device(mesh: MeshSpec) -> None:
    checked(medium(2, dual=1), mesh, mesh.world_size - 1, displaced=2)


# (mesh, rank, displaced evaluations): the first band, the last, and one between; the axes around them share rows alone.
UNETS = [
    (MeshSpec(), 0, 0),
    (MeshSpec(dp=2, cfg=2), 3, 0),
    (MeshSpec(patch=2), 0, 2),
    (MeshSpec(patch=3), 1, 2),
    (MeshSpec(dp=2, cfg=2, patch=2), 7, 0),
    (MeshSpec(cfg=2, sliced=True), 1, 0),
    (MeshSpec(cfg=2, patch=2, sliced=True), 3, 1),
]


@pytest.mark.parametrize(("mesh", "rank", "displaced"), UNETS, ids=named)
def test_a_unets_evaluations_stay_on_their_device(mesh: MeshSpec, rank: int, displaced: int) -> None:
    checked(shallow_sdxl(), mesh, rank, displaced=displaced)


@pytest.mark.parametrize(
    ("config", "mesh", "method"),
    [
        (medium(2, dual=1), MeshSpec(ulysses=2), "first_block"),
        (medium(2, dual=1), MeshSpec(tp=2), "teacache"),
        (shallow_sdxl(), MeshSpec(patch=2), "deepcache"),
    ],
    ids=lambda value: value if isinstance(value, str) else named(value) or "",
)
def test_step_caches_mix_no_devices_and_counting_waits_for_none(
    config: Config, mesh: MeshSpec, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    relative_change = BranchCache._relative_change

    def little(cache: BranchCache, seen: Tensor | None) -> float:
        """Tensors here have no values, of which one could be told from another."""
        relative_change(cache, seen)
        return 0.0

    monkeypatch.setattr(BranchCache, "_relative_change", little)
    asked = StepCache(method, threshold=1e9, interval=2, first_steps=0, last_steps=0)
    with fake_cuda(1, 2), torch.inference_mode():
        run = Evaluations(predictor(config, mesh), (512, 768), tokens=(77, 77), rows=mesh.dp)
        run.kept.caches = caches = StepCaches(asked, run.predictor.mesh.everyone, [0], 1)
        caches.steps, launches = 4, []
        for step in range(4):
            caches.begin(step, ())
            with Watch(armed=method == "deepcache") as watch:
                run.next()
            launches.append(watch.launches.total())
        assert caches.reused() == ([1, 3] if method == "deepcache" else [1, 2, 3])
        assert launches[1] < launches[0] and launches[1] == launches[3]


STAGES = [
    MeshSpec(pp=2),
    MeshSpec(pp=3),
    MeshSpec(cfg=2, pp=2),
    MeshSpec(pp=2, ulysses=2),
    MeshSpec(pp=2, ring=2),
    MeshSpec(pp=2, tp=2),
    MeshSpec(dp=2, pp=2),
]


@pytest.mark.parametrize(
    ("name", "mesh"), [*(("medium", mesh) for mesh in STAGES), ("from scratch", MeshSpec(pp=2))], ids=named
)
def test_every_stage_of_a_pipeline_stays_on_its_device(name: str, mesh: MeshSpec) -> None:
    for stage in range(mesh.pp):
        rank = next(r for r in reversed(range(mesh.world_size)) if mesh.coordinates(r)["pp"] == stage)
        with fake_cuda(rank, mesh.world_size), torch.inference_mode():
            run = Evaluations(
                predictor(shallow(name, mesh), mesh),
                (512, 512),
                True,
                (77, 154) if mesh.world_size == 2 else (77, 77),
                mesh.dp,
            )
            share = run.share()
            run.next("sync", share)
            pipeline = Pipeline(run.predictor, share, run.shape, run.kept, 1, lambda: False)
            with Watch() as watch:
                flow(pipeline, run.shape)
                out = pipeline.finish(on_cuda(*run.shape))
            assert watch.launches["addcmul"] and out.shape == run.shape


def flow(pipeline: Pipeline, shape: tuple[int, ...]) -> None:
    """Two displaced steps."""
    times = [torch.tensor(500.0), torch.tensor(400.0)]
    if not pipeline.runs_samplers:
        pipeline.follow(times)
        return
    for time in times:
        pipeline.begin(time)
        for patch, rows in enumerate(pipeline.rows):
            pipeline.submit(patch, on_cuda(*shape)[:, :, rows])
        collected = [pipeline.collect(patch) for patch in range(len(pipeline.rows))]
        assert [x.shape[2] for x, _ in collected] == [rows.stop - rows.start for rows in pipeline.rows]


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 3)])
@pytest.mark.parametrize("make", [kl_vae, taesd])
def test_a_vae_in_bands_stays_on_its_device(make: Callable[..., BandVAE], rank: int, world_size: int) -> None:
    with fake_cuda(rank, world_size), torch.inference_mode():
        vae = make(torch.bfloat16, layers=1)
        start, stop = vae._cut(9, 12)
        latent, pixels = on_cuda(1, 16, 9, 12)[:, :, start:stop], on_cuda(1, 3, 72, 96)[:, :, start * 8 : stop * 8]
        with Watch(armed=False) as watch:  # the first time, the shares of bands and their parts are put on the device
            image = vae._bands(vae._pictured, latent, 8)
            watch.armed = True
            encoded = vae._bands(vae._encoded, pixels, 1)
        assert image is not None and image.own.shape == (1, 3, (stop - start) * 8, 96)
        assert encoded is not None and encoded.own.shape == (1, 16, stop - start, 12)


# -- that all of this can fail -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (lambda x: x + torch.ones(2), MixedDevicesError, r"add of \['cpu', 'cuda'\] at .*test_fake_cuda.py"),
        (lambda x: torch.cat([x, torch.ones(2)]), MixedDevicesError, "cat"),
        (lambda x: torch.stack([x[0], torch.tensor(1.0)]), MixedDevicesError, "unsqueeze|stack|cat"),
        (lambda x: x.sum().item(), HostSyncError, "_local_scalar_dense at .*test_fake_cuda.py"),
        (lambda x: bool(x[0] > 0), HostSyncError, "_local_scalar_dense"),
        (lambda x: x.cpu(), HostSyncError, "a copy from cuda to cpu"),
        (lambda x: torch.ones(2).to(DEVICE), HostSyncError, "a copy from cpu to cuda"),
        (lambda x: torch.ones(2).to(DEVICE, non_blocking=True), HostSyncError, "from cpu to cuda"),
        (lambda x: x.copy_(torch.ones(2)), HostSyncError, "from cpu to cuda"),
        (lambda x: x.nonzero(), HostSyncError, "nonzero"),
        (lambda x: torch.linalg.solve(torch.diag(x), x), HostSyncError, "linalg"),
    ],
)
def test_a_planted_fault_is_named_with_its_place(fault: object, error: type[Exception], words: str) -> None:
    with fake_cuda(), Watch(), pytest.raises(error, match=words):
        fault(on_cuda(2))  # type: ignore[operator]


def test_what_costs_no_wait_is_let_through() -> None:
    with fake_cuda(), Watch() as watch:
        x = on_cuda(2) * torch.tensor(3.0)
        x = x + torch.ones(2).pin_memory().to(DEVICE, non_blocking=True)
        assert x.device == DEVICE
    assert watch.launches == {"mul": 1, "_to_copy": 1, "add": 1, "empty": 0}


def test_a_planted_sync_in_a_model_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from parallel_backend.models import mmdit

    hidden = mmdit.mlp_hidden

    def curious(mlp: mmdit.Mlp, x: Tensor, mod: Sequence[Tensor]) -> Tensor:
        assert float(x.sum()) == float(x.sum())
        return hidden(mlp, x, mod)

    monkeypatch.setattr(mmdit, "mlp_hidden", curious)
    with pytest.raises(HostSyncError, match="_local_scalar_dense"):
        checked(large(2), MeshSpec(), 0)


def test_nothing_of_the_fake_device_is_left_in_place() -> None:
    before = (Tensor.__getitem__, Tensor.__setitem__, Tensor.contiguous, Tensor.pin_memory, torch.Generator)
    with fake_cuda(1, 2):
        assert dist.get_rank() == 1 and Tensor.__getitem__ is not before[0]
    assert before == (Tensor.__getitem__, Tensor.__setitem__, Tensor.contiguous, Tensor.pin_memory, torch.Generator)
    assert not dist.is_initialized()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1).to("cuda")
