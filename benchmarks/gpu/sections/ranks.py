"""Ranks on one card: every way to spread a model, each against one process on the same card, in fp32 and small."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from displaced_oracles import one_process
from rank_pool import RankPool
from served import NEGATIVE, POSITIVE
from torch import Tensor
from unet_inputs import inputs as unet_inputs

from parallel_backend.config import UNET_AXES, MeshSpec, SamplerSpec
from parallel_backend.rpc.conditioning import Conditioning
from parallel_backend.small_checkpoints.kl_vae import write_kl_vae
from parallel_backend.small_checkpoints.mmdit import small_config, write_mmdit
from parallel_backend.small_checkpoints.mmdit_control import STABILITY, write_control
from parallel_backend.small_checkpoints.prompts import random_prompt, random_sdxl_prompt
from parallel_backend.small_checkpoints.unet import CONFIGS, write_unet
from parallel_backend.small_checkpoints.unet_control import control_config, write_unet_control

from ..one_card import last_line, prepare, ranks_on_one_card
from ..options import Options
from ..rank_jobs import decoded, evaluated, sampled
from ..report import Report, Value

# Of the largest value. fp32 on both sides; kernels differ with the shapes that ranks have.
BOUND = 2e-4
EXACT = SamplerSpec(sampler="euler", steps=2, cfg_scale=4.0, seed=3)
# Rows, tokens and heads that no degree divides.
MMDIT_LATENT, UNET_LATENT, VAE_LATENT = (2, 16, 14, 18), (2, 4, 20, 12), (1, 16, 13, 10)
SDXL_PROMPTS = Conditioning(*random_sdxl_prompt(1)), Conditioning(*random_sdxl_prompt(2))


@dataclass(frozen=True)
class Case:
    """`run` is for each rank; `expected` computes here, in one process, what rank 0 is to give."""

    name: str
    run: Callable[[], Any]
    expected: Callable[[], Tensor]


@dataclass(frozen=True)
class Files:
    mmdit: Path
    unet: Path
    vae: Path
    unet_control: Path
    mmdit_control: Path

    @classmethod
    def written(cls, folder: Path) -> Files:
        mmdit, unet = small_config("sd3.5-medium"), CONFIGS["tiny"]
        return cls(
            write_mmdit(folder / "mmdit.safetensors", mmdit),
            write_unet(folder / "unet.safetensors", unet, "single file"),
            write_kl_vae(folder / "vae.safetensors", latent_channels=16, quant=False),
            write_unet_control(folder / "unet_control.safetensors", control_config(unet)),
            write_control(folder / "mmdit_control.safetensors", STABILITY, mmdit),
        )


def run(report: Report, options: Options) -> None:
    files = Files.written(options.scratch / "ranks")
    prepare(options.device)
    nccl = True
    for world in (2,) if options.tiny else (2, 4):
        ranks = ranks_on_one_card(options.device, world, try_nccl=nccl)
        nccl = ranks.nccl
        report.note(f"{world} ranks: over {ranks.over}")
        report.table(f"{world} ranks on one card, against one process on it", "case", "largest error", "", "s")
        for case in cases(files, options, world):
            report.row(case.name, *judged(case, ranks.pool, world))
        ranks.pool.close()


def judged(case: Case, pool: RankPool, world: int) -> list[Value]:
    """How far rank 0's result is from the expected one, and what that means."""
    begun = time.perf_counter()
    try:
        out = pool(world, case.run)[0]
    except AssertionError as failed:
        return [None, f"FAILS: {last_line(failed)}"]
    spent = time.perf_counter() - begun
    expected = case.expected()
    error = float((out - expected).abs().max() / expected.abs().max())
    return [error, "equal" if error <= BOUND else "DIFFERENT", spent]


def cases(files: Files, options: Options, world: int) -> Iterator[Case]:
    """One of each kind first, all mixtures after: a limit then costs least."""
    plain = [MeshSpec(**{axis: world}) for axis in ("ulysses", "ring", "tp", "pp")]
    bands = MeshSpec(patch=world)
    make = Makers(files, options.device)
    yield from map(make.mmdit, plain)
    yield make.unet(bands)
    yield make.unet(MeshSpec(patch=world, sliced=True))
    yield make.stale("UNet", files.unet, bands, unet_inputs("tiny", (1, 20, 12)))
    yield make.stale("MMDiT", files.mmdit, MeshSpec(ring=world), _mmdit_inputs())
    yield make.pipefusion(MeshSpec(pp=world), world + 1)
    yield make.vae()
    yield make.unet_control(bands)
    yield from map(make.mmdit_control, plain)
    if options.tiny:
        return
    mixed = [mesh for mesh in MeshSpec.all_of(world) if mesh not in plain]
    yield from map(make.mmdit, mixed)
    yield from map(make.unet, (mesh for mesh in MeshSpec.all_of(world, UNET_AXES) if mesh != bands))
    yield from (make.pipefusion(mesh, 2) for mesh in mixed if mesh.pp > 1)


