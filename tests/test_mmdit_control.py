"""ControlNets of SD3 and SD3.5 on ranks: every residual is that of one process, whatever the mesh; what isn't done is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from control_references import Inputs, control_outputs
from local_network import CPU, control_residuals, local_control, local_network
from quantised_files import bare_fp8
from rank_pool import RankPool, groups
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallel_backend import MeshSpec
from parallel_backend.distributed.mesh import build_mesh
from parallel_backend.distributed.stale import EXACT, Kept, StaleExchanges, Step
from parallel_backend.errors import CheckpointError, ConfigError, InputError, UnsupportedError
from parallel_backend.models.checkpoint import load_parameters
from parallel_backend.models.controls import open_control
from parallel_backend.models.mmdit import MMDiTConfig
from parallel_backend.models.mmdit_checkpoint import open_mmdit
from parallel_backend.models.mmdit_control import ImageControl, TokenControlNet
from parallel_backend.models.mmdit_control_checkpoint import check_fits, is_mmdit_control, open_mmdit_control
from parallel_backend.small_checkpoints.mmdit import small_config, write_mmdit
from parallel_backend.small_checkpoints.mmdit_control import (
    CONTROL_KINDS,
    DOUBLE,
    INPAINTING,
    INSTANTX,
    STABILITY,
    control_tensors,
    write_control,
)
from parallel_backend.small_checkpoints.unet import CONFIGS

# The main model has 4 blocks. Blocks of the ControlNet, and how often each counts in ComfyUI.
REPEATS = {INSTANTX: (2, [2, 1]), INPAINTING: (3, [1, 1]), STABILITY: (3, [2, 2, 0]), DOUBLE: (2, [2, 2])}
FAMILY = {INSTANTX: "sd3-medium", INPAINTING: "sd3.5-medium", STABILITY: "sd3.5-large", DOUBLE: "sd3.5-large"}
# (rows, height, width, text tokens): what 4 ranks divide, what they don't, odd sides, fewer image tokens than ranks.
SIZES = [(2, 16, 16, 80), (1, 15, 9, 77), (1, 2, 4, 5)]


def sizes(kind: str) -> MMDiTConfig:
    """Of the main model."""
    return replace(small_config(FAMILY[kind], pos_embed_size=16), context_width=96, pooled_width=80)


@pytest.fixture(scope="module")
def controls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("controlnet")
    for kind, (blocks, _) in REPEATS.items():
        write_control(control(folder, kind), kind, sizes(kind), blocks)
        write_mmdit(main(folder, kind), sizes(kind))
    return folder


def control(folder: Path, kind: str) -> Path:
    return folder / f"{kind}.safetensors"


def main(folder: Path, kind: str) -> Path:
    return folder / f"{FAMILY[kind]}.safetensors"


def prompt(text: int, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, text, 96, generator=generator), torch.randn(rows, 80, generator=generator)


@cache
def inputs(kind: str, size: tuple[int, int, int, int], seed: int = 0) -> Inputs:
    rows, height, width, text = size
    generator = torch.Generator().manual_seed(seed)
    channels = 17 if kind == INPAINTING else 16
    x, timesteps = (
        torch.randn(rows, 16, height, width, generator=generator),
        torch.rand(rows, generator=generator) * 1000,
    )
    return (
        x,
        timesteps,
        *prompt(text, rows),
        torch.randn(rows, channels, height, width, generator=generator),
    )


@cache
def expected(folder: Path, kind: str, size: tuple[int, int, int, int]) -> list[Tensor]:
    """What any number of ranks is to give."""
    blocks, repeats = REPEATS[kind]
    outputs = control_outputs(control(folder, kind), main(folder, kind), sizes(kind), kind, blocks, inputs(kind, size))
    return [out for out, count in zip(outputs, repeats, strict=False) for _ in range(count)]


@lru_cache(maxsize=2)
def network(path: Path, base: Path, spec: MeshSpec) -> TokenControlNet:
    mesh = build_mesh(spec, groups())
    return local_control(path, local_network(base, mesh), mesh)


@torch.inference_mode()
def residuals_case(
    path: Path, base: Path, spec: MeshSpec, cases: list[Inputs], evaluations: int = 1
) -> tuple[int, list[list[Tensor]]]:
    """This rank's place in the order of tokens, and for each case and evaluation its residuals."""
    found, net = [], network(path, base, spec)
    for *given, hint in cases:
        kept = Kept(stale=StaleExchanges(net.mesh.ring)) if evaluations > 1 else None
        for i in range(evaluations):
            step = Step(i, "displaced" if i else "sync", ("control", 0), kept)
            found.append(
                [t.clone() for t in control_residuals(net, *given, net.prepare(hint), step).output if t is not None]
            )
            if step.stale is not None:
                step.stale.end_evaluation()
        if kept is not None:
            kept.close()
    return net.mesh.sp_rank, found


