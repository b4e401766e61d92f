"""What ComfyUI's clients get of a prompt: whoever queued it its text, if they read text; everybody else nothing; the history
the picture alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from comfyui.listener import EDITOR, Listener
from comfyui.server import ComfyServer
from ui_workflow import WORKFLOWS

MESH, LOADER, SAMPLER, VAE, SAVE = "1", "2", "6", "7", "9"
SEEDS = itertools.count(1000)
# Older editors than today's, of ComfyUI 0.8 on; and programs that read previews, which is not to read text.
OLDER_EDITOR = {"supports_preview_metadata": True, "supports_manager_v4_ui": True}
READS_PREVIEWS = {"supports_preview_metadata": True}


@pytest.fixture(scope="module")
def comfyui(server: ComfyServer, default_backend: str) -> ComfyServer:
    """A ComfyUI whose backend is up, with the demo's models in it."""
    assert server.run(demo(steps=1)).error is None
    return server


@pytest.fixture
def connect(comfyui: ComfyServer) -> Iterator[Any]:
    """Connects a listener with the flags given; closed after the test."""
    made: list[Listener] = []

    def listener(flags: dict[str, bool] | None = None, client_id: str = "") -> Listener:
        made.append(Listener(comfyui.port, flags, client_id))
        return made[-1]

    yield listener
    for line in made:
        line.close()


def demo(steps: int, **mesh: Any) -> dict[str, Any]:
    """The demo's graph; no two have the same seed, so that the sampler runs in each."""
    prompt = json.loads((WORKFLOWS / "api" / "demo_text_to_image.json").read_text())
    prompt[SAMPLER]["inputs"] |= {"steps": steps, "seed": next(SEEDS)}
    prompt[MESH]["inputs"] |= mesh
    return prompt


def queue(comfyui: ComfyServer, prompt: dict[str, Any], client_id: str | None) -> str:
    queued = comfyui.post("/prompt", {"prompt": prompt} | ({"client_id": client_id} if client_id is not None else {}))
    return queued["prompt_id"]


def history(comfyui: ComfyServer, prompt_id: str) -> dict[str, Any]:
    return comfyui.get(f"/history/{prompt_id}")[prompt_id]


def assert_only_the_picture(comfyui: ComfyServer, prompt_id: str) -> None:
    record = history(comfyui, prompt_id)
    assert record["status"]["status_str"] == "success"
    assert {node: list(output) for node, output in record["outputs"].items()} == {SAVE: ["images"]}
    assert len(record["outputs"][SAVE]["images"]) == 1


@pytest.mark.parametrize("flags", [EDITOR, OLDER_EDITOR], ids=["editor", "older editor"])
def test_the_editor_that_queued_gets_each_nodes_text_and_nobody_else_does(
    flags: dict[str, bool], comfyui: ComfyServer, connect: Any
) -> None:
    editor, *others = connect(flags), connect(EDITOR), connect(READS_PREVIEWS), connect()
    # Idle minutes are new to ComfyUI's cache and nothing to a backend that runs: every node is executed.
    prompt_id = queue(comfyui, demo(steps=3, idle_minutes=100 + len(flags)), editor.client_id)
    for line in (editor, *others):
        line.until_idle()
    assert editor.texts.keys() == {MESH, LOADER, SAMPLER, VAE}
    assert editor.texts[MESH] == ["2 ranks on cpu: cfg=2, dtype auto"]
    assert "0 bytes read" in editor.texts[LOADER][-1] and "2 bands" in editor.texts[VAE][-1]
    assert editor.texts[SAMPLER][-1].startswith("3 steps, ")
    assert [line.frames for line in others] == [[], [], []]
    assert_only_the_picture(comfyui, prompt_id)


@pytest.mark.parametrize("flags", [None, READS_PREVIEWS], ids=["no flags", "reads previews"])
def test_a_program_gets_progress_and_no_bytes_that_it_cant_read(
    flags: dict[str, bool] | None, comfyui: ComfyServer, connect: Any
) -> None:
    program, editor = connect(flags), connect(EDITOR)
    prompt_id = queue(comfyui, demo(steps=4), program.client_id)
    for line in (program, editor):
        line.until_idle()
    assert program.frames == [] and editor.frames == []
    progress = [event["data"] for event in program.events if event["type"] == "progress"]
    assert (progress[-1]["value"], progress[-1]["max"]) == (4, 4)
    outputs = [event["data"]["node"] for event in program.events if event["type"] == "executed"]
    assert outputs == [SAVE]
    assert_only_the_picture(comfyui, prompt_id)


