"""The demo and its trained files: pictures that show what was asked for, told by plain image checks."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from parallel_backend import Backend, MeshSpec
from parallel_backend.__main__ import main
from parallel_backend.bench.pictures import draw_plot, figures
from parallel_backend.bench.weights import rows
from parallel_backend.demo import command, yardsticks
from parallel_backend.demo.drawing import as_picture
from parallel_backend.demo.edges import pictures_of
from parallel_backend.demo.files import MODELS
from parallel_backend.demo.scenes import CAPTIONS, held_out_scenes, parse
from parallel_backend.demo.score import shows
from parallel_backend.demo.trained import CONTROLNET, MMDIT, SHIPPED, UNET, Trained, trained_in
from parallel_backend.demo.yardsticks import agreement, psnr, sampled_pictures
from parallel_backend.errors import CheckpointError
from parallel_backend.models.unet import micro_conditioning
from parallel_backend.small_checkpoints.taesd import write_taesd
from parallel_backend.small_checkpoints.unet import write_unet
from parallel_training.config import TrainSpec
from parallel_training.unet import CONFIG

pytestmark = pytest.mark.busy

ASKED = ["a red circle left of a blue square on a yellow background", "three purple triangles on a white background"]


@pytest.fixture
def demo_backend(monkeypatch: pytest.MonkeyPatch, backend2: Backend) -> Backend:
    """The session's backend in place of one that the demo would start and stop."""
    for module in (command, yardsticks):
        monkeypatch.setattr(module, "BACKEND", "test2")
    monkeypatch.setattr(Backend, "stop", lambda self: None)
    return backend2


def test_files_are_small_and_say_what_they_are() -> None:
    assert sum(path.stat().st_size for path in (MMDIT.path, *MMDIT.vae)) <= 30e6
    assert sum(path.stat().st_size for path in MODELS.rglob("*.safetensors")) <= 70e6
    card = (MODELS / "README.md").read_text()
    assert all(
        word in card
        for word in (
            "steps",
            "seed",
            "train mmdit",
            "train unet",
            "train controlnet",
            "train autoencoder",
            "loss",
            "samples",
        )
    )
    assert all(path.name in card for path in MODELS.rglob("*.safetensors"))


@pytest.mark.parametrize(("model", "mesh"), [("mmdit", "cfg=2"), ("unet", "patch=2"), ("controlnet", "patch=2")])
def test_demo_draws_compares_and_writes_a_sheet(
    model: str, mesh: str, demo_backend: Backend, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [word for caption in ASKED for word in ("--prompt", caption)]
    assert main(["demo", "--model", model, "--output", str(tmp_path), *prompts]) == 0
    said = capsys.readouterr().out
    assert mesh in said
    assert "0 bytes read; bit-equal to the first time" in said
    (difference,) = re.findall(r"largest relative difference of a latent (\S+)", said)
    assert 0 <= float(difference) <= 1e-4
    sheet = Image.open(tmp_path / "demo.png")
    assert sheet.width >= 2 * 128 and sheet.height >= 2 * 128
    top = 140 if model == "controlnet" else 6  # below the edges
    above, below = (sheet.crop((6, top, 134, top + 128)) for top in (top, top + 134))
    assert (
        max(
            max(abs(a - b) for a, b in zip(p, q, strict=True))
            for p, q in zip(above.getdata(), below.getdata(), strict=True)
        )
        <= 1
    )


@pytest.mark.parametrize("trained", SHIPPED.values(), ids=SHIPPED)
def test_pictures_show_their_captions(trained: Trained, backend2: Backend) -> None:
    """Of held-out captions, and a control: pictures of other captions show them far less often."""
    scenes = held_out_scenes(12)
    model = backend2.load_model(trained.path, trained.mesh, "float32")
    vae, net = backend2.load_vae(trained.vae, "float32"), trained.net(backend2, model)
    images = sampled_pictures(trained, model, vae, scenes, 128, "pictures", net, leave=False)
    pictures = [as_picture(image) for image in images]
    found = sum(shows(picture, scene) for picture, scene in zip(pictures, scenes, strict=True))
    crossed = sum(shows(picture, scene) for picture, scene in zip(pictures, scenes[1:] + scenes[:1], strict=True))
    assert found >= 6 and crossed <= 1, (found, crossed)
    alike = agreement(images, pictures_of(scenes, 128))
    assert (alike > 0.97) == (net is not None), alike


@pytest.fixture
def unet_run(tmp_path: Path) -> Path:
    """A folder as `parallel-mmdit train unet` leaves it, with random weights."""
    folder = tmp_path / "run"
    write_taesd(folder / "autoencoder", "taesdxl", 4)
    write_unet(folder / "unet.safetensors", CONFIG)
    spec = TrainSpec(task="unet", output=str(folder), steps=1, channels=4, autoencoder=str(folder / "autoencoder"))
    (folder / "run.json").write_bytes(msgspec.json.encode(spec))
    return folder


def test_an_own_runs_unet_is_scored(unet_run: Path, demo_backend: Backend, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "--trained", str(unet_run), "--count", "2"]) == 0
    assert re.search(r"samples: 0% of 2 held-out captions", capsys.readouterr().out)