def check(answers: list[tuple[int, list[list[Tensor]]]], wanted: list[list[Tensor]]) -> None:
    """Every rank's parts, which tp ranks and stages have alike, joined in the order of tokens."""
    by_place: dict[int, list[list[Tensor]]] = {}
    for place, found in answers:
        for ours, first in zip(found, by_place.setdefault(place, found), strict=True):
            assert len(ours) == len(first)
            assert all(
                (a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(ours, first, strict=True) if len(b[0])
            )
    for number, outputs in enumerate(wanted):
        parts = [by_place[place][number] for place in sorted(by_place)]
        assert len(parts[0]) == len(outputs)
        for out, *pieces in zip(outputs, *parts, strict=True):
            joined = torch.cat(pieces, dim=1)
            assert joined.shape == out.shape
            assert (joined - out).abs().max() <= 1e-5 * out.abs().max()


MESHES = [mesh for count in (1, 2, 3, 4) for mesh in MeshSpec.all_of(count) if mesh.dp * mesh.cfg * mesh.pp == 1] + [
    MeshSpec(pp=2),
    MeshSpec(pp=2, ring=2),
]


@pytest.mark.parametrize("kind", CONTROL_KINDS)
@pytest.mark.parametrize("mesh", MESHES, ids=MeshSpec.describe)
def test_residuals_equal_one_process(mesh: MeshSpec, kind: str, ranks: RankPool, controls: Path) -> None:
    cases = [inputs(kind, size) for size in SIZES]
    answers = ranks(mesh.world_size, residuals_case, control(controls, kind), main(controls, kind), mesh, cases)
    check(answers, [expected(controls, kind, size) for size in SIZES])


@pytest.mark.parametrize("kind", [INSTANTX, STABILITY])
@pytest.mark.parametrize("mesh", [MeshSpec(ring=2), MeshSpec(ring=2, ulysses=2)], ids=MeshSpec.describe)
def test_displaced_keys_of_the_same_input_are_as_good_as_new_ones(
    mesh: MeshSpec, kind: str, ranks: RankPool, controls: Path
) -> None:
    paths = control(controls, kind), main(controls, kind)
    answers = ranks(mesh.world_size, residuals_case, *paths, mesh, [inputs(kind, SIZES[1])], 3)
    check(answers, [expected(controls, kind, SIZES[1])] * 3)


@torch.inference_mode()
def stale_case(path: Path, base: Path, spec: MeshSpec, first: Inputs, second: Inputs) -> list[Tensor]:
    """Residuals of `second`: exact, and where the other ranks' keys are those of `first`."""
    net = network(path, base, spec)
    kept = Kept(stale=StaleExchanges(net.mesh.ring))
    exact = control_residuals(net, *second[:4], net.prepare(second[4]), EXACT).output[0]
    for i, (*given, hint) in enumerate((first, second)):
        step = Step(i, "displaced" if i else "sync", "use", kept)
        stale = control_residuals(net, *given, net.prepare(hint), step).output[0]
        assert step.stale is not None
        step.stale.end_evaluation()
    kept.close()
    assert exact is not None and stale is not None
    return [exact, stale]


def test_negative_control_displaced_keys_of_another_input_are_not(ranks: RankPool, controls: Path) -> None:
    given = [inputs(STABILITY, SIZES[0], seed) for seed in (0, 1)]
    paths = control(controls, STABILITY), main(controls, STABILITY)
    for exact, stale in ranks(2, stale_case, *paths, MeshSpec(ring=2), *given):
        assert (exact - stale).abs().max() > 1e-3 * exact.abs().max()


@pytest.fixture(scope="module")
def alone(controls: Path) -> dict[str, TokenControlNet]:
    return {kind: network(control(controls, kind), main(controls, kind), MeshSpec()) for kind in CONTROL_KINDS}


@torch.inference_mode()
def first_residual(net: TokenControlNet, given: Inputs, **changed: Tensor) -> Tensor:
    parts = dict(zip(("x", "timesteps", "context", "pooled", "hint"), given, strict=True)) | changed
    hint = net.prepare(parts.pop("hint"))
    found = control_residuals(net, *parts.values(), hint, EXACT).output[0]
    assert found is not None
    return found


@pytest.mark.parametrize("kind", CONTROL_KINDS)
def test_negative_control_what_a_residual_depends_on(kind: str, alone: dict[str, TokenControlNet]) -> None:
    given, other = inputs(kind, SIZES[1]), inputs(kind, SIZES[1], seed=1)
    before = first_residual(alone[kind], given)
    text = kind in (INSTANTX, INPAINTING)
    context, pooled = prompt(SIZES[1][3], SIZES[1][0], seed=9)
    for name, tensor, counts in (
        ("hint", other[4], True),
        ("x", other[0], True),
        ("timesteps", other[1], True),
        ("context", context, text),
        ("pooled", pooled, not text),
    ):
        change = (first_residual(alone[kind], given, **{name: tensor}) - before).abs().max() / before.abs().max()
        assert change > 1e-3 if counts else change == 0, name
    if kind == INPAINTING:
        masked = given[4].clone()
        masked[:, 16] += 1
        assert (first_residual(alone[kind], given, hint=masked) - before).abs().max() > 1e-3 * before.abs().max()


@torch.inference_mode()
def doubled_case(path: Path, base: Path, spec: MeshSpec, given: Inputs, leaf: str) -> list[Tensor]:
    """A residual as it is, and with a tensor of the main model's embedder at twice its values."""
    net = network(path, base, spec)
    before = first_residual(net, given)
    tensor = dict(net.base.named_parameters()).get(leaf)
    for factor in (2.0, 0.5):
        if tensor is not None:
            tensor *= factor
        if factor == 2.0:
            after = first_residual(net, given)
    return [before, after]


@pytest.mark.parametrize(("kind", "leaf"), [(STABILITY, "x_embedder.proj.weight"), (DOUBLE, "y_embedder.mlp.0.weight")])
@pytest.mark.parametrize("mesh", [MeshSpec(), MeshSpec(pp=2)], ids=MeshSpec.describe)
def test_what_lies_on_the_main_models_embedder_counts(
    mesh: MeshSpec, kind: str, leaf: str, ranks: RankPool, controls: Path
) -> None:
    paths = control(controls, kind), main(controls, kind)
    answers = ranks(mesh.world_size, doubled_case, *paths, mesh, inputs(kind, SIZES[1]), leaf)
    for before, after in answers:
        assert (after - before).abs().max() > 1e-3 * before.abs().max()
        assert torch.equal(after, answers[0][1])


def test_a_quantised_embedder_of_the_main_model_is_the_same_on_all_stages(
    ranks: RankPool, controls: Path, tmp_path: Path
) -> None:
    quantised, path = tmp_path / "fp8.safetensors", control(controls, STABILITY)
    save_file(bare_fp8(load_file(main(controls, STABILITY))), quantised)
    cases = [inputs(STABILITY, SIZES[1])]
    ((_, alone),) = ranks(1, residuals_case, path, quantised, MeshSpec(), cases)
    check(ranks(2, residuals_case, path, quantised, MeshSpec(pp=2), cases), alone)
    assert (alone[0][0] - expected(controls, STABILITY, SIZES[1])[0]).abs().max() > 1e-3


def test_one_hint_for_all_rows(alone: dict[str, TokenControlNet]) -> None:
    given = inputs(STABILITY, SIZES[0])
    one = given[4][:1]
    same = first_residual(alone[STABILITY], given, hint=one.expand(2, -1, -1, -1))
    assert torch.equal(first_residual(alone[STABILITY], given, hint=one), same)


def test_half_precision_stays_in_its_rounding(controls: Path) -> None:
    for kind in (INSTANTX, STABILITY):
        mesh, dtype = build_mesh(MeshSpec()), torch.bfloat16
        base = local_network(main(controls, kind), mesh, dtype=dtype)
        out = first_residual(local_control(control(controls, kind), base, mesh, dtype), inputs(kind, SIZES[1]))
        wanted = expected(controls, kind, SIZES[1])[0]
        assert out.dtype == dtype and (out - wanted).abs().max() <= 0.05 * wanted.abs().max()


# -- what is refused --------------------------------------------------------------------------------------------


def test_wrong_hints_are_refused_with_their_values(alone: dict[str, TokenControlNet]) -> None:
    for kind in CONTROL_KINDS:
        with pytest.raises(InputError, match=r"\[1, 4, 8, 8\]; it has to be \[rows, 1[67], height, width\]"):
            alone[kind].prepare(torch.zeros(1, 4, 8, 8))
    with pytest.raises(InputError, match="16 channels and one of the mask"):
        alone[INPAINTING].prepare(torch.zeros(1, 16, 8, 8))
    given = inputs(STABILITY, SIZES[0])
    with pytest.raises(InputError, match=r"latent of 20x16 cells, the image's of 16x16\. Scale the hint to 128x128"):
        first_residual(alone[STABILITY], given, hint=torch.zeros(1, 16, 16, 20))
    with pytest.raises(InputError, match="3 hints for 2 images"):
        first_residual(alone[STABILITY], given, hint=torch.zeros(3, 16, 16, 16))
    large = torch.zeros(1, 16, 16, 40)
    with pytest.raises(InputError, match="larger than the ControlNet's position table"):
        first_residual(alone[INSTANTX], inputs(INSTANTX, SIZES[1]), x=large, hint=large)


def test_a_latent_beyond_its_positions_is_refused_before_any_rank_computes(alone: dict[str, TokenControlNet]) -> None:
    net = alone[INSTANTX]
    with pytest.raises(InputError, match="larger than the ControlNet's position table"):
        net.check(net.prepare(torch.zeros(1, 16, 16, 400)), (), (1, 16, 16, 400))


def test_another_models_controlnet_is_refused(controls: Path) -> None:
    wide = small_config("sd3.5-large", depth=6)
    for kind in CONTROL_KINDS:
        _, config = open_mmdit_control(control(controls, kind))
        with pytest.raises(UnsupportedError, match=r"a.file is .* width 256 \(the model's is 384\)"):
            check_fits(config, wide, "a.file")
        with pytest.raises(UnsupportedError, match="of another family"):
            check_fits(config, CONFIGS["tiny"], "a.file")
    narrow = replace(sizes(INSTANTX), context_width=64)
    with pytest.raises(UnsupportedError, match=r"context width 96 \(the model's is 64\)"):
        check_fits(open_mmdit_control(control(controls, INSTANTX))[1], narrow, "a.file")


def test_heads_spread_too_thin_are_refused(controls: Path) -> None:
    mesh = build_mesh(MeshSpec())
    no_weights: Any = None
    thin = replace(mesh, tp=replace(mesh.tp, degree=8))
    for kind in (INSTANTX, STABILITY):
        opened = open_control(control(controls, kind), local_network(main(controls, kind), mesh), no_weights)
        with pytest.raises(ConfigError, match="spreads 4 heads too thin"):
            opened.build(thin, "native")


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("after_proj_list.18.bias", UnsupportedError, "Hunyuan-DiT"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", UnsupportedError, "of Flux"),
        ("controlnet_blocks.0.linear.weight", UnsupportedError, "of Flux"),
        ("controlnet_x_embedder.weight", UnsupportedError, "of Flux"),
        ("transformer_blocks.0.img_mlp.net.0.proj.weight", UnsupportedError, "Qwen-Image"),
        ("control_blocks.0.after_proj.weight", UnsupportedError, "Qwen-Image"),
        ("zero_convs.0.0.weight", UnsupportedError, "a UNet"),
        ("transformer_blocks.0.norm1.linear.weight", UnsupportedError, "in diffusers' layout"),
        ("joint_blocks.0.x_block.attn.qkv.weight", CheckpointError, "holds no ControlNet"),
    ],
)
def test_other_files_are_refused_by_name(name: str, error: type[Exception], words: str, tmp_path: Path) -> None:
    names = [name] if "diffusers" not in words else [name, "pos_embed_input.proj.weight"]
    if error is UnsupportedError:
        names.append("controlnet_blocks.0.weight")
    path = tmp_path / "other.safetensors"
    save_file({n: torch.zeros(1) for n in names}, path)
    assert not is_mmdit_control(names)
    with pytest.raises(error, match=words):
        open_mmdit_control(path)


