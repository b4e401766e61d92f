"""Short runs of the trainer: the loss falls, a resumed run is the run that did not stop, ranks of two kinds agree."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from parallel_backend import Conditioning, SamplerSpec
from parallel_backend.demo.captions import SDXL_WIDTHS, WORDS, embed
from parallel_backend.demo.edges import hints, pictures_of
from parallel_backend.demo.scenes import held_out_scenes
from parallel_backend.errors import CheckpointError, ConfigError
from parallel_backend.models.mmdit_checkpoint import mmdit_config, open_mmdit
from parallel_backend.models.vae_checkpoint import open_vae
from parallel_backend.rank.one_process import OneProcess
from parallel_training import snapshots
from parallel_training.autoencoder import AutoencoderTask, open_autoencoder
from parallel_training.config import Roles, TrainSpec
from parallel_training.controlnet import ControlNetTask
from parallel_training.data import LatentSource, PixelSource
from parallel_training.loop import averaging, train

pytestmark = pytest.mark.busy

ROOT = Path(__file__).parents[1]
ALONE = Roles(1)


def spec_of(folder: Path, **settings: object) -> TrainSpec:
    small = {"task": "autoencoder", "output": str(folder), "steps": 30, "batch": 2, "warmup": 5, "size": 64}
    return TrainSpec(**small | {"save_every": 10, "sheet_every": 30, "ema_decay": 0.9} | settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autoencoder")
    train(spec_of(folder), ALONE)
    return folder


def losses_of(spec: TrainSpec, roles: Roles = ALONE) -> list[float]:
    snapshot = snapshots.load(spec, roles)
    assert snapshot is not None
    return snapshot.losses


def test_an_autoencoder_learns_and_is_one_that_the_backend_opens(autoencoder: Path) -> None:
    losses = losses_of(spec_of(autoencoder))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    vae = open_vae([autoencoder / f"taesd3_{part}.safetensors" for part in ("encoder", "decoder")])
    assert (vae.family, vae.latent_channels) == ("taesd3", 16)
    assert (autoencoder / "samples.png").stat().st_size > 1000 and (autoencoder / "loss.png").exists()


@pytest.mark.parametrize(("updates", "decay"), [(1, 2 / 11), (90, 0.91), (10**6, 0.999)])
def test_the_average_follows_a_young_run_closely(updates: int, decay: float) -> None:
    averaged, current = [torch.zeros(3)], [torch.ones(3)]
    averaging(0.999)(averaged, current, torch.tensor(updates))
    assert averaged[0].tolist() == pytest.approx([1 - decay] * 3)


def test_a_resumed_run_is_the_run_that_did_not_stop(autoencoder: Path, tmp_path: Path) -> None:
    halves, whole = tmp_path / "halves", tmp_path / "whole"
    settings = {"task": "mmdit", "autoencoder": str(autoencoder), "steps": 20, "first_scenes": 16, "depth": 2}
    train(spec_of(whole, **settings), ALONE)
    train(spec_of(halves, until=4, **settings), ALONE)
    assert len(losses_of(spec_of(halves, **settings))) == 4 and (halves / "mmdit.safetensors").exists()

    class Enough(Exception):
        """Ends the run right after its first snapshot, as a cut-off machine would."""

    original = snapshots.save

    def save_and_end(*arguments: object) -> None:
        original(*arguments)  # type: ignore[arg-type]
        raise Enough

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshots, "save", save_and_end)
        with pytest.raises(Enough):
            train(spec_of(halves, **settings), ALONE)
    assert len(losses_of(spec_of(halves, **settings))) == 10
    train(spec_of(halves, **settings), ALONE)
    assert losses_of(spec_of(halves, **settings)) == losses_of(spec_of(whole, **settings))
    ours, theirs = (load_file(folder / "mmdit.safetensors") for folder in (halves, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = losses_of(spec_of(whole, **settings))
    assert sum(losses[-5:]) < sum(losses[:5])
    assert mmdit_config(open_mmdit(whole / "mmdit.safetensors")).depth == 2


def test_a_run_can_start_from_the_weights_of_another(autoencoder: Path, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, initial=str(autoencoder), crop=48, steps=2, save_every=2)
    train(spec, ALONE)
    assert losses_of(spec)[0] < 0.9 * losses_of(spec_of(autoencoder))[0]


def test_the_weights_of_other_latent_channels_are_taken_where_they_fit(autoencoder: Path, tmp_path: Path) -> None:
    task = AutoencoderTask(spec_of(tmp_path, channels=4), torch.device("cpu"))
    task.start_from(autoencoder)
    ours, theirs = task.model.state_dict(), open_autoencoder(autoencoder, 16).state_dict()
    anew = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert anew == {"encoder.layers.14.weight", "encoder.layers.14.bias", "decoder.layers.0.weight"}
    with pytest.raises(ConfigError, match="holds no trained autoencoder"):
        task.start_from(tmp_path)


def test_the_noise_that_a_decoder_learns_to_bear_is_drawn_from_the_step(autoencoder: Path, tmp_path: Path) -> None:
    losses = []
    for strength in (0.0, 1.0, 1.0):
        task = AutoencoderTask(spec_of(tmp_path, latent_noise=strength), torch.device("cpu"))
        task.start_from(autoencoder)
        loss = task.loss(task.model, task.source(0).batch(0), torch.Generator().manual_seed(1))
        losses.append(float(loss.detach()))
    assert losses[0] != losses[1] == losses[2]


@pytest.fixture(scope="module")
def autoencoder_for_unets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autoencoder4")
    train(spec_of(folder, steps=2, channels=4), ALONE)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_unet_learns_and_is_one_that_the_backend_samples(
    dtype: str, autoencoder_for_unets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype == "bfloat16":  # the sheet is drawn in fp32 all the same
        monkeypatch.setattr("parallel_training.unet.UNetTask.sheet", lambda *_: Image.new("RGB", (8, 8)))
    settings = {"task": "unet", "autoencoder": str(autoencoder_for_unets), "channels": 4, "first_scenes": 16}
    spec = spec_of(tmp_path / "unet", steps=15, batch=8, dtype=dtype, **settings)
    train(spec, ALONE)
    losses = losses_of(spec)
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
    path = tmp_path / "unet" / "unet.safetensors"
    context, pooled = embed(torch.zeros(1, WORDS, dtype=torch.int64), SDXL_WIDTHS)
    prompt = Conditioning(context, pooled, [64, 64, 0, 0, 64, 64])
    latent = OneProcess(path).sample(torch.zeros(1, 4, 8, 8), prompt, prompt, SamplerSpec(steps=2, cfg_scale=1.0))
    assert latent.std() > 0.1


def test_a_controlnet_begins_as_nothing_and_is_one_that_the_backend_uses(
    autoencoder_for_unets: Path, tmp_path: Path
) -> None:
    settings = {"autoencoder": str(autoencoder_for_unets), "channels": 4, "first_scenes": 16, "steps": 2}
    train(spec_of(tmp_path / "unet", task="unet", batch=2, **settings), ALONE)
    settings |= {"task": "controlnet", "unet": str(tmp_path / "unet"), "learning_rate": 0.01}
    spec = spec_of(tmp_path / "control", **settings)
    task = ControlNetTask(spec, torch.device("cpu"))
    batch, timesteps = task.source(0).batch(0), torch.tensor([3, 900])
    assert set(batch.hints.unique().tolist()) == {0.0, 1.0} and batch.hints.shape[2] == 8 * batch.images.shape[2]
    context, vector = task.prompt(batch.images, batch.words)
    alone = task.unet(batch.images, timesteps, context, class_labels=vector, return_dict=False)[0]
    assert torch.equal(task.output(task.model, batch.images, timesteps, batch.words, batch.hints), alone)
    train(spec, ALONE)
    process = OneProcess(tmp_path / "unet" / "unet.safetensors")
    name = process.load_control(tmp_path / "control" / "controlnet.safetensors")
    context, pooled = embed(batch.words[:1], SDXL_WIDTHS)
    prompt = Conditioning(context, pooled, [64, 64, 0, 0, 64, 64])
    one_step = SamplerSpec(steps=1, cfg_scale=1.0, seed=1)
    lines = hints(pictures_of(held_out_scenes(1), 64))
    given = [{}, {name: torch.zeros_like(lines)}, {name: lines}]
    latents = [process.sample(torch.zeros(1, 4, 8, 8), prompt, prompt, one_step, hint) for hint in given]
    distances = [float((a - b).abs().max()) for a, b in pairwise(latents)]
    assert min(distances) > 1e-5, distances


def launch(spec: TrainSpec, ranks: int, loaders: str) -> subprocess.CompletedProcess[str]:
    options = [
        f"--{k.replace('_', '-')}={v}" for k, v in msgspec.structs.asdict(spec).items() if k != "task" and v != ""
    ]
    command = [sys.executable, "-m", "parallel_backend", "train", spec.task, *options]
    return subprocess.run(
        [*command, f"--ranks={ranks}", f"--loaders={loaders}"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_model_ranks_stay_equal_to_one_rank_on_their_batches(tmp_path: Path) -> None:
    """Two fed ranks take the loader's batches in turn: one rank that accumulates the same two batches learns the same."""
    fed = spec_of(tmp_path / "fed", steps=2, save_every=2)
    done = launch(fed, 3, "{2: [0, 1]}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(losses_of(fed, Roles.parse("{2: [0, 1]}", 3))) == 2
    with pytest.raises(ConfigError, match=r"had 3 ranks and loader map \{2: \[0, 1\]\}; this one has 1"):
        snapshots.load(fed, ALONE)
    alone = spec_of(tmp_path / "alone", steps=2, save_every=2, accumulate=2)

    source = PixelSource(alone, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parallel_training.autoencoder.AutoencoderTask.source", lambda task, rank: source)
        train(alone, ALONE)
    pairs = zip(*(load_file(Path(s.output) / "taesd3_decoder.safetensors").values() for s in (fed, alone)), strict=True)
    assert all(torch.allclose(a.float(), b.float(), atol=2e-3) for a, b in pairs)


def test_batches_depend_on_seed_rank_and_number_alone(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)

    def encode(images: torch.Tensor) -> torch.Tensor:
        return images[:, :, ::8, ::8]

    source = LatentSource(spec, 0, encode)
    fifth = [source.batch(number) for number in range(6)][5]
    again = LatentSource(spec, 0, encode).batch(5)
    assert torch.equal(fifth.images, again.images) and torch.equal(fifth.words, again.words)
    assert not torch.equal(fifth.words, LatentSource(spec, 1, encode).batch(5).words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{0: [1, 2", "can't be read"),
        ("[0, 1]", "no map from a rank"),
        ("{0: [1]}", r"names ranks \[0, 1\]; the run has \[0, 1, 2\]"),
        ("{0: [1, 1, 2]}", r"names ranks \[0, 1, 1, 2\]"),
    ],
)
def test_loader_maps_that_dont_fit_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Roles.parse(text, 3)


def test_a_damaged_snapshot_and_another_run_are_named(autoencoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch: 2 then, 4 now"):
        snapshots.load(spec_of(autoencoder, batch=4), ALONE)
    (tmp_path / snapshots.NAME).write_bytes((autoencoder / snapshots.NAME).read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="can't be read"):
        snapshots.load(spec_of(tmp_path), ALONE)
    with pytest.raises(ConfigError, match="trained on latents"):
        spec_of(tmp_path, task="mmdit")
    with pytest.raises(ConfigError, match=r"latent_noise=2.0 is not possible"):
        spec_of(tmp_path, latent_noise=2.0)
    with pytest.raises(ConfigError, match="holds no trained UNet"):
        ControlNetTask(
            spec_of(tmp_path, task="controlnet", autoencoder="somewhere", channels=4, unet=str(tmp_path)),
            torch.device("cpu"),
        )
    with pytest.raises(ConfigError, match="unet='' is not possible for the task controlnet"):
        spec_of(tmp_path, task="controlnet", autoencoder="somewhere", channels=4)
    with pytest.raises(ConfigError, match="unet='elsewhere' is not possible for the task mmdit"):
        spec_of(tmp_path, task="mmdit", autoencoder="somewhere", unet="elsewhere")
    with pytest.raises(ConfigError, match="channels=16 is not possible for the task unet"):
        spec_of(tmp_path, task="unet", autoencoder="somewhere")
