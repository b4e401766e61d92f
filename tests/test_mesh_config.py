"""Mesh Config in a real ComfyUI: its inputs' order and help page, its picture's route, and displaced steps that its mesh asks for."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui.prompts import Link, Prompt, mesh, out
from comfyui.server import PACK, ComfyServer
from test_comfyui_nodes import latent_of, parallel_model, picture
from test_unet_comfyui import picture as unet_picture
from test_unet_comfyui import unet
from torch import Tensor

from parallel_backend.small_checkpoints.unet import write_unet
from parallel_training.unet import CONFIG

ORDER = (
    *("ranks", "method", "dtype"),
    *("warmup_steps", "cfg", "ulysses", "ring", "tp", "pp", "patch", "sliced", "dp"),
    *("device", "devices", "attention", "compile", "graphs", "nan_is_error", "memory_budget_mib", "idle_minutes"),
    *("backend", "address", "keys"),
)
COMMON = 3


def inputs(server: ComfyServer) -> dict[str, Any]:
    """By name what the editor is told of each, in the order of its form."""
    groups = server.get("/object_info/MeshConfig")["MeshConfig"]["input"]
    return {name: spec for group in ("required", "optional") for name, spec in groups.get(group, {}).items()}


def test_what_everyone_sets_comes_first_and_the_connection_last(server: ComfyServer) -> None:
    found = inputs(server)
    assert tuple(found) == ORDER
    assert found["ranks"][0] == "INT" and found["ranks"][1]["display_name"] == "ranks (0: auto)"
    advanced = [name for name, spec in found.items() if spec[1].get("advanced")]
    assert tuple(advanced) in (ORDER[COMMON:], ())  # of a core that knows no advanced inputs, none


def test_the_help_page_names_every_input_in_the_order_of_the_form(server: ComfyServer) -> None:
    page = (PACK / "nodes" / "web" / "docs" / "MeshConfig.md").read_text()
    named = [name for name in re.findall(r"^\| ([^|]+?) \|", page, re.M) if name not in ("input", "---")]
    assert tuple(named) == tuple(inputs(server))


def mesh_answer(server: ComfyServer, body: bytes, **headers: str) -> tuple[int, Any]:
    headers = {"Content-Type": "application/json"} | headers
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}/parallel_mmdit/mesh", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as refused:
        return refused.code, json.loads(refused.read() or b"null")


def of_mesh(server: ComfyServer, **settings: Any) -> Any:
    status, answer = mesh_answer(server, json.dumps({"device": "cpu"} | settings).encode())
    assert status == 200
    return answer


def axes(**degrees: int) -> list[dict[str, Any]]:
    return [{"name": name, "size": size} for name, size in degrees.items()]


def test_the_route_tells_the_mesh_of_each_kind_of_model_and_starts_nothing(server: ComfyServer) -> None:
    before = generations(server)
    answer = of_mesh(server, ranks=8, backend="unstarted")
    assert answer["mmdit"] == {"axes": axes(cfg=2, ulysses=4), "describe": "cfg=2 ulysses=4", "note": ""}
    assert answer["unet"]["axes"] == axes(cfg=2, patch=4)
    assert (answer["ranks"], answer["places"], answer["note"]) == (8, ["cpu"] * 8, "")
    displaced = of_mesh(server, ranks=2, method="displaced")
    assert displaced["mmdit"]["axes"] == axes(pp=2) and "PipeFusion" in displaced["mmdit"]["note"]
    assert displaced["unet"] == {"axes": axes(patch=2), "describe": "patch=2", "note": ""}
    assert of_mesh(server, ranks=1)["mmdit"]["axes"] == []
    assert generations(server) == before


def generations(server: ComfyServer) -> dict[str, str]:
    """Of the backends that run, by name."""
    return {one["name"]: one["generation"] for one in server.get("/parallel_mmdit/status")["backends"]}


def test_the_route_takes_the_nodes_own_defaults(server: ComfyServer) -> None:
    defaults = {name: spec[1]["default"] for name, spec in inputs(server).items()}
    assert of_mesh(server) == of_mesh(server, **defaults | {"device": "cpu"})
    elsewhere = of_mesh(server, ranks=2, address="tcp://10.0.0.1:5555", keys="/nowhere")
    assert elsewhere["places"] == [] and elsewhere["mmdit"]["describe"] == "cfg=2"


@pytest.mark.parametrize(
    ("settings", "message", "remedy"),
    [
        ({"ranks": 4, "ulysses": 3}, "ulysses=3 * tp=1 = 3, but the backend has 4 ranks", "product is 4"),
        ({"ranks": 4, "cfg": 3}, "cfg=3 is not possible", "Give 0 to 2"),
        ({"ranks": 2, "device": "cpu", "devices": "a"}, "devices 'a' is not a list", "like 0,1,3"),
        ({"ranks": 1, "method": "displaced"}, "Displaced steps need two or more ranks", "method to exact"),
        ({"ranks": 2, "method": "displaced", "cfg": 2}, "the mesh is cfg=2", "cfg 1"),
        ({"ranks": 10**9, "device": "cpu"}, "ranks=1000000000 is not possible", "Give 0 to 256"),
        ({"ranks": 2, "method": "stale"}, "Method 'stale' is not known", "exact, displaced"),
    ],
)
def test_values_that_do_not_fit_are_told_with_the_remedy_and_refused_when_queued(
    settings: dict[str, Any], message: str, remedy: str, server: ComfyServer
) -> None:
    error = of_mesh(server, **settings)["error"]
    assert error["code"] == "config" and message in error["message"] and remedy in error["remedy"]
    prompt = Prompt()
    loaded = prompt.add("LoadParallelMMDiT", model_name="sd3.5-medium.safetensors", mesh=mesh(prompt, **settings))
    prompt.add("ProbeModelClass", model=out(loaded))
    refused = server.post("/prompt", {"prompt": prompt.nodes})
    assert message in json.dumps(refused).replace('\\"', '"'), refused


def test_a_kind_of_model_that_a_mesh_is_not_for_is_said_beside_the_other(server: ComfyServer) -> None:
    answer = of_mesh(server, ranks=4, patch=4)
    assert "patch=4 can't be used on an MMDiT" in answer["mmdit"]["error"]["message"]
    assert "error" not in answer["unet"]
    answer = of_mesh(server, ranks=2, pp=2, method="displaced")
    assert "pp=2 can't be used on a UNet" in answer["unet"]["error"]["message"] and "error" not in answer["mmdit"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[1", "is not JSON"),
        (b"[]", "no object"),
        (b'{"rank": 4}', "no input 'rank'"),
        (b'{"ranks": "4"}', "ranks='4' is no int"),
        (b'{"ranks": true}', "ranks=True is no int"),
    ],
)
def test_what_is_no_set_of_its_values_is_refused(body: bytes, message: str, server: ComfyServer) -> None:
    status, answer = mesh_answer(server, body)
    assert status == 400 and answer["error"]["code"] == "input" and message in answer["error"]["message"]


def test_a_page_of_another_origin_is_told_nothing(server: ComfyServer) -> None:
    status, _ = mesh_answer(server, b"{}", **{"Sec-Fetch-Site": "cross-site"})
    assert status == 403


NARROW = "narrow.safetensors"
# Degrees of two ranks, by kind of model and what is displaced on them.
SUBJECTS = {"mmdit pp": {"pp": 2}, "mmdit ring": {"ring": 2}, "unet patch": {"patch": 2}}


@pytest.fixture(scope="module")
def drawing(server: ComfyServer, comfy_backend: str, models: Path) -> ComfyServer:
    """A ComfyUI with a model of each kind, and a backend."""
    write_unet(models / "diffusion_models" / NARROW, CONFIG)
    return server


def on_mesh(prompt: Prompt, subject: str, **settings: Any) -> Link:
    """The subject's MODEL, with the settings of its Mesh Config."""
    settings = SUBJECTS[subject] | {"cfg": 1} | settings
    if subject.startswith("unet"):
        return unet(prompt, NARROW, **settings)
    return parallel_model(prompt, **settings)