@pytest.mark.parametrize(
    ("kind", "gone", "words"),
    [
        (INSTANTX, "transformer_blocks.1.norm1_context.linear.weight", "not a whole SD3ControlNetModel"),
        (INSTANTX, "pos_embed.pos_embed", "not a whole SD3ControlNetModel"),
        (STABILITY, "time_text_embed.text_embedder.linear_1.weight", "lacks y_embedder.mlp.0.weight"),
        (DOUBLE, "pos_embed.proj.weight", "x_embedder.proj.weight"),
    ],
)
def test_a_file_that_lacks_something_is_refused(kind: str, gone: str, words: str, tmp_path: Path) -> None:
    tensors: dict[str, Any] = control_tensors(kind, sizes(kind))
    del tensors[gone]
    path = tmp_path / "part.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=words):
        source, config = open_mmdit_control(path)
        load_parameters(ImageControl(config, build_mesh(MeshSpec())), source, device=CPU, dtype=torch.float32)


def test_a_controlnet_without_effect_is_refused(tmp_path: Path) -> None:
    path = write_control(tmp_path / "deep.safetensors", INSTANTX, small_config("sd3-medium", depth=2), blocks=3)
    with pytest.raises(CheckpointError, match="3 blocks for a model of 2, of which none would have an effect"):
        open_mmdit_control(path)


