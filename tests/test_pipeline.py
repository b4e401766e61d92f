"""Displaced steps of transformers: PipeFusion and stale ring keys, on real ranks against one process that plays all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from displaced_oracles import NEGATIVE, POSITIVE, SETTINGS, one_process, one_process_of_a_ring, played_by_one
from torch import Tensor

from parallel_backend import Backend, MeshSpec
from parallel_backend.bench.communication import METHODS, Method, Sizes, count
from parallel_backend.bench.trace import BYTES, END, KIND, RANK, START, chrome_trace, mesh_of, picture, table
from parallel_backend.config import SAMPLERS_OF_PATCHES
from parallel_backend.distributed.mesh import Mesh, build_mesh
from parallel_backend.distributed.stale import TokenKV
from parallel_backend.distributed.traffic import COMPUTE
from parallel_backend.errors import BackendError, CancelledError, ConfigError, InputError, UnsupportedError
from parallel_backend.models.tokens import Tokens, patch_rows
from parallel_backend.models.transformer import stage_blocks
from parallel_backend.small_checkpoints.mmdit import small_config, write_mmdit

PP2 = [mesh for mesh in MeshSpec.all_of(2) if mesh.pp > 1]
PP4 = [mesh for mesh in MeshSpec.all_of(4) if mesh.pp > 1]


def checkpoint(models: Path, family: str = "sd3.5-medium") -> Path:
    return models / "diffusion_models" / f"{family}.safetensors"


def sampled(backend: Backend, path: Path, mesh: MeshSpec, latent: Tensor, **changes: Any) -> Tensor:
    return backend.load_model(path, mesh, "float32").sample(latent, POSITIVE, NEGATIVE, **SETTINGS | changes)


def assert_close(out: Tensor, expected: Tensor, bound: float = 2e-5) -> None:
    assert torch.isfinite(expected).all()
    assert (out - expected).abs().max() <= bound * expected.abs().max()


# -- tokens and their keys --------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("patches", [1, 2, 3])
def test_tokens_of_all_ranks_join_in_the_order_of_the_image(degree: int, patches: int) -> None:
    columns, rows, text = 5, 7, 11
    ranges = [(a * columns, b * columns) for a, b in patch_rows(rows, patches)]
    mesh = build_mesh(MeshSpec())
    spread = [Tokens.spread(ranges, text, _seen_from(mesh, rank, degree)) for rank in range(degree)]
    image, words = torch.arange(rows * columns).view(1, -1, 1), torch.arange(text).view(1, -1, 1)
    gathered = torch.cat([tokens.take_image(image) for tokens in spread], dim=1)
    assert torch.equal(spread[0].in_order(gathered), image)
    assert torch.equal(torch.cat([words[:, slice(*tokens.text)] for tokens in spread], dim=1), words)
    for patch, (first, last) in enumerate(ranges):
        of_patch = [tokens.of_patch(patch) for tokens in spread]
        own = torch.cat([t.take_image(image[:, first:last], t.first_image_token) for t in of_patch], dim=1)
        assert torch.equal(own, image[:, first:last])
        assert sum(of_patch[0].counts(of_patch[0].present)) == last - first + (text if patch == 0 else 0)


def _seen_from(mesh: Mesh, rank: int, degree: int) -> Mesh:
    return replace(mesh, ring=replace(mesh.ring, degree=degree, rank=rank))


def test_a_patch_replaces_its_own_keys_and_no_others() -> None:
    segments = [(2, 1), (3, 2), (1, 2)]
    kv = TokenKV(segments)
    names = [
        [[f"{s}{rank}{i}" for i in range(n)] for rank, n in enumerate(counts)] for s, counts in enumerate(segments)
    ]
    values = {name: float(number) for number, name in enumerate(n for s in names for r in s for n in r)}

    def given(present: Sequence[int], offset: float) -> Tensor:
        order = [name for rank in range(2) for s in present for name in names[s][rank]]
        return torch.tensor([values[name] + offset for name in order]).view(1, -1, 1, 1)

    k, v = kv.update(given((0, 1, 2), 0), given((0, 1, 2), 100), (0, 1, 2))
    assert k.flatten().tolist() == sorted(values.values()) and torch.equal(v, k + 100)
    k, v = kv.update(given((2,), 50), given((2,), 150), (2,))
    changed = {values[name] for rank in names[2] for name in rank}
    expected = torch.tensor([value + 50 * (value in changed) for value in sorted(values.values())])
    assert torch.equal(k.flatten(), expected) and torch.equal(v, k + 100)


@pytest.mark.parametrize(
    ("costs", "stages", "sizes"),
    [
        ([1.0] * 38, 4, [9, 10, 9, 10]),
        ([1.0] * 24, 5, [5, 5, 4, 5, 5]),
        ([4 / 3] * 13 + [1.0] * 11, 2, [11, 13]),
        ([1.0] * 3, 3, [1, 1, 1]),
        ([9.0, 1.0, 1.0, 1.0], 3, [1, 1, 2]),
    ],
)
def test_stages_get_blocks_of_equal_cost(costs: list[float], stages: int, sizes: list[int]) -> None:
    ranges = stage_blocks(costs, stages)
    assert [i for blocks in ranges for i in blocks] == list(range(len(costs)))
    assert [len(blocks) for blocks in ranges] == sizes


# -- PipeFusion -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", PP2, ids=MeshSpec.describe)
@pytest.mark.parametrize(
    ("family", "patches"), [*(("sd3.5-medium", n) for n in (1, 2, 3, 4)), ("sd3-medium", 3), ("sd3.5-large", 2)]
)
def test_two_stages_equal_one_process_that_plays_both(
    mesh: MeshSpec, family: str, patches: int, backend2: Backend, models: Path
) -> None:
    latent = torch.zeros(1, 16, 14, 18)
    out = sampled(backend2, checkpoint(models, family), mesh, latent, warmup_steps=2, num_patches=patches)
    assert_close(out, played_by_one(checkpoint(models, family), tuple(latent.shape), 2, patches))


# Two patches are fewer than four stages; two stages with each number of patches are above.
@pytest.mark.parametrize(
    ("mesh", "patches"),
    [*((mesh, 5) for mesh in PP4), (MeshSpec(pp=4), 2), (MeshSpec(pp=2, ring=2), 2)],
    ids=lambda value: value.describe() if isinstance(value, MeshSpec) else None,
)
def test_mixtures_of_four_equal_one_process_that_plays_all(
    mesh: MeshSpec, patches: int, backend4: Backend, models: Path
) -> None:
    latent = torch.zeros(2, 16, 20, 12)
    out = sampled(backend4, checkpoint(models), mesh, latent, warmup_steps=1, num_patches=patches)
    assert_close(out, played_by_one(checkpoint(models), tuple(latent.shape), 1, patches))


def test_a_share_of_dp_without_rows_waits_for_the_others(backend4: Backend, models: Path) -> None:
    latent, out = torch.zeros(1, 16, 12, 12), []
    for mesh in (MeshSpec(dp=2, pp=2), MeshSpec(cfg=2, pp=2)):
        model = backend4.load_model(checkpoint(models), mesh, "float32")
        out.append(model.sample(latent, POSITIVE, POSITIVE, **SETTINGS, warmup_steps=1))
    assert_close(out[0], out[1])


@pytest.mark.parametrize("sampler", SAMPLERS_OF_PATCHES)
def test_samplers_run_on_patches_at_different_steps(sampler: str, backend2: Backend, models: Path) -> None:
    latent, mesh = torch.randn(1, 16, 12, 10, generator=torch.Generator().manual_seed(0)), MeshSpec(pp=2)
    mask = (torch.arange(12 * 10).view(1, 1, 12, 10) % 7 > 2).float()
    settings: dict[str, Any] = {"sampler": sampler, "noise_mask": mask, "cfg_scale": 1.0, "denoise": 0.8}
    out = sampled(backend2, checkpoint(models), mesh, latent, warmup_steps=2, num_patches=3, **settings)
    assert_close(out, one_process(checkpoint(models), latent, 2, 3, **settings))


@pytest.fixture(scope="module")
def exact(backend4: Backend, models: Path) -> Tensor:
    """Each picture computed whole by one rank."""
    return sampled(backend4, checkpoint(models), MeshSpec(dp=4), torch.zeros(3, 16, 14, 18), steps=3)


# What stands beside pp and ring is in the mixtures: here are those alone, together, and on shares of the pictures.
EXACT = [mesh for mesh in MeshSpec.all_of(4) if mesh.pp * mesh.ring * mesh.dp == 4 and mesh.dp < 4]


@pytest.mark.parametrize("mesh", EXACT, ids=MeshSpec.describe)
def test_warm_up_over_all_steps_is_exact(mesh: MeshSpec, exact: Tensor, backend4: Backend, models: Path) -> None:
    for warmup in (3, 9) if mesh == MeshSpec(pp=4) else (3,):
        out = sampled(backend4, checkpoint(models), mesh, torch.zeros(3, 16, 14, 18), steps=3, warmup_steps=warmup)
        assert_close(out, exact)


@pytest.mark.parametrize("mesh", [MeshSpec(pp=2), MeshSpec(ring=2)], ids=MeshSpec.describe)
def test_displaced_pictures_come_nearer_with_warm_up(mesh: MeshSpec, backend2: Backend, models: Path) -> None:
    latent, path = torch.zeros(1, 16, 16, 16), checkpoint(models)
    settings = {"steps": 8, "sampler": "dpmpp_2m"}
    exact = sampled(backend2, path, mesh, latent, **settings)
    errors = [
        float((sampled(backend2, path, mesh, latent, warmup_steps=warmup, **settings) - exact).norm() / exact.norm())
        for warmup in (1, 3, 6)
    ]
    assert errors[0] > errors[1] > errors[2] > 1e-5, errors


@pytest.mark.parametrize("mesh", [MeshSpec(pp=2), MeshSpec(ring=2)], ids=MeshSpec.describe)
def test_nothing_survives_a_request_a_cancel_or_another_size(mesh: MeshSpec, backend2: Backend, models: Path) -> None:
    path, first, other = checkpoint(models), torch.zeros(1, 16, 16, 16), torch.zeros(2, 16, 12, 20)
    wanted = sampled(backend2, path, mesh, first, warmup_steps=1)
    sampled(backend2, path, mesh, other, warmup_steps=1, seed=4)
    assert torch.equal(sampled(backend2, path, mesh, first, warmup_steps=1), wanted)
    for last in (0, 1, 3):  # in warm-up, in the first displaced step, and when all ranks are at different steps

        def stop(step: Any, last: int = last) -> None:
            if step.index == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sampled(backend2, path, mesh, other, warmup_steps=1, steps=30, on_step=stop)
        assert torch.equal(sampled(backend2, path, mesh, first, warmup_steps=1), wanted)


def test_previews_are_those_of_whole_steps(backend2: Backend, models: Path) -> None:
    latent, seen = torch.zeros(1, 16, 12, 12), []
    sampled(
        backend2,
        checkpoint(models),
        MeshSpec(pp=2),
        latent,
        warmup_steps=2,
        num_patches=3,
        on_step=seen.append,
        preview="all",
    )
    assert [step.index for step in seen] == [0, 1, 2, 3]
    assert all(step.x.shape == latent.shape and step.denoised.shape == latent.shape for step in seen)


# -- stale keys and values on a ring ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd3-medium", "sd3.5-medium"])
def test_a_displaced_ring_of_two_equals_one_process_that_plays_both(
    family: str, backend2: Backend, models: Path
) -> None:
    latent = torch.zeros(2, 16, 14, 18)
    out = sampled(backend2, checkpoint(models, family), MeshSpec(ring=2), latent, warmup_steps=2)
    assert_close(out, one_process_of_a_ring(checkpoint(models, family), latent, 2, 2))


@pytest.mark.parametrize("mesh", [m for m in MeshSpec.all_of(4) if m.ring > 1 and m.pp == 1], ids=MeshSpec.describe)
def test_displaced_rings_in_mixtures(mesh: MeshSpec, backend4: Backend, models: Path) -> None:
    latent = torch.zeros(2, 16, 14, 18)
    out = sampled(backend4, checkpoint(models), mesh, latent, warmup_steps=1)
    assert_close(out, one_process_of_a_ring(checkpoint(models), latent, 1, mesh.ring, mesh.ulysses))


# -- what it costs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_counted_bytes_are_those_of_the_formulas(method: Method, backend2: Backend, tmp_path: Path) -> None:
    config = small_config("sd3.5-medium", depth=3, heads=4, pos_embed_size=16)
    path = write_mmdit(tmp_path / "m.safetensors", config)
    sizes = Sizes(3, len(config.dual_blocks), config.hidden, 16 * 16, 80, 2, 64)
    counted, result, shares = count(backend2, path, method, 256)
    assert counted == pytest.approx(4 * sizes.rows * sum(sizes.terms(method, 2).values()) / 2, rel=0.02)
    of_steps = 5 * (12 * sizes.depth + 3 * sizes.dual - 2)
    made = 4 * sizes.rows * config.hidden * (sizes.text + 1 + of_steps)  # of prompts, and of timesteps ahead
    assert (result.ranks[0].kept_bytes > made) == method.displaced
    split = method.axis in ("tp", "pp")  # embeddings of prompts are whole under tp, and large in a model this small
    assert all(share < 0.8 for share in shares) if split else shares == [1, 1]


def test_a_trace_has_every_patch_of_every_step(backend2: Backend, models: Path) -> None:
    model = backend2.load_model(checkpoint(models), MeshSpec(pp=2), "float32")
    model.sample(torch.zeros(1, 16, 12, 12), POSITIVE, NEGATIVE, **SETTINGS, warmup_steps=2, num_patches=3, trace=True)
    assert model.timeline is not None and model.last is not None
    rows = model.timeline
    computed = {(int(r), int(s), int(p)) for r, kind, s, p, *_ in rows.tolist() if kind == COMPUTE}
    exact = {(rank, step, -1) for rank in range(2) for step in range(2)}
    assert computed == exact | {(rank, step, patch) for rank in range(2) for step in (2, 3) for patch in range(3)}
    assert (rows[:, END] >= rows[:, START]).all()
    sent = [int(rows[(rows[:, KIND] < 0) & (rows[:, RANK] == rank)][:, BYTES].sum()) for rank in range(2)]
    assert sent == [sum(cost.sent_bytes for cost in rank.costs) for rank in model.last.ranks]
    root = ElementTree.fromstring(picture(rows, "<title> & more"))
    assert len(root.findall(".//{*}rect")) > len(computed)
    assert {event["tid"] for event in chrome_trace(rows)} == {0, 1}
    lines = table(rows).splitlines()
    assert len(lines) == 2 + 4 * 2 and "pp" in lines[2]


@pytest.mark.parametrize("words", [["pp"], ["xx=2"], ["pp=two"]])
def test_a_mesh_that_is_none_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="is no axis and degree"):
        mesh_of(words)


# -- what can't be had ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "settings", "kind", "words"),
    [
        (MeshSpec(ulysses=2), {"warmup_steps": 1}, UnsupportedError, "two or more pp or ring ranks; here is ulysses=2"),
        (MeshSpec(cfg=2), {"warmup_steps": 1}, UnsupportedError, "here is cfg=2"),
        (
            MeshSpec(ring=2),
            {"warmup_steps": 1, "num_patches": 2},
            ConfigError,
            "num_patches=2 is for displaced steps on pp",
        ),
        (
            MeshSpec(pp=2),
            {"warmup_steps": 1, "rescale_cfg": 0.7},
            UnsupportedError,
            "rescale_cfg needs the spread of the whole image",
        ),
        (MeshSpec(pp=2), {"num_patches": 2}, ConfigError, "num_patches=2 is for displaced steps"),
        (
            MeshSpec(pp=2),
            {"warmup_steps": 1, "num_patches": 9},
            InputError,
            "8 rows of image tokens can't be cut in 9 patches",
        ),
        *(
            (MeshSpec(pp=2), {"warmup_steps": 1, "sampler": sampler}, UnsupportedError, f"Sampler {sampler} can't run")
            for sampler in ("heun", "dpm_adaptive", "sa_solver")
        ),
    ],
    ids=str,
)
def test_what_cannot_be_had_is_refused_by_name(
    mesh: MeshSpec, settings: dict[str, Any], kind: type[BackendError], words: str, backend2: Backend, models: Path
) -> None:
    with pytest.raises(kind, match=words.replace("(", r"\(")):
        sampled(backend2, checkpoint(models), mesh, torch.zeros(1, 16, 16, 16), **settings)
    assert torch.isfinite(sampled(backend2, checkpoint(models), mesh, torch.zeros(1, 16, 8, 8), steps=1)).all()


def test_slices_are_refused_for_transformers(backend2: Backend, models: Path) -> None:
    with pytest.raises(ConfigError, match=r"sliced is for UNets; sd3\.5-medium spreads its weights otherwise"):
        backend2.load_model(checkpoint(models), MeshSpec(tp=2, sliced=True), "float32")


def test_more_stages_than_blocks_are_refused(backend4: Backend, tmp_path: Path) -> None:
    path = write_mmdit(tmp_path / "short.safetensors", small_config("sd3.5-large", depth=3))
    with pytest.raises(ConfigError, match="pp=4 needs as many blocks; this model has 3"):
        backend4.load_model(path, MeshSpec(pp=4), "float32")


def test_a_pipeline_in_flight_is_cancelled(backend2: Backend, models: Path) -> None:
    reached: list[int] = []
    with pytest.raises(CancelledError):
        sampled(
            backend2,
            checkpoint(models),
            MeshSpec(pp=2),
            torch.zeros(1, 16, 32, 32),
            steps=500,
            warmup_steps=1,
            on_step=lambda step: reached.append(step.index),
            should_cancel=lambda: len(reached) > 3,
        )
    assert 3 < len(reached) < 100
