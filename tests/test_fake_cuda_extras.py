"""What hangs inside models, on the CUDA path without CUDA: no operation mixes devices, and no evaluation after the first waits for the GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import pytest
import torch
from fake_cuda.device import DEVICE, fake_cuda
from fake_cuda.networks import Config, Evaluations, medium, predictor, shallow_sdxl
from fake_cuda.watch import HostSyncError, MixedDevicesError, Watch
from hung_inside import LATENTS, OF_MMDITS, OF_UNETS, TOKENS, Make
from torch import Tensor

from parallel_backend.config import MeshSpec
from parallel_backend.extras.reading import _KINDS, read_extra
from parallel_backend.extras.target import Target
from parallel_backend.models.extra import Extra
from parallel_backend.models.prediction import Predictor
from parallel_backend.rpc.extras import KeptAttention

SIZE = (64, 96)
MMDIT_MESHES = [MeshSpec(), MeshSpec(cfg=2), MeshSpec(ring=2), MeshSpec(ulysses=2), MeshSpec(tp=2)]


def evaluations_with(of: Predictor, extras: Sequence[Extra]) -> Callable[[], list[Tensor]]:
    """Of a job, one after the other."""
    evaluations = Evaluations(of, (SIZE[0] * 8, SIZE[1] * 8), tokens=(TOKENS, TOKENS), rows=LATENTS)
    return partial(evaluations.next, share=of.share(LATENTS, evaluations.prompts, extras))


def run(of: Predictor, make: Make) -> None:
    target = Target(of, *SIZE)
    evaluate = evaluations_with(of, [read_extra(spec, target) for spec in make(target)])
    evaluate()  # after which what differs by row is on the device
    with Watch() as watch:
        out = evaluate()
    shape = (LATENTS, of.network.config.channels, *SIZE)
    assert [x.shape for x in out] == [shape] * 2 and out[0].device == DEVICE and watch.launches.total()


def faults(config: Config, mesh: MeshSpec, rank: int, cases: Mapping[str, Make]) -> dict[str, str]:
    """By case, what is wrong."""
    found = {}
    with fake_cuda(rank, mesh.world_size), torch.inference_mode():
        of = predictor(config, mesh)
        for case, make in cases.items():
            try:
                run(of, make)
            except (MixedDevicesError, HostSyncError) as error:
                found[case] = str(error)
    return found


def test_a_unets_evaluations_with_each_stay_on_their_device() -> None:
    assert not faults(shallow_sdxl(), MeshSpec(cfg=2, patch=2), 3, OF_UNETS)


@pytest.mark.parametrize("mesh", MMDIT_MESHES, ids=MeshSpec.describe)
def test_a_transformers_evaluations_with_each_stay_on_their_device(mesh: MeshSpec) -> None:
    assert not faults(medium(2, dual=1), mesh, mesh.world_size - 1, OF_MMDITS)


@pytest.mark.parametrize("form", ["taken", "taken_mean"])
def test_outputs_that_were_kept_are_taken_on_their_device(form: Literal["taken", "taken_mean"]) -> None:
    with fake_cuda(3, 4), torch.inference_mode():
        of = predictor(shallow_sdxl(), MeshSpec(cfg=2, patch=2))
        target, launches = Target(of, *SIZE), []
        for asked in ("kept", form):
            gated = read_extra(KeptAttention(sampling="a", self_attention=asked, cross_attention=asked), target)
            evaluate = evaluations_with(of, [gated])
            with Watch() as watch:
                evaluate()
            launches.append(watch.launches.total())
    assert launches[1] < launches[0]


def test_every_kind_is_among_them() -> None:
    with fake_cuda():
        targets = [Target(predictor(config, MeshSpec()), *SIZE) for config in (shallow_sdxl(), medium(2, dual=1))]
        made = [
            type(spec) for target, cases in zip(targets, (OF_UNETS, OF_MMDITS), strict=True)
            for make in cases.values() for spec in make(target)
        ]  # fmt: skip
    assert set(made) == _KINDS.keys()