@pytest.mark.parametrize("client_id", [None, "", "someone who never came"])
def test_a_prompt_that_nobody_follows_leaves_its_text_in_the_log(
    client_id: str | None, comfyui: ComfyServer, connect: Any
) -> None:
    editor = connect(EDITOR)
    before = len(comfyui.log())
    prompt_id = queue(comfyui, demo(steps=5), client_id)
    editor.until_idle()
    assert editor.frames == []
    assert f"parallel-mmdit, node {SAMPLER}: 5 steps, " in comfyui.log()[before:]
    assert_only_the_picture(comfyui, prompt_id)


def test_prompts_of_two_editors_in_turn(comfyui: ComfyServer, connect: Any) -> None:
    one, other = connect(EDITOR), connect(EDITOR)
    prompt_ids = [queue(comfyui, demo(steps), line.client_id) for steps, line in ((6, one), (7, other))]
    for line, prompt_id in zip((one, other), prompt_ids):
        line.until_done(prompt_id)
        assert_only_the_picture(comfyui, prompt_id)
    shown = [[text.split(",")[0] for text in line.texts[SAMPLER]] for line in (one, other)]
    assert shown == [["6 steps"], ["7 steps"]]


def test_what_another_editor_ran_before_leaves_no_output_either(comfyui: ComfyServer, connect: Any) -> None:
    editor, program = connect(EDITOR), connect()
    prompt = demo(steps=2)
    for line in (editor, program):
        prompt_id = queue(comfyui, prompt, line.client_id)
        line.until_done(prompt_id)
        assert_only_the_picture(comfyui, prompt_id)
    assert program.frames == [] and len(editor.texts[SAMPLER]) == 1


def test_an_editor_that_comes_back_gets_its_text_again(comfyui: ComfyServer, connect: Any) -> None:
    gone = connect(EDITOR)
    prompt_id = queue(comfyui, demo(steps=150), gone.client_id)
    gone.until("progress")
    gone.close()
    back = connect(EDITOR, gone.client_id)
    back.until_done(prompt_id)
    assert gone.texts.get(SAMPLER) is None
    assert back.texts[SAMPLER][-1].startswith("150 steps, ")


def test_an_errors_own_words_reach_a_program_and_the_history(comfyui: ComfyServer, connect: Any) -> None:
    program = connect()
    prompt = demo(steps=2)
    local = {"unet_name": "sd3.5-large.safetensors", "weight_dtype": "default"}
    prompt[LOADER] = {"class_type": "UNETLoader", "inputs": local}
    prompt_id = queue(comfyui, prompt, program.client_id)
    error = program.until("execution_error")
    program.until_done(prompt_id)
    words = (
        "Parallel Sampler needs a parallel MODEL. Put Parallelize Model before it, or use KSampler, with ControlNets from "
        "ComfyUI's own loader."
    )
    assert (error["node_id"], error["exception_message"].strip()) == (SAMPLER, words)
    record = history(comfyui, prompt_id)
    (kept,) = (data for kind, data in record["status"]["messages"] if kind == "execution_error")
    assert kept["exception_message"].strip() == words
    assert record["outputs"] == {} and program.frames == []


def test_a_graph_that_cant_work_is_refused_in_the_errors_own_words(comfyui: ComfyServer) -> None:
    refused = comfyui.post("/prompt", {"prompt": demo(steps=2, tp=3)})
    errors = [error["details"] for node in refused["node_errors"].values() for error in node["errors"]]
    words = "tp=3 = 3, but the backend has 2 ranks. Choose degrees whose product is 2, or a backend of 3 ranks."
    assert errors and all(words in error for error in errors)


def test_a_program_cancels_its_prompt_and_the_next_one_gives_its_picture(comfyui: ComfyServer, connect: Any) -> None:
    program = connect()
    prompt_id = queue(comfyui, demo(steps=10000), program.client_id)
    program.until("progress")
    comfyui.post("/interrupt", {})
    assert program.until("execution_interrupted")["prompt_id"] == prompt_id
    program.until_done(prompt_id)
    record = history(comfyui, prompt_id)
    assert "execution_interrupted" in [kind for kind, _ in record["status"]["messages"]]
    assert record["outputs"] == {}
    prompt_id = queue(comfyui, demo(steps=2), program.client_id)
    program.until_done(prompt_id)
    assert_only_the_picture(comfyui, prompt_id)
