"""`parallel-mmdit run` and README's Python, as a new user would try them: in a process, in a folder of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from served import wait_until
from small_pipelines import clip, sdxl_pipeline, single_file, t5, write_clip_tokenizer, write_t5_tokenizer

from parallel_backend import Backend
from parallel_backend.__main__ import main
from parallel_backend.demo.files import MMDIT_FILE, UNET_FILE
from parallel_backend.demo.scenes import parse
from parallel_backend.demo.score import shows
from parallel_backend.errors import InputError
from parallel_backend.rpc import runtime_dir
from parallel_backend.run.files import save, target
from parallel_backend.small_checkpoints.mmdit import mmdit_tensors, small_config

ROOT = Path(__file__).parents[1]
CAPTION = "a red circle left of a blue square on a yellow background"
# Of README's snippet: the backend of this process's own name.
NAME = "run"


@pytest.fixture(scope="module")
def backend_name(runtime_folder: Path) -> Iterator[str]:
    """Of the backend that the first command starts and the others find."""
    yield NAME
    Backend.attach(NAME).stop()


def command(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line(*words), capture_output=True, text=True, cwd=cwd, env=environment())


def line(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "parallel_backend", "run", *map(str, words), "--name", NAME, "--device", "cpu"]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_the_demos_checkpoint_draws_and_nothing_is_overwritten(backend_name: str, tmp_path: Path) -> None:
    asked = ["--prompt", CAPTION, "--steps", "20", "--cfg", "4", "--seed", "1", "--output", "pictures"]
    done = [command(MMDIT_FILE.listed, *asked, cwd=tmp_path) for _ in range(2)]
    for number, one in enumerate(done):
        assert one.returncode == 0, one.stderr
        words = one.stdout.splitlines()
        assert re.fullmatch(r"parallel_demo/mmdit.safetensors: .*=2.*, float32, 2 ranks; seed 1", words[0])
        assert re.fullmatch(r"\d+\.\d{3} s a step, 20 steps", words[1])
        assert words[2:] == [f"pictures/mmdit{'-2' if number else ''}.png"]
        assert "Loading mmdit.safetensors" in one.stderr and "Drawing" in one.stderr
    first, second = (Image.open(tmp_path / "pictures" / f"mmdit{end}.png") for end in ("", "-2"))
    assert first.size == (128, 128) and first.tobytes() == second.tobytes()
    assert first.text["prompt"] == CAPTION and first.text["seed"] == "1" and first.text["guidance_scale"] == "4.0"
    assert shows(first.convert("RGB"), parse(CAPTION))
    assert NAME in runtime_dir.living_names()


def test_a_pipelines_folder_and_settings_by_comfyuis_names(backend_name: str, tmp_path: Path) -> None:
    sdxl_pipeline(tmp_path / "sdxl")
    asked = ["--negative", "blue", "--size", "160x96", "--steps", "2", "--count", "2"]
    by_name = ["--sampler", "dpmpp_2m", "--scheduler", "karras", "--output", "a.png"]
    done = command("sdxl", "--prompt", "red", *asked, *by_name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2:] == ["a.png", "a-2.png"]
    pictures = [Image.open(tmp_path / name) for name in ("a.png", "a-2.png")]
    assert [picture.size for picture in pictures] == [(160, 96)] * 2
    assert pictures[0].tobytes() != pictures[1].tobytes() and pictures[0].text["scheduler"] == "karras"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none.safetensors"], "There is no file"),
        (["owner/model"], "hf download owner/model"),
        ([MMDIT_FILE.listed, "--size", "big"], "--size big is no size. Give WxH"),
        ([MMDIT_FILE.listed, "--size", "100"], "height=100 is no multiple of 16. Use 96 or 112."),
        ([MMDIT_FILE.listed, "--output", "a.jpg"], "a.jpg is no folder and no .png file"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_line(
    words: list[str],
    said: str,
    backend_name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*line(*words, "--prompt", CAPTION)[3:]]) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_ctrl_c_ends_the_job_and_leaves_the_backend(backend_name: str, tmp_path: Path) -> None:
    command(UNET_FILE.listed, "--prompt", CAPTION, "--steps", "1", cwd=tmp_path)
    backend = Backend.attach(NAME)
    before = backend.status()
    asked = line(UNET_FILE.listed, "--prompt", CAPTION, "--steps", "900")
    process = subprocess.Popen(asked, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_until(lambda: "sample" in backend.status().running.lower())
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    wait_until(lambda: not backend.status().running)
    after = backend.status()
    assert after.generation == before.generation and after.jobs_failed == before.jobs_failed + 1
    assert [file.name for file in tmp_path.iterdir()] == ["unet.png"]
    backend.close()


def test_files_go_where_there_is_room(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8), "red")
    first = target(str(tmp_path / "new" / "deep"), "model")
    assert [save(picture, first, {}).name for _ in range(3)] == ["model.png", "model-2.png", "model-3.png"]
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="can't be made"):
        target(str(tmp_path / "taken"), "model")


def test_readmes_python_runs_as_it_stands(backend_name: str, models: Path, tmp_path: Path) -> None:
    """In a folder with files of those names: small ones of the true layouts."""
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert snippet is not None
    words, letters = (
        len(write_clip_tokenizer(tmp_path / "tokenizer")),
        len(write_t5_tokenizer(tmp_path / "tokenizer_3")),
    )
    for name, encoder in (("clip_l", clip(768, words)), ("clip_g", clip(1280, words)), ("t5xxl_fp16", t5(letters))):
        single_file(tmp_path / f"{name}.safetensors", encoder, torch.float16)
    mmdit = mmdit_tensors(small_config("sd3.5-medium", 1))
    vae = load_file(models / "vae" / "sd3_vae.safetensors")
    parts = (("model.diffusion_model.", mmdit), ("first_stage_model.", vae))
    whole = {prefix + name: tensor for prefix, tensors in parts for name, tensor in tensors.items()}
    save_file(whole, tmp_path / "sd3.5_medium.safetensors")
    code = snippet[1]
    for name in re.findall(r'"(\S+\.safetensors)"', code):
        assert (tmp_path / name).is_file(), name
    (tmp_path / "snippet.py").write_text(code)
    here = environment() | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "snippet.py"], cwd=tmp_path, env=here, capture_output=True, text=True)
    try:
        assert done.returncode == 0, done.stderr
        assert Image.open(tmp_path / "astronaut.png").size == (1024, 1024)
    finally:
        Backend.attach().stop()
