"""SDXL's ControlNets in bands: exact against diffusers' own on one process, told from their names, refused by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel
from diffusers.models.embeddings import Timesteps
from local_network import control_residuals, evaluated, local_network, local_unet_control
from rank_pool import RankPool, groups
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from unet_inputs import inputs

from parallel_backend import MeshSpec
from parallel_backend.checkpoint_files.unet_control_files import is_unet_control
from parallel_backend.distributed.mesh import build_mesh
from parallel_backend.distributed.stale import Phase, Step
from parallel_backend.errors import CheckpointError, InputError, UnsupportedError
from parallel_backend.models.network import Network
from parallel_backend.models.residuals import Residuals
from parallel_backend.models.unet_control import BandControlNet, UNetControlConfig
from parallel_backend.models.unet_control_checkpoint import open_unet_control
from parallel_backend.small_checkpoints.unet import CONFIGS, Layout, unet_tensors
from parallel_backend.small_checkpoints.unet_control import control_config, unet_control_tensors, write_unet_control

pytestmark = pytest.mark.busy

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
# (rows, height, width): bands of whole units, and a last one with a part of one; an odd width. The second has one image for two rows.
SIZES = [(1, 20, 12), (2, 17, 13)]
TINY = control_config(CONFIGS["tiny"])
CONTROLS: dict[str, UNetControlConfig] = {
    "tiny": TINY,
    # The middle of diffusers' own "small" files, whose blocks have no attention; one residual block; none.
    "small": replace(TINY, down_depths=((0,),) * 3, mid_depth=0, bare_middle=True),
    "one block": replace(TINY, mid_depth=0),
    "no middle": replace(TINY, mid_depth=None),
    # The width that ComfyUI knows Union files by; and ProMax's eight types.
    "union": control_config(CONFIGS["koala"], 6, down_depths=((0,), (0,), (1,))),
    "promax": replace(TINY, control_types=8),
}
PHASES: list[Phase] = ["sync", "displaced", "displaced"]


@pytest.fixture(scope="module")
def controls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a file of each in each layout that there is of it."""
    folder = tmp_path_factory.mktemp("controlnet")
    for name, config in CONTROLS.items():
        for layout in LAYOUTS[: 1 if config.control_types else 2]:
            write_unet_control(file(folder, name, layout), config, layout)
    return folder


def file(folder: Path, name: str, layout: Layout = "diffusers") -> Path:
    return folder / f"{name} {layout}.safetensors"


@cache
def hint_for(size: tuple[int, int, int], seed: int = 0) -> Tensor:
    return torch.rand(1, 3, 8 * size[1], 8 * size[2], generator=torch.Generator().manual_seed(seed))


