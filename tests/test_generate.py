"""Prompt to picture in Python: equal to diffusers' own pipelines on the same weights, in one process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from small_pipelines import as_in_a_file, as_open_clip, sd3_pipeline, sdxl_pipeline

from parallel_backend import Backend, MeshSpec, RemoteModel
from parallel_backend.demo.captions import Captions
from parallel_backend.demo.trained import MMDIT
from parallel_backend.errors import BackendError, CheckpointError, ConfigError, InputError, UnsupportedError
from parallel_backend.rpc import runtime_dir
from parallel_backend.small_checkpoints.unet import CONFIGS, write_unet

PIPELINES = {"SD3": sd3_pipeline, "SDXL": sdxl_pipeline}
PROMPT, NEGATIVE = "a red circle", "blue squares"


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    folders = {name: tmp_path_factory.mktemp(name) for name in PIPELINES}
    return {name: (make(folders[name]), folders[name]) for name, make in PIPELINES.items()}


@pytest.fixture(scope="module")
def backend1(runtime_folder: Path) -> Iterator[Backend]:
    with Backend(1, "cpu", "one") as backend:
        yield backend
        backend.stop()


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loaded(backend: Backend, folder: Path, mesh: MeshSpec | None = None, **settings: Any) -> RemoteModel:
    return backend.load_model(folder, mesh, "float32", **settings)


def check(backend: Backend, mesh: MeshSpec, pipeline: Any, folder: Path, **asked: Any) -> None:
    """Latents and pictures are those of diffusers, to rounding."""
    settings = {"prompt": PROMPT, "num_inference_steps": 4} | asked
    model = loaded(backend, folder, mesh)
    latents = model.generate(**settings, generator=seeded(), output_type="latent").images
    wanted = pipeline(**settings, generator=seeded(), output_type="latent").images
    assert latents.shape == wanted.shape
    assert (latents - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    ours = model.generate(**settings, generator=seeded(), output_type="np").images
    theirs = pipeline(**settings, generator=seeded(), output_type="np").images
    assert ours.shape == theirs.shape and ours.std() > 0.01
    assert np.abs(ours - theirs).max() < 1e-3


@pytest.mark.parametrize(
    ("family", "mesh"), [("SD3", MeshSpec(cfg=2)), ("SD3", MeshSpec(ulysses=2)), ("SDXL", MeshSpec(patch=2))], ids=str
)
def test_two_ranks_draw_what_diffusers_draws(
    family: str, mesh: MeshSpec, backend2: Backend, pipelines: dict[str, tuple[Any, Path]]
) -> None:
    check(backend2, mesh, *pipelines[family], negative_prompt=NEGATIVE)


@pytest.mark.parametrize("family", PIPELINES)
def test_one_rank_draws_a_batch_of_prompts_and_pictures_of_another_shape(
    family: str, backend1: Backend, pipelines: dict[str, tuple[Any, Path]]
) -> None:
    prompts = {"prompt": [PROMPT, "zebra!"], "negative_prompt": [NEGATIVE, ""], "num_images_per_prompt": 2}
    check(backend1, MeshSpec(), *pipelines[family], **prompts, height=96, width=160)


@pytest.mark.parametrize("family", PIPELINES)
def test_without_guidance_and_without_a_negative_prompt(
    family: str, backend2: Backend, pipelines: dict[str, tuple[Any, Path]]
) -> None:
    check(backend2, MeshSpec(cfg=2), *pipelines[family], guidance_scale=1.0)
    check(backend2, MeshSpec(cfg=2), *pipelines[family], guidance_scale=3.5, num_inference_steps=7)


@pytest.mark.parametrize("family", PIPELINES)
def test_steps_end_with_the_latents_that_diffusers_has_there(
    family: str, backend2: Backend, pipelines: dict[str, tuple[Any, Path]]
) -> None:
    pipeline, folder = pipelines[family]
    seen: dict[str, list[tuple[int, float, torch.Tensor]]] = {"ours": [], "theirs": []}

    def tell(which: str) -> Any:
        def at_end(_: Any, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
            seen[which].append((step, float(timestep), tensors["latents"].clone()))
            return tensors

        return at_end

    asked = {"prompt": PROMPT, "num_inference_steps": 4, "output_type": "latent"}
    loaded(backend2, folder).generate(**asked, generator=seeded(), callback_on_step_end=tell("ours"))
    pipeline(**asked, generator=seeded(), callback_on_step_end=tell("theirs"))
    assert [s[0] for s in seen["ours"]] == [0, 1, 2, 3]
    for (step, timestep, latents), (their_step, their_timestep, theirs) in zip(*seen.values(), strict=True):
        assert step == their_step and timestep == pytest.approx(their_timestep, abs=0.01)
        assert (latents - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_a_single_file_with_all_parts_draws_what_its_folder_draws(
    backend2: Backend, pipelines: dict[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    pipeline, folder = pipelines["SDXL"]
    first, second = as_in_a_file(pipeline.text_encoder), as_open_clip(as_in_a_file(pipeline.text_encoder_2))
    parts = {"conditioner.embedders.0.transformer.": first, "conditioner.embedders.1.model.": second}
    extra = {prefix + name: tensor for prefix, tensors in parts.items() for name, tensor in tensors.items()}
    path = tmp_path / "sd_xl_base_1.0.safetensors"
    write_unet(path, CONFIGS["tiny"], "single file", prefix="model.diffusion_model.", extra=extra)
    asked: dict[str, Any] = {"seed": 1, "width": 128, "height": 128, "num_inference_steps": 3, "output_type": "latent"}
    wanted = loaded(backend2, folder).generate(PROMPT, **asked).images
    drawn = loaded(backend2, path, tokenizers=folder).generate(PROMPT, **asked).images
    assert (drawn - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_name_of_the_hub_draws_from_its_cache(
    backend2: Backend, pipelines: dict[str, tuple[Any, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    kept = tmp_path / "models--someone--small"
    for folder in ("snapshots", "refs"):
        (kept / folder).mkdir(parents=True)
    (kept / "snapshots" / "abc").symlink_to(pipelines["SD3"][1])
    (kept / "refs" / "main").write_text("abc")
    model = backend2.load_model("someone/small", dtype="float32")
    assert model.generate(PROMPT, num_inference_steps=1).images[0].size == (128, 128)


def test_defaults_are_the_pipelines_own(backend2: Backend, pipelines: dict[str, tuple[Any, Path]]) -> None:
    for family, steps in (("SD3", 28), ("SDXL", 50)):
        pipeline, folder = pipelines[family]
        model = loaded(backend2, folder)
        picture = model.generate(PROMPT, seed=1).images[0]
        assert model.last is not None and model.last.steps == steps and picture.size == (128, 128)
        theirs = np.asarray(pipeline(PROMPT, generator=seeded(1)).images[0]).astype(float)
        assert np.abs(np.asarray(picture) - theirs).mean() < 0.5


def test_outputs_and_noise_that_is_given(backend2: Backend, pipelines: dict[str, tuple[Any, Path]]) -> None:
    model = loaded(backend2, pipelines["SD3"][1])
    asked: dict[str, Any] = {"num_inference_steps": 2}
    of = {kind: model.generate(PROMPT, seed=3, output_type=kind, **asked).images for kind in ("pil", "np", "pt")}
    assert of["np"].shape == (1, 128, 128, 3) and of["pt"].shape == (1, 3, 128, 128)
    assert np.array_equal(of["pt"].permute(0, 2, 3, 1).numpy(), of["np"])
    assert np.array_equal(np.asarray(of["pil"][0]), (of["np"][0] * 255).round().astype("uint8"))
    noise = torch.randn(1, 16, 16, 16, generator=seeded(3))
    given = model.generate(PROMPT, latents=noise, output_type="np", **asked).images
    assert np.array_equal(given, of["np"])
    two = model.generate([PROMPT] * 2, generator=[seeded(4), seeded(3)], output_type="np", **asked).images
    assert np.abs(two[1] - given[0]).max() < 1e-3 < np.abs(two[0] - given[0]).max()


def test_samplers_by_comfyuis_names(backend2: Backend) -> None:
    """What `sample` draws of the same noise."""
    model = loaded(backend2, MMDIT.path, text_encoders=Captions(), vae=MMDIT.vae)
    caption = "a red circle left of a blue square on a yellow background"
    asked: dict[str, Any] = {"sampler": "dpmpp_2m", "scheduler": "karras"}
    drawn = model.generate(
        caption, seed=5, num_inference_steps=6, guidance_scale=4.0, output_type="latent", **asked
    ).images
    wanted = model.sample(*MMDIT.job([caption], 128), seed=5, steps=6, cfg_scale=4.0, **asked)
    assert (drawn - (wanted - 0.0609) * 1.5305).abs().max() <= 1e-5 * drawn.abs().max()
    picture = model.generate(caption, seed=5, num_inference_steps=2, sampler="euler_ancestral").images[0]
    assert picture.size == (128, 128)  # the demo's own size


def test_what_a_callback_raises_cancels_and_what_it_changes_is_refused(backend2: Backend) -> None:
    model = loaded(backend2, MMDIT.path, text_encoders=Captions(), vae=MMDIT.vae)
    seen: list[int] = []

    def stop(_: Any, step: int, *__: Any) -> None:
        seen.append(step)
        raise KeyboardInterrupt

    def other(_: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * 2}

    def in_place(_: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> None:
        tensors["latents"].mul_(2)

    asked: dict[str, Any] = {"num_inference_steps": 500, "seed": 1}
    with pytest.raises(KeyboardInterrupt):
        model.generate("", callback_on_step_end=stop, **asked)
    assert seen == [0]
    for change in (other, in_place):
        with pytest.raises(UnsupportedError, match="callback_on_step_end has changed latents"):
            model.generate("", callback_on_step_end=change, **asked)


def test_bad_input_is_refused_by_name(backend2: Backend, pipelines: dict[str, tuple[Any, Path]]) -> None:
    model = loaded(backend2, pipelines["SD3"][1])
    cases: list[tuple[dict[str, Any], type[BackendError], str]] = [
        ({"output_type": "jpg"}, ConfigError, "output_type 'jpg' is not known. Choose one of: pil, np, pt, latent"),
        ({"generator": seeded(), "seed": 1}, ConfigError, "Both generator and seed"),
        ({"seed": -1}, ConfigError, "seed=-1"),
        ({"width": 200}, ConfigError, "width=200 is no multiple of 16. Use 192 or 208."),
        ({"height": 0}, ConfigError, "height=0"),
        ({"num_inference_steps": 0}, ConfigError, "num_inference_steps=0"),
        ({"num_images_per_prompt": 1.5}, ConfigError, "num_images_per_prompt=1.5"),
        ({"negative_prompt": ["a", "b"]}, InputError, "2 negative prompts came with 1 prompts"),
        ({"prompt": []}, InputError, "No prompt"),
        ({"generator": [seeded()] * 3}, InputError, "3 generators came for 1 pictures"),
        ({"latents": torch.zeros(1, 4, 16, 16)}, InputError, r"latents of shape \[1, 4, 16, 16\]"),
        ({"sampler": "eulerr"}, ConfigError, "Sampler 'eulerr' is not known"),
        ({"scheduler": "karas"}, ConfigError, "Scheduler 'karas' is not known"),
        ({"sampler": "dpm_fast", "callback_on_step_end": print}, UnsupportedError, "dpm_fast makes steps of its own"),
    ]
    for asked, error, words in cases:
        with pytest.raises(error, match=words):
            model.generate(**{"prompt": PROMPT} | asked)


def test_what_a_checkpoint_lacks_is_said_before_it_is_drawn(
    backend2: Backend, large: Path, pipelines: dict[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="SD3 needs the text encoder CLIP-L and CLIP bigG; found: none"):
        loaded(backend2, large).generate(PROMPT)
    bare = loaded(backend2, large, text_encoders=Captions())
    with pytest.raises(CheckpointError, match=r"sd3.5-large.safetensors brings no VAE.*vae=FILE.*output_type='latent'"):
        bare.generate("")
    assert bare.generate("", output_type="latent", num_inference_steps=1).images.shape == (1, 16, 16, 16)
    with pytest.raises(CheckpointError, match="There is no file"):
        loaded(backend2, large, text_encoders=[tmp_path / "none.safetensors"])
    with pytest.raises(CheckpointError, match="nor a model someone/something"):
        loaded(backend2, Path("someone/something"))


def test_schedulers_that_ranks_do_not_have_are_refused(
    backend2: Backend, pipelines: dict[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    folder = tmp_path / "sdxl"
    shutil.copytree(pipelines["SDXL"][1], folder, copy_function=lambda a, b: Path(b).symlink_to(a))
    config = folder / "scheduler" / "scheduler_config.json"
    plain = config.read_text()
    config.unlink()
    for old, new, words in (
        ("EulerDiscreteScheduler", "DDPMScheduler", "DDPMScheduler is none that ranks draw with"),
        ('"leading"', '"linspace"', "timesteps between those of its training"),
        ('"epsilon"', '"sample"', "prediction_type 'sample'"),
    ):
        config.write_text(plain.replace(old, new))
        with pytest.raises(UnsupportedError, match=words):
            loaded(backend2, folder).generate(PROMPT, num_inference_steps=3)
    config.write_text("[]")
    with pytest.raises(CheckpointError, match="is no JSON object"):
        loaded(backend2, folder).generate(PROMPT)


def test_a_with_block_leaves_the_backend_running(backend1: Backend, large: Path) -> None:
    with Backend(1, "cpu", "one") as backend:
        first = loaded(backend, large).loaded
        generation = backend.generation
    with pytest.raises(ConfigError, match="was closed"):
        backend.status()
    assert "one" in runtime_dir.living_names()
    with Backend.attach("one") as again:
        assert again.generation == generation and loaded(again, large).loaded.bytes_read == [0] != first.bytes_read
