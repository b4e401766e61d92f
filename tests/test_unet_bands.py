"""SDXL's UNet in bands, apart from any backend: exact against diffusers, displaced against exact."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from local_network import evaluated, local_network
from rank_pool import RankPool, groups
from torch import Tensor
from unet_inputs import inputs

from parallel_backend import MeshSpec
from parallel_backend.distributed.mesh import build_mesh
from parallel_backend.distributed.stale import Phase, Step
from parallel_backend.models.network import Network
from parallel_backend.models.unet import band_rows
from parallel_backend.small_checkpoints.unet import CONFIGS, random_unet

pytestmark = pytest.mark.busy

# Heights that divide in bands of whole units and heights that don't; odd widths.
SIZES = [(2, 16, 16), (1, 21, 13), (1, 17, 8)]


@cache
def reference(name: str) -> Any:
    return random_unet(CONFIGS[name])


@cache
def output(name: str, size: tuple[int, int, int]) -> Tensor:
    """What any number of bands is to give."""
    x, timesteps, context, y = inputs(name, size)
    with torch.inference_mode():
        return reference(name)(x, timesteps, context, class_labels=y).sample


@cache
def network(path: Path, mesh: MeshSpec) -> Network:
    return local_network(path, build_mesh(mesh, groups()))


@torch.inference_mode()
def forward_case(path: Path, mesh: MeshSpec, given: tuple[Tensor, ...], phases: list[Phase]) -> list[Tensor]:
    """The output of each of the phases, for the same input."""
    model = network(path, mesh)
    kept = model.new_job(displaced=len(phases) > 1)
    outputs = [evaluated(model, *given, Step(i, phase, kept=kept)).clone() for i, phase in enumerate(phases)]
    kept.close()
    return outputs


def fits(name: str, rows: int, world_size: int) -> bool:
    """Whether so many bands have a whole unit of rows each; fewer rows are refused by name."""
    return rows > CONFIGS[name].row_unit * (world_size - 1)


@pytest.mark.parametrize(
    ("name", "size", "world_size"),
    [
        (n, s, w)
        for n in ("tiny", "inpainting", "editing", "refiner")
        for s in (SIZES if n in ("tiny", "refiner") else SIZES[1:2])
        for w in (1, 2, 3, 4)
        if fits(n, s[1], w)
    ],
    ids=str,
)
def test_output_equals_diffusers(
    name: str, size: tuple[int, int, int], world_size: int, ranks: RankPool, unets: Path
) -> None:
    given = inputs(name, size)
    expected = output(name, size)
    path = unets / f"unet-{name}.safetensors"
    # A neighbour that sends what it sent before is as good as one that sends anew.
    phases: list[Phase] = ["sync", "displaced", "displaced"]
    for outputs in ranks(world_size, forward_case, path, MeshSpec(patch=world_size), given, phases):
        for out in outputs:
            assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("world_size", [2, 3, 5, 6])
def test_bands_are_whole_units_but_for_the_last(world_size: int) -> None:
    for rows in range(4 * (world_size - 1) + 1, 70):
        bands = band_rows(rows, world_size, 4)
        assert sum(bands) == rows and min(bands) > 0
        assert all(band % 4 == 0 for band in bands[:-1])
        assert max(bands) - min(bands) <= 7


@torch.inference_mode()
def trajectory_case(path: Path, mesh: MeshSpec, how: str) -> list[Tensor]:
    """Outputs along a straight path of inputs, a hundredth of the way each, as in a run of many steps."""
    model = network(path, mesh)
    start, timesteps, context, y = inputs("tiny", (1, 16, 16))
    kept = model.new_job(displaced=how == "displaced")
    outputs = []
    for i in range(4):
        x = torch.lerp(start, inputs("tiny", (1, 16, 16), seed=9)[0], 0.01 * i)
        if how == "alone":
            half = 8 * groups().rank
            outputs.append(evaluated(model, x[:, :, half : half + 8], timesteps, context, y, Step()).clone())
        else:
            phase: Phase = "displaced" if how == "displaced" and i else "sync"
            outputs.append(evaluated(model, x, timesteps, context, y, Step(i, phase, kept=kept)).clone())
    kept.close()
    return outputs


def test_displaced_is_far_nearer_to_exact_than_no_communication(ranks: RankPool, unets: Path) -> None:
    path = unets / "unet-tiny.safetensors"
    exact = ranks(2, trajectory_case, path, MeshSpec(patch=2), "sync")[0]
    displaced = ranks(2, trajectory_case, path, MeshSpec(patch=2), "displaced")[0]
    halves = ranks(2, trajectory_case, path, MeshSpec(dp=2), "alone")
    alone = [torch.cat(pair, dim=2) for pair in zip(*halves, strict=True)]
    error, control = (
        max(float((o - e).norm() / e.norm()) for o, e in zip(outputs[1:], exact[1:], strict=True))
        for outputs in (displaced, alone)
    )
    assert torch.equal(displaced[0], exact[0])
    assert 0 < error < control / 20, (error, control)