def test_a_folder_without_an_ended_run_is_named(unet_run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no run of a model"):
        trained_in(tmp_path)
    (tmp_path / "run.json").write_bytes((unet_run / "run.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"has left no unet.safetensors yet"):
        trained_in(tmp_path)
    (tmp_path / "run.json").write_bytes(b'{"task": "autoencoder", "autoencoder": ""}')
    with pytest.raises(CheckpointError, match="Invalid enum value 'autoencoder'"):
        trained_in(tmp_path)


def test_diffusers_opens_the_unets_file_and_computes_what_its_bands_do(backend2: Backend) -> None:
    reference: Any = UNet2DConditionModel(**CONFIG.diffusers())
    reference.load_state_dict(load_file(UNET.path))
    latent, prompt, _ = UNET.job(ASKED, 128)
    assert prompt.sizes is not None
    vector = micro_conditioning(prompt.pooled, prompt.sizes)
    x = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.full((len(ASKED),), 600.0)
    with torch.no_grad():
        theirs = reference.eval()(x, timesteps, prompt.context, class_labels=vector, return_dict=False)[0]
    model = backend2.load_model(UNET.path, UNET.mesh, "float32")
    ours = model.forward(x, timesteps, prompt.context, vector)
    assert (ours - theirs).norm() / theirs.norm() <= 1e-5


def test_one_checkpoint_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["score", "--model", "unet", "--trained", "runs/unet"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_score_prints_its_figures(demo_backend: Backend, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "--count", "3"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"reconstructions: \d+% of 3 held-out captions", said)
    assert re.search(r"samples: \d+% of 3 held-out captions", said)
    (least,) = re.findall(r"PSNR (\S+) dB", said)
    assert float(least) > 60


@pytest.mark.parametrize(
    ("trained", "mesh"),
    [(MMDIT, MeshSpec(pp=2)), (UNET, MeshSpec(patch=2)), (CONTROLNET, MeshSpec(patch=2))],
    ids=SHIPPED,
)
def test_displaced_pictures_are_measured_against_exact_ones(
    trained: Trained, mesh: MeshSpec, backend2: Backend, tmp_path: Path
) -> None:
    steps = 8
    fewer = replace(trained, spec=msgspec.structs.replace(trained.spec, steps=steps))
    found = figures(fewer, backend2, mesh, [1, 4, steps], held_out_scenes(2), 128)
    exact, early, late, full = found
    assert (exact.warmup, exact.mean_psnr) == (None, 150)
    # A trained model's steps are alike: what is a step old costs little, and more warm-up need not cost less.
    assert 25 < early.mean_psnr < 100 and 25 < late.mean_psnr < 100 and full.least_psnr > 80
    draw_plot(found, steps, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").width > 100


@pytest.mark.parametrize("trained", [MMDIT, UNET], ids=["mmdit", "unet"])
def test_pictures_of_weights_in_fp8_are_measured_against_the_files_own(trained: Trained, backend2: Backend) -> None:
    fewer = replace(trained, spec=msgspec.structs.replace(trained.spec, steps=4))
    own, fp8, cast, coarse, fast = rows(fewer, backend2, held_out_scenes(2), 128)
    assert own.mean_psnr == 150 and fp8.held < 0.3 * own.held
    assert fp8.mean_psnr > cast.mean_psnr > coarse.mean_psnr > 20 and 20 < fast.mean_psnr < fp8.mean_psnr < 100


def test_psnr() -> None:
    black = torch.zeros(4, 4, 3)
    assert psnr(black, black) == 150
    assert psnr(black, black + 0.1) == pytest.approx(20, abs=1e-4)


@pytest.mark.parametrize("caption", CAPTIONS)
def test_own_captions_are_of_the_grammar(caption: str) -> None:
    assert parse(caption).caption() == caption


def test_an_unknown_word_is_an_error_that_lists_the_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--output", str(tmp_path), "--prompt", "a photo of a cat"]) == 1
    said = capsys.readouterr().err
    assert "no word 'photo'" in said and "circle" in said and "yellow" in said