@cache
def reference(name: str) -> Any:
    """diffusers' own model, of the settings that it has for SDXL, and the file's tensors; those of types left out."""
    config = CONTROLS[name]
    cross = [any(depths) for depths in config.down_depths]
    middle = "UNetMidBlock2DCrossAttn" if config.mid_depth or config.bare_middle else "UNetMidBlock2D"
    model: Any = ControlNetModel(
        down_block_types=["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in cross],
        mid_block_type=middle,
        block_out_channels=config.block_channels,
        layers_per_block=config.layers_per_block,
        cross_attention_dim=2048,
        transformer_layers_per_block=[*(list(depths) for depths in config.down_depths), [config.mid_depth]],
        attention_head_dim=[channels // 64 for channels in config.block_channels],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    if config.mid_depth is None:
        model.mid_block = None
    tensors = unet_control_tensors(config)
    model.load_state_dict({key: tensors[key] for key in model.state_dict()})
    return model.requires_grad_(False).eval()


@torch.inference_mode()
def whole(name: str, given: Sequence[Tensor], hint: Tensor) -> list[Tensor]:
    """What the bands together are to give, the middle last."""
    x, timesteps, context, y = given
    sizes = torch.tensor([1024.0, 1024, 0, 0, 1024, 1024]).expand(len(x), -1)
    added = {"text_embeds": y[:, :1280], "time_ids": sizes}
    output, middle = reference(name)(
        x, timesteps, context, hint.expand(len(x), -1, -1, -1), added_cond_kwargs=added, return_dict=False
    )
    return [*output, middle]


@cache
def network(path: Path, spec: MeshSpec) -> BandControlNet:
    return local_unet_control(path, build_mesh(spec, groups()))


@torch.inference_mode()
def control_case(
    path: Path, spec: MeshSpec, given: Sequence[Tensor], hint: Tensor, control_types: Sequence[int] = ()
) -> Residuals:
    control = network(path, spec)
    return control_residuals(control, *given, control.prepare(hint), Step(), control_types)


def together(bands: Sequence[Residuals]) -> list[Tensor]:
    """Whole tensors, the middle last."""
    assert not any(band.input for band in bands)
    by_rank = [[*band.output, band.middle] for band in bands]
    return [torch.cat(parts, dim=2) for parts in zip(*by_rank, strict=True)]  # type: ignore[arg-type]


def assert_same(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.shape == theirs.shape
        assert theirs.std() > 0.1
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bands_together_are_diffusers_residuals(
    layout: Layout, size: tuple[int, int, int], world_size: int, ranks: RankPool, controls: Path
) -> None:
    given, hint = inputs("tiny", size), hint_for(size)
    bands = ranks(world_size, control_case, file(controls, "tiny", layout), MeshSpec(patch=world_size), given, hint)
    assert_same(together(bands), whole("tiny", given, hint))


@pytest.mark.parametrize("name", ["small", "one block", "no middle"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_middle_that_files_have(layout: Layout, name: str, ranks: RankPool, controls: Path) -> None:
    given, hint = inputs("tiny", SIZES[1]), hint_for(SIZES[1])
    bands = ranks(2, control_case, file(controls, name, layout), MeshSpec(patch=2), given, hint)
    assert_same(together(bands), whole(name, given, hint))


def test_a_latent_too_small_to_be_cut_is_whole_on_every_rank(ranks: RankPool, controls: Path) -> None:
    size = (1, 8, 8)
    given, hint = inputs("tiny", size), hint_for(size)
    for band in ranks(3, control_case, file(controls, "tiny"), MeshSpec(patch=3), given, hint):
        assert_same(together([band]), whole("tiny", given, hint))


def test_another_image_gives_other_residuals(controls: Path) -> None:
    given = inputs("tiny", SIZES[0])
    one, other = (
        together([control_case(file(controls, "tiny"), MeshSpec(), given, hint_for(SIZES[0], seed))]) for seed in (0, 1)
    )
    for a, b in zip(one, other, strict=True):
        assert (a - b).norm() > 0.01 * a.norm()


def test_sliced_weights_change_nothing(ranks: RankPool, controls: Path) -> None:
    given, hint = inputs("tiny", SIZES[0]), hint_for(SIZES[0])
    for band in ranks(2, control_case, file(controls, "tiny"), MeshSpec(cfg=2, sliced=True), given, hint):
        assert_same(together([band]), whole("tiny", given, hint))


@torch.inference_mode()
def shallow_case(path: Path, spec: MeshSpec, given: Sequence[Tensor], hint: Tensor, types: Sequence[int]) -> Residuals:
    control = network(path, spec)
    return control_residuals(control, *given, control.prepare(hint), Step(is_shallow=True), types)


@pytest.mark.parametrize(("name", "types"), [("tiny", ()), ("promax", (7,))])
def test_of_the_outermost_block_alone_they_are_the_same(
    name: str, types: tuple[int, ...], ranks: RankPool, controls: Path
) -> None:
    given, hint, path, mesh = inputs("tiny", SIZES[1]), hint_for(SIZES[1]), file(controls, name), MeshSpec(patch=2)
    shallow, exact = (ranks(2, case, path, mesh, given, hint, types) for case in (shallow_case, control_case))
    for some, every in zip(shallow, exact, strict=True):
        assert some.middle is None and len(some.output) == 1 < len(every.output)
        for ours, expected in zip(some.output, every.output, strict=False):
            assert ours is not None and expected is not None and torch.equal(ours, expected)


@torch.inference_mode()
def test_of_the_outermost_block_alone_little_is_computed(controls: Path) -> None:
    control, given, operations = network(file(controls, "tiny"), MeshSpec()), inputs("tiny", SIZES[0]), []
    x, times, context, y = given
    prompt, hint = control.prepare_prompt(context, y), control.prepare(hint_for(SIZES[0]))
    for is_shallow in (True, False):
        with FlopCounterMode(display=False) as counted:
            control(x, times, prompt, hint, Step(is_shallow=is_shallow))
        operations.append(counted.get_total_flops())
    assert 0 < operations[0] < 0.2 * operations[1]


# -- displaced steps ---------------------------------------------------------------------------------------------------


@cache
def unet(path: Path, spec: MeshSpec) -> Network:
    return local_network(path, build_mesh(spec, groups()))


@torch.inference_mode()
def displaced_case(
    path: Path, unet_path: Path, spec: MeshSpec, given: Sequence[Tensor], hints: Sequence[Tensor]
) -> list[list[Residuals | Tensor]]:
    """In each phase the residuals of two uses of the ControlNet, and the UNet's output, of one job."""
    control, main = network(path, spec), unet(unet_path, spec)
    kept, prepared, evaluations = main.new_job(displaced=True), [control.prepare(hint) for hint in hints], []
    for index, phase in enumerate(PHASES):
        step = Step(index, phase, kept=kept)
        found: list[Residuals | Tensor] = [
            control_residuals(control, *given, image, replace(step, branch=(0, use)))
            for use, image in enumerate(prepared)
        ]
        evaluations.append([*found, evaluated(main, *given, replace(step, branch=(0, 0)))])
    kept.close()
    return evaluations


@pytest.mark.parametrize("world_size", [2, 3])
def test_displaced_is_exact_where_nothing_moves(world_size: int, ranks: RankPool, controls: Path, unets: Path) -> None:
    """A neighbour that sends what it sent before is as good as one that sends anew: each use has its own, and the UNet too."""
    given, hints = inputs("tiny", SIZES[1]), [hint_for(SIZES[1]), hint_for(SIZES[1], 1)]
    spec, main = MeshSpec(patch=world_size), unets / "unet-tiny.safetensors"
    by_rank = ranks(world_size, displaced_case, file(controls, "tiny"), main, spec, given, hints)
    for index in range(len(PHASES)):
        for use, hint in enumerate(hints):
            bands = [evaluations[index][use] for evaluations in by_rank]
            assert_same(together(bands), whole("tiny", given, hint))
        assert_same([by_rank[0][index][-1]], [by_rank[0][0][-1]])


@torch.inference_mode()
def moving_case(path: Path, unet_path: Path, spec: MeshSpec, starts: Sequence[Sequence[Tensor]]) -> Residuals:
    """The residuals of a displaced evaluation at another latent than that of the synchronous one before it."""
    control, main, hint = network(path, spec), unet(unet_path, spec), hint_for(SIZES[0])
    kept, prepared = main.new_job(displaced=True), control.prepare(hint)
    for index, given in enumerate(starts):
        step = Step(index, PHASES[index], kept=kept)
        residuals = control_residuals(control, *given, prepared, step)
        evaluated(main, *given, step)
    kept.close()
    return residuals


def test_displaced_reads_what_neighbours_had_before(ranks: RankPool, controls: Path, unets: Path) -> None:
    """Near the exact residuals, and not equal to them: nothing is waited for."""
    first, second = inputs("tiny", SIZES[0]), inputs("tiny", SIZES[0], seed=9)
    moved = [torch.lerp(first[0], second[0], 0.01), *first[1:]]
    main = unets / "unet-tiny.safetensors"
    bands = ranks(2, moving_case, file(controls, "tiny"), main, MeshSpec(patch=2), [first, moved])
    exact = whole("tiny", moved, hint_for(SIZES[0]))
    errors = [float((o - e).norm() / e.norm()) for o, e in zip(together(bands), exact, strict=True)]
    assert 1e-5 < max(errors) < 0.01, errors


# -- several kinds of image in one model -------------------------------------------------------------------------------


@torch.inference_mode()
def whole_of_types(name: str, given: Sequence[Tensor], hint: Tensor, types: Sequence[int]) -> list[Tensor]:
    """As `whole`, for a model that is told the kinds of its image, from what is said of it, with torch's own layers."""
    tensors, model = unet_control_tensors(CONTROLS[name]), reference(name)

    def linear(x: Tensor, layer: str) -> Tensor:
        return F.linear(x, tensors[f"{layer}.weight"], tensors[f"{layer}.bias"])

    def norm(x: Tensor, layer: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors[f"{layer}.weight"], tensors[f"{layer}.bias"])

    def told(*call: Any) -> Tensor:
        present = torch.tensor([float(kind in types) for kind in range(CONTROLS[name].control_types)])
        frequencies = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(present).reshape(1, -1)
        return call[-1] + linear(
            F.silu(linear(frequencies, "control_add_embedding.linear_1")), "control_add_embedding.linear_2"
        )

    def shifted(*call: Any) -> Tensor:
        embedded, table, layer = call[-1], tensors["task_embedding"], "transformer_layes.0"
        if not types:
            return embedded
        attention = nn.MultiheadAttention(table.shape[1], 8, batch_first=True)
        attention.load_state_dict({key: tensors[f"{layer}.attn.{key}"] for key in attention.state_dict()})
        token = (embedded.flatten(2).mean(2) + table[types[0]])[:, None]
        normed = norm(token, f"{layer}.ln_1")
        token = token + attention(normed, normed, normed)[0]
        inner = linear(norm(token, f"{layer}.ln_2"), f"{layer}.mlp.c_fc")
        token = token + linear(inner * torch.sigmoid(1.702 * inner), f"{layer}.mlp.c_proj")
        return embedded + linear(token[:, 0], "spatial_ch_projs")[:, :, None, None]

    hooks = [
        model.time_embedding.register_forward_hook(told),
        model.controlnet_cond_embedding.register_forward_hook(shifted),
    ]
    found = whole(name, given, hint)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(
    ("name", "size", "types", "world_size"),
    [
        ("union", (1, 9, 8), (), 2),
        ("union", (1, 9, 8), (3,), 2),
        *(("promax", SIZES[1], types, world) for types in ((), (0,), (7,)) for world in (1, 3)),
    ],
    ids=str,
)
def test_union_models_are_told_the_kind_of_image(
    name: str, size: tuple[int, int, int], types: tuple[int, ...], world_size: int, ranks: RankPool, controls: Path
) -> None:
    given, hint = inputs("tiny", size), hint_for(size)
    bands = ranks(world_size, control_case, file(controls, name), MeshSpec(patch=world_size), given, hint, types)
    expected = whole_of_types(name, given, hint, types)
    assert_same(together(bands), expected)
    # What is told matters, and that nothing is told.
    for other in (whole(name, given, hint), whole_of_types(name, given, hint, (1,))):
        assert (expected[-1] - other[-1]).norm() > 0.01 * other[-1].norm()


def test_a_model_for_one_kind_of_image_takes_no_notice_of_types(controls: Path) -> None:
    given, hint, path = inputs("tiny", SIZES[0]), hint_for(SIZES[0]), file(controls, "tiny")
    told = control_case(path, MeshSpec(), given, hint, (6,))
    assert_same(together([told]), whole("tiny", given, hint))


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTROLS)
def test_sizes_are_read_from_names_and_shapes(name: str, controls: Path) -> None:
    for path in controls.glob(f"{name} *"):
        source, config = open_unet_control(path)
        expected = CONTROLS[name]
        assert config == replace(expected, family="sdxl"), path
        assert is_unet_control(source.inner.names())


def test_what_stands_before_and_beside_a_controlnet_in_a_full_checkpoint(tmp_path: Path) -> None:
    extra = {"cond_stage_model.weight": torch.zeros(1), "first_stage_model.weight": torch.zeros(1)}
    path = tmp_path / "whole.safetensors"
    write_unet_control(path, TINY, "single file", prefix="control_model.", extra=extra)
    source, config = open_unet_control(path)
    assert config == TINY
    expected = unet_control_tensors(TINY)
    assert torch.equal(source.read("controlnet_mid_block.weight"), expected["controlnet_mid_block.weight"])
    q, k, v = (expected[f"mid_block.attentions.0.transformer_blocks.0.attn1.to_{x}.weight"] for x in "qkv")
    joined = source.read("mid_block.attentions.0.transformer_blocks.0.attn1.to_qkv.weight")
    assert torch.equal(joined, torch.cat([q, k, v]))


def test_other_models_are_no_controlnets() -> None:
    for names in (
        unet_tensors(CONFIGS["tiny"]),
        unet_tensors(CONFIGS["tiny"], "single file"),
        {"joint_blocks.0.x_block.attn.qkv.weight", "controlnet_blocks.0.weight"},
        {"body.0.in_conv.weight"},
    ):
        assert not is_unet_control(names)


def changed(layout: Layout = "diffusers", without: str | None = None, **extra: Tensor) -> dict[str, Tensor]:
    """A good file's tensors, less those of whose name `without` is a part, and with `extra` ones."""
    tensors = unet_control_tensors(TINY, layout)
    return {name: tensor for name, tensor in tensors.items() if without is None or without not in name} | extra


def differences() -> dict[str, Tensor]:
    return {f"control_model.{name}": tensor for name, tensor in changed("single file").items()} | {"difference": ONE}


ONE = torch.zeros(1)
# What makes the file's tensors, and how it is refused.
REFUSED: dict[str, tuple[Callable[[], dict[str, Tensor]], type[Exception], str]] = {
    "SD1": (lambda: changed(without="add_embedding"), UnsupportedError, r"ControlNet without micro-conditioning \(SD1"),
    "SD1, single file": (
        lambda: changed("single file", "label_emb"),
        UnsupportedError,
        "ControlNet without micro-conditioning",
    ),
    "unCLIP": (
        lambda: changed(**{"add_embedding.linear_1.weight": torch.zeros(256, 2048)}),
        UnsupportedError,
        "takes prompts of widths 2048 and 2048",
    ),
    "inpainting": (
        lambda: changed(**{"conv_in.weight": torch.zeros(64, 9, 3, 3)}),
        UnsupportedError,
        "takes 9 channels",
    ),
    "T2I adapter": (lambda: {"body.0.in_conv.weight": ONE}, UnsupportedError, "is a T2I adapter"),
    "diffusers' T2I adapter": (
        lambda: {"adapter.body.0.resnets.0.block1.weight": ONE},
        UnsupportedError,
        "is a T2I adapter",
    ),
    "differences": (differences, UnsupportedError, "is a DiffControlNet"),
    "Control-LoRA": (lambda: changed("single file", lora_controlnet=ONE), UnsupportedError, "is a Control-LoRA"),
    "a UNet": (lambda: unet_tensors(CONFIGS["tiny"]), CheckpointError, "holds no ControlNet"),
    "half a file": (lambda: changed(without="down_blocks.1."), CheckpointError, "lacks down_blocks.1"),
    "no zero convolution": (lambda: changed(without="controlnet_down_blocks.2"), CheckpointError, "missing"),
    "no embedding of the image": (lambda: changed("single file", "input_hint"), CheckpointError, "lacks"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_refused_say_what_they_are(name: str, tmp_path: Path) -> None:
    make, error, message = REFUSED[name]
    save_file(make(), path := tmp_path / "a.safetensors")
    with pytest.raises(error, match=message):
        local_unet_control(path, build_mesh(MeshSpec(), groups()))


# -- requests ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_images_that_do_not_fit_are_refused_with_their_sizes(controls: Path) -> None:
    control, given = network(file(controls, "tiny"), MeshSpec()), inputs("tiny", (2, 16, 8))
    with pytest.raises(InputError, match="has 4 channels; this ControlNet takes 3"):
        control.prepare(torch.zeros(1, 4, 128, 64))
    with pytest.raises(InputError, match="has 124 x 64 pixels"):
        control.prepare(torch.zeros(1, 3, 124, 64))
    small, many = control.prepare(torch.zeros(1, 3, 64, 64)), control.prepare(torch.zeros(3, 3, 128, 64))
    with pytest.raises(InputError, match=r"has 64 x 64 pixels .* a latent of 16 x 8 takes 128 x 64"):
        control_residuals(control, *given, small, Step())
    with pytest.raises(InputError, match="3 control images for 2 latents"):
        control_residuals(control, *given, many, Step())


@torch.inference_mode()
@pytest.mark.parametrize("kind", [6, -1])
def test_a_kind_of_image_that_a_union_model_does_not_know_is_refused(kind: int, controls: Path) -> None:
    control, size = network(file(controls, "union"), MeshSpec()), (1, 4, 4)
    with pytest.raises(InputError, match=rf"knows 6 control types, 0 to 5; type {kind} is asked for.*ProMax"):
        control_residuals(control, *inputs("tiny", size), control.prepare(hint_for(size)), Step(), (kind,))


def test_a_controlnet_of_another_model_is_refused() -> None:
    TINY.check_fits(CONFIGS["tiny"], "a.file")
    CONTROLS["small"].check_fits(CONFIGS["tiny"], "a.file")
    for name, what in (("refiner", "context_width is 2048, the model's 1280"), ("koala", "block_channels")):
        with pytest.raises(UnsupportedError, match=what):
            TINY.check_fits(CONFIGS[name], "a.file")