# -- what a file says -------------------------------------------------------------------------------------------


def test_the_kinds_are_told_apart(controls: Path) -> None:
    configs = {kind: open_mmdit_control(control(controls, kind))[1] for kind in CONTROL_KINDS}
    assert [c.image_only for c in configs.values()] == [False, False, True, True]
    assert [c.borrowed for c in configs.values()] == ["", "", "x_embedder", "y_embedder"]
    assert [c.control_type for c in configs.values()] == [None, None, 1, 1]
    assert [c.has_mask for c in configs.values()] == [False, True, False, False]
    assert [c.shifts_hint for c in configs.values()] == [False, False, True, True]
    assert [c.repeats for c in configs.values()] == [(2, 1), (1, 1), (2, 2, 2), (2, 2)]
    for kind in CONTROL_KINDS:
        assert is_mmdit_control(load_file(control(controls, kind)))


@pytest.mark.parametrize("stored", [torch.tensor([2], dtype=torch.int32), torch.tensor(2.0, dtype=torch.float16)])
def test_what_it_follows_is_read_in_any_dtype(stored: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "depth.safetensors"
    save_file(control_tensors(STABILITY, sizes(STABILITY)) | {"control_type": stored}, path)
    assert open_mmdit_control(path)[1].control_type == 2


def test_a_controlnet_is_no_main_model(controls: Path) -> None:
    for kind in CONTROL_KINDS:
        with pytest.raises(CheckpointError, match="is a ControlNet; an SD3 or"):
            open_mmdit(control(controls, kind))


def test_layer_names_are_read_too(controls: Path, alone: dict[str, TokenControlNet], tmp_path: Path) -> None:
    renamed = {}
    for name, tensor in load_file(control(controls, DOUBLE)).items():
        for part, ours in (("timestep", "t"), ("text", "y")):
            for number, place in (("1", "0"), ("2", "2")):
                name = name.replace(f"time_text_embed.{part}_embedder.linear_{number}", f"{ours}_embedder.mlp.{place}")
        renamed[name] = tensor
    path = tmp_path / "renamed.safetensors"
    save_file(renamed, path)
    given = inputs(DOUBLE, SIZES[1])
    net = network(path, main(controls, DOUBLE), MeshSpec())
    assert torch.equal(first_residual(net, given), first_residual(alone[DOUBLE], given))