def saved(prompt: Prompt, subject: str, model: Link, node: str = "KSampler", **settings: Any) -> str:
    if subject.startswith("unet"):
        return unet_picture(prompt, node, model, steps=5, **settings)
    return picture(prompt, node, model, "displaced", steps=5, **settings)


Draw = Callable[[Prompt, str], str]


def exact(prompt: Prompt, subject: str) -> str:
    return saved(prompt, subject, on_mesh(prompt, subject))


def by_mesh(prompt: Prompt, subject: str) -> str:
    return saved(prompt, subject, on_mesh(prompt, subject, method="displaced", warmup_steps=2))


def by_mesh_a_step_sooner(prompt: Prompt, subject: str) -> str:
    return saved(prompt, subject, on_mesh(prompt, subject, method="displaced", warmup_steps=1))


def by_node(prompt: Prompt, subject: str) -> str:
    model = out(prompt.add("DisplacedSteps", model=on_mesh(prompt, subject), warmup_steps=2))
    return saved(prompt, subject, model)


def by_node_on_a_displaced_mesh(prompt: Prompt, subject: str) -> str:
    model = on_mesh(prompt, subject, method="displaced", warmup_steps=1)
    return saved(prompt, subject, out(prompt.add("DisplacedSteps", model=model, warmup_steps=2)))


def by_sampler_on_a_displaced_mesh(prompt: Prompt, subject: str) -> str:
    model = on_mesh(prompt, subject, method="displaced", warmup_steps=1)
    return saved(prompt, subject, model, "ParallelSampler", displaced=True, warmup_steps=2)


def by_mesh_under_a_sampler_that_does_not_ask(prompt: Prompt, subject: str) -> str:
    model = on_mesh(prompt, subject, method="displaced", warmup_steps=2)
    return saved(prompt, subject, model, "ParallelSampler", displaced=False, warmup_steps=4)