class Makers:
    """Cases of each kind. What one process gives is computed once for all meshes."""

    def __init__(self, files: Files, device: str) -> None:
        self.files, self.device = files, device
        self._mmdit = partial(sampled, device, files.mmdit)
        self._unet = partial(sampled, device, files.unet)
        self._mmdit_job = torch.zeros(MMDIT_LATENT), (POSITIVE, NEGATIVE), EXACT
        self._unet_job = torch.zeros(UNET_LATENT), SDXL_PROMPTS, EXACT
        self._mmdit_alone = cache(partial(self._mmdit, MeshSpec(), *self._mmdit_job))
        self._unet_alone = cache(partial(self._unet, MeshSpec(), *self._unet_job))

    def mmdit(self, mesh: MeshSpec) -> Case:
        return Case(f"MMDiT, {mesh.describe()}", partial(self._mmdit, mesh, *self._mmdit_job), self._mmdit_alone)

    def unet(self, mesh: MeshSpec) -> Case:
        return Case(f"UNet, {mesh.describe()}", partial(self._unet, mesh, *self._unet_job), self._unet_alone)

    def unet_control(self, mesh: MeshSpec) -> Case:
        rows, columns = (8 * side for side in UNET_LATENT[2:])
        hint = torch.rand(1, 3, rows, columns, generator=torch.Generator().manual_seed(4))
        run = partial(self._unet, control=(self.files.unet_control, hint))
        return self._controlled("UNet", mesh, run, self._unet_job)

    def mmdit_control(self, mesh: MeshSpec) -> Case:
        hint = torch.randn(1, 16, *MMDIT_LATENT[2:], generator=torch.Generator().manual_seed(4))
        run = partial(self._mmdit, control=(self.files.mmdit_control, hint))
        return self._controlled("MMDiT", mesh, run, self._mmdit_job)

    @staticmethod
    def _controlled(what: str, mesh: MeshSpec, run: Callable[..., Tensor], job: tuple[Any, ...]) -> Case:
        name = f"{what} with a ControlNet, {mesh.describe()}"
        return Case(name, partial(run, mesh, *job), partial(run, MeshSpec(), *job))

    def stale(self, what: str, path: Path, mesh: MeshSpec, given: Sequence[Tensor]) -> Case:
        """Of one input again and again, what another rank had before is what it has now: displaced is then exact."""
        run = partial(evaluated, self.device, path, mesh, given, True)
        alone = partial(evaluated, self.device, path, MeshSpec(), given, False)
        return Case(f"{what}, {mesh.describe()}, stale buckets", run, alone)

    def pipefusion(self, mesh: MeshSpec, patches: int) -> Case:
        """Against the tests' process that plays all stages, on this device."""
        latent = torch.zeros(1, 16, 20, 12)
        changes = {"sampler": "euler", "steps": 3}
        spec = SamplerSpec(seed=3, cfg_scale=4.0, warmup_steps=1, num_patches=patches, **changes)
        run = partial(self._mmdit, mesh, latent, (POSITIVE, NEGATIVE), spec)
        where = torch.device(self.device)
        alone = lambda: one_process(self.files.mmdit, latent.to(where), 1, patches, where, **changes).cpu()  # noqa: E731
        return Case(f"MMDiT, {mesh.describe()}, PipeFusion of {patches} patches", run, alone)

    def vae(self) -> Case:
        latent = torch.randn(VAE_LATENT, generator=torch.Generator().manual_seed(1))
        run = partial(decoded, self.device, self.files.vae, latent)
        return Case("VAE in bands", run, run)


def _mmdit_inputs() -> tuple[Tensor, ...]:
    x = torch.randn(1, 16, 14, 18, generator=torch.Generator().manual_seed(5))
    return x, torch.full((1,), 500.0), *random_prompt(1, 77)