def by_parallelize_model(prompt: Prompt, subject: str) -> str:
    """Onto another mesh than its loader's, which asks otherwise."""
    model = on_mesh(prompt, subject, method="displaced", warmup_steps=1)
    degrees = SUBJECTS[subject] | {"cfg": 1, "method": "displaced", "warmup_steps": 2}
    return saved(prompt, subject, out(prompt.add("ParallelizeModel", model=model, mesh=mesh(prompt, **degrees))))


def by_a_node_before_parallelize_model(prompt: Prompt, subject: str) -> str:
    model = out(prompt.add("DisplacedSteps", model=on_mesh(prompt, subject), warmup_steps=2))
    degrees = SUBJECTS[subject] | {"cfg": 1, "method": "displaced", "warmup_steps": 1}
    return saved(prompt, subject, out(prompt.add("ParallelizeModel", model=model, mesh=mesh(prompt, **degrees))))


def exact_by_parallelize_model(prompt: Prompt, subject: str) -> str:
    """A mesh asks for none: what another one has asked for does not stay."""
    model = on_mesh(prompt, subject, method="displaced", warmup_steps=1)
    given = mesh(prompt, **SUBJECTS[subject] | {"cfg": 1})
    return saved(prompt, subject, out(prompt.add("ParallelizeModel", model=model, mesh=given)))


def drawn(server: ComfyServer, draw: Draw, subject: str) -> Tensor:
    prompt = Prompt()
    node = draw(prompt, subject)
    return latent_of(server, server.run(prompt.nodes), node)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_mesh_asks_for_the_steps_that_the_node_asks_for(subject: str, drawing: ComfyServer) -> None:
    displaced, plain = drawn(drawing, by_node, subject), drawn(drawing, exact, subject)
    assert (displaced - plain).abs().max() > 1e-4
    assert torch.equal(drawn(drawing, by_mesh, subject), displaced)
    assert not torch.equal(drawn(drawing, by_mesh_a_step_sooner, subject), displaced)


@pytest.mark.parametrize(
    "draw",
    [
        by_node_on_a_displaced_mesh,
        by_sampler_on_a_displaced_mesh,
        by_mesh_under_a_sampler_that_does_not_ask,
        by_parallelize_model,
        by_a_node_before_parallelize_model,
    ],
    ids=lambda draw: draw.__name__,
)
def test_what_a_node_asks_for_goes_before_what_the_mesh_does(draw: Draw, drawing: ComfyServer) -> None:
    assert torch.equal(drawn(drawing, draw, "mmdit ring"), drawn(drawing, by_node, "mmdit ring"))


def test_an_exact_mesh_takes_back_what_another_mesh_has_asked_for(drawing: ComfyServer) -> None:
    assert torch.equal(drawn(drawing, exact_by_parallelize_model, "mmdit ring"), drawn(drawing, exact, "mmdit ring"))


def test_the_mesh_that_is_chosen_for_displaced_steps_is_said_on_the_nodes(drawing: ComfyServer) -> None:
    prompt = Prompt()
    left_open = {"pp": 1, "cfg": 0, "dp": 0, "method": "displaced", "warmup_steps": 1}
    saved(prompt, "mmdit pp", on_mesh(prompt, "mmdit pp", **left_open))
    outcome = drawing.run(prompt.nodes)
    assert outcome.error is None, outcome.error
    config, loader = (
        next("\n".join(outcome.texts[i]) for i, node in prompt.nodes.items() if node["class_type"] == kind)
        for kind in ("MeshConfig", "LoadParallelMMDiT")
    )
    assert "2 ranks on cpu: pp=2 (UNet: patch=2), float32, displaced after 1 exact steps" in config
    assert "displaced steps on pp, where nothing was said of it (PipeFusion)" in config and "PipeFusion" in loader


@pytest.mark.parametrize(
    ("subject", "settings", "words"),
    [
        ("mmdit pp", {"pp": 1, "patch": 2}, "An MMDiT has displaced steps on two or more pp or ring ranks"),
        ("unet patch", {"patch": 1, "pp": 2}, "A UNet has displaced steps on two or more patch ranks"),
    ],
)
def test_a_model_that_has_no_displaced_steps_on_the_mesh_is_refused_before_it_is_read(
    subject: str, settings: dict[str, Any], words: str, drawing: ComfyServer
) -> None:
    prompt = Prompt()
    saved(prompt, subject, on_mesh(prompt, subject, method="displaced", **settings))
    assert words in drawing.run(prompt.nodes).message


def test_a_loop_that_the_backend_does_not_run_is_refused_with_the_way_out(drawing: ComfyServer) -> None:
    prompt = Prompt()
    model = on_mesh(prompt, "mmdit ring", method="displaced")
    saved(prompt, "mmdit ring", out(prompt.add("Mahiro", model=model)))
    message = drawing.run(prompt.nodes).message
    assert "Displaced steps can't honour model option" in message and "method exact in Mesh Config" in message
