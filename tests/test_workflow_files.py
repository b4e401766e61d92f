"""`parallel-mmdit workflow`: small workflows of both forms, made parallel; and this pack's own."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from workflow_sheets import CLIP, COND, CONTROL, JSON, LATENT, MODEL, VAE, Sheet, plain, prompt, subgraph

from parallel_backend.__main__ import main
from parallel_backend.errors import InputError
from parallel_backend.workflow_files.make_parallel import NOTHING_TO_DO, Report, make_parallel
from parallel_backend.workflow_files.reading import all_graphs, workflow_in

WORKFLOWS = Path(__file__).parents[1] / "workflows"


def made(content: JSON, **options: bool) -> tuple[JSON, Report]:
    workflow = workflow_in(deepcopy(content), "the workflow")
    report = make_parallel(workflow, **options)
    if workflow.form == "editor":
        assert_whole(workflow.graph)
    return workflow.content, report


def link_ends(link: Any) -> tuple[Any, ...]:
    if isinstance(link, dict):
        return tuple(link[key] for key in ("id", "origin_id", "origin_slot", "target_id", "target_slot"))
    return tuple(link[:5])


def assert_whole(workflow: JSON) -> None:
    """Ids are unique, and both ends of each link name it."""
    ids = [node["id"] for graph in all_graphs(workflow) for node in graph["nodes"]]
    assert len(set(ids)) == len(ids)
    for graph in all_graphs(workflow):
        nodes = {node["id"]: node for node in graph["nodes"]}
        links = [link_ends(link) for link in graph["links"]]
        assert len({link[0] for link in links}) == len(links)
        for link_id, origin, slot, target, target_slot in links:
            if origin != -10:
                assert link_id in nodes[origin]["outputs"][slot]["links"]
            if target != -20:
                assert nodes[target]["inputs"][target_slot]["link"] == link_id
        known = {link[0] for link in links}
        for node in graph["nodes"]:
            named = [entry["link"] for entry in node["inputs"] if entry["link"] is not None]
            named += [link_id for output in node["outputs"] for link_id in output["links"] or []]
            assert known.issuperset(named)
        counted = [graph.get("last_node_id", 0), graph.get("state", {}).get("lastNodeId", 0)]
        assert max(counted) >= max(nodes)


def added(workflow: JSON) -> list[JSON]:
    return [node for graph in all_graphs(workflow) for node in graph["nodes"] if node["type"] == "ParallelizeModel"]


def test_a_node_is_put_on_the_wire_behind_the_loader() -> None:
    workflow, report = made(plain())
    (node,) = added(workflow)
    loader, sampler = workflow["nodes"][0], workflow["nodes"][2]
    assert loader["outputs"][0]["links"] == [node["inputs"][0]["link"]]
    assert node["outputs"][0]["links"] == [sampler["inputs"][0]["link"]]
    assert len(loader["outputs"][1]["links"]) == 1 and report.found.runs
    assert [remark.key for remark in report.changed] == ["1"] and node["id"] == 4 == workflow["last_node_id"]


def test_it_lies_on_no_other_node() -> None:
    workflow, _ = made(plain())
    (node,) = added(workflow)
    for other in workflow["nodes"][:-1]:
        apart = [abs(a - b) for a, b in zip(node["pos"], other["pos"], strict=True)]
        assert apart[0] >= 270 or apart[1] >= 76


def test_a_prompt_of_the_api_is_rewired_alone_or_inside_the_body_of_a_request() -> None:
    for content in (prompt(), {"client_id": "x", "prompt": prompt()}):
        changed, report = made(content)
        inside = changed.get("prompt", changed)
        assert inside["7"] == {
            "inputs": {"model": ["4", 0]},
            "class_type": "ParallelizeModel",
            "_meta": {"title": "Parallelize Model"},
        }
        assert inside["5"]["inputs"]["model"] == ["7", 0] and inside["5"]["inputs"]["clip"] == ["4", 1]
        assert (report.found.runs and "client_id" in changed) or changed is inside


def test_in_a_prompt_a_model_is_followed_through_inputs_of_any_name() -> None:
    switch = {"class_type": "ComfySwitchNode", "inputs": {"on_true": ["4", 0], "switch": True}}
    content = prompt() | {"8": switch}
    content["3"]["inputs"]["model"] = ["8", 0]
    content["5"]["inputs"] = {"model": ["4", 0]}
    changed, report = made(content)
    assert [remark.key for remark in report.changed] == ["4"] and not report.found.unknown
    assert changed["8"]["inputs"]["on_true"] == changed["5"]["inputs"]["model"] == ["9", 0]


def test_a_workflow_may_lie_below_its_name() -> None:
    changed, _ = made({"workflow": plain(), "other": 1})
    assert len(added(changed["workflow"])) == 1


@pytest.mark.parametrize("content", [plain(), prompt()], ids=["editor", "API"])
def test_twice_is_as_once(content: JSON) -> None:
    once, _ = made(content)
    again, report = made(once)
    assert again == once and not report.changed
    assert report.found.parallel and report.found.runs


def test_what_is_parallel_by_hand_stays_and_a_sampler_beside_it_is_named() -> None:
    sheet = Sheet()
    loader = sheet.checkpoint("sdxl.safetensors")
    parallel = sheet.add("ParallelizeModel", [MODEL], model=(loader, 0, MODEL))
    sheet.sampler(parallel, loader)
    assert not made(sheet.whole())[1].found.local
    beside = sheet.sampler(loader, loader)
    same, report = made(sheet.whole())
    assert same == sheet.whole() and [remark.key for remark in report.found.local] == [str(beside)]


@pytest.mark.parametrize("content", [plain(), prompt()], ids=["editor", "API"])
def test_a_check_changes_nothing(content: JSON) -> None:
    same, report = made(content, only_check=True)
    assert same == content and report.changed


def test_a_swapped_loader_keeps_its_file_and_its_wires() -> None:
    before = plain()
    workflow, report = made(before, swapped=True)
    loader = workflow["nodes"][0]
    assert loader["type"] == "LoadParallelCheckpoint" and loader["widgets_values"] == [
        "sd_xl_base_1.0.safetensors",
        False,
    ]
    assert workflow["links"] == before["links"] and loader["outputs"] == before["nodes"][0]["outputs"]
    assert not made(workflow, swapped=True)[1].changed and report.changed
    changed, _ = made(prompt(), swapped=True)
    assert changed["4"] == {
        "class_type": "LoadParallelCheckpoint",
        "inputs": {"ckpt_name": "sd3.5_medium.safetensors", "parallel_vae": False},
    }


def test_base_and_refiner_get_a_node_each() -> None:
    sheet = Sheet()
    base, refiner = sheet.checkpoint("sd_xl_base_1.0.safetensors"), sheet.checkpoint("sd_xl_refiner_1.0.safetensors")
    first = sheet.sampler(base, base)
    sheet.sampler(refiner, refiner, latent_image=(first, 0, LATENT))
    workflow, report = made(sheet.whole())
    assert len(added(workflow)) == len(report.changed) == 2


def test_of_two_models_only_that_of_our_families_is_taken() -> None:
    sheet = Sheet()
    ours = sheet.checkpoint("sdxl.safetensors")
    sheet.sampler(ours, ours)
    video = sheet.add("ImageOnlyCheckpointLoader", (MODEL, "CLIP_VISION", VAE), ["svd_xt.safetensors"])
    sheet.sampler(video, ours)
    workflow, report = made(sheet.whole())
    assert [node["inputs"][0]["link"] for node in added(workflow)] == [workflow["last_link_id"]]
    assert [remark.key for remark in report.found.local] == [str(video)] and report.found.runs


def test_reroutes_and_set_and_get_and_bypassed_nodes_are_passed_through() -> None:
    sheet = Sheet()
    loader = sheet.add("UNETLoader", [MODEL], ["sd3.5_large.safetensors", "default"])
    texts = sheet.add("TripleCLIPLoader", ["x", CLIP])
    reroute = sheet.add("Reroute", ["*"], x=(loader, 0, "*"))
    sheet.add("SetNode", ["*"], ["wire"], MODEL=(reroute, 0, MODEL))
    get = sheet.add("GetNode", [MODEL], ["wire"])
    off = sheet.add("FreeU_V2", [MODEL], mode=4, model=(get, 0, MODEL))
    sheet.sampler(off, texts)
    workflow, report = made(sheet.whole())
    assert [remark.key for remark in report.changed] == [str(loader)] and report.found.runs
    assert added(workflow)[0]["outputs"][0]["links"] == [1]


def test_what_is_sent_everywhere_is_sent_by_the_new_node() -> None:
    sheet = Sheet()
    loader = sheet.checkpoint("sdxl.safetensors")
    sheet.add("Anything Everywhere", anything=(loader, 0, MODEL))
    prompts = sheet.add("CLIPTextEncode", [COND], clip=(loader, 1, CLIP))
    sampler = sheet.add("KSampler", [LATENT], positive=(prompts, 0, COND))
    sheet.nodes[sampler - 1]["inputs"].append({"name": "model", "type": MODEL, "link": None})
    wire = {"downstream": sampler, "downstream_slot": 1, "upstream": str(loader), "upstream_slot": 0, "type": MODEL}
    workflow, report = made(sheet.whole() | {"extra": {"ue_links": [wire]}})
    (node,) = added(workflow)
    assert workflow["extra"]["ue_links"] == [wire | {"upstream": node["id"]}] and report.found.runs
    assert made(workflow)[0] == workflow


def test_a_loader_inside_a_subgraph_gets_its_node_there_under_an_id_that_no_graph_has() -> None:
    workflow, report = made(subgraph("sdxl.safetensors"))
    (node,) = added(workflow)
    inside = workflow["definitions"]["subgraphs"][0]
    assert node in inside["nodes"] and node["id"] == 41 and inside["state"] == {"lastNodeId": 41, "lastLinkId": 10}
    assert [remark.key for remark in report.changed] == ["1:11"] and workflow["last_node_id"] == 41
    assert made(workflow)[0] == workflow


def test_a_subgraph_that_is_used_twice_gets_its_node_once() -> None:
    content = subgraph("sdxl.safetensors")
    content["nodes"].append(deepcopy(content["nodes"][0]) | {"id": 39, "outputs": []})
    workflow, report = made(content)
    assert len(added(workflow)) == len(report.changed) == 1 and made(workflow)[0] == workflow


def test_the_file_that_a_subgraphs_node_names_counts() -> None:
    assert not made(subgraph("flux1-dev.safetensors"))[1].changed


def test_a_subgraph_that_contains_itself_is_named() -> None:
    content = subgraph("sdxl.safetensors")
    content["definitions"]["subgraphs"][0]["nodes"][0]["type"] = "11111111-2222"
    with pytest.raises(InputError, match="'Draw' contains itself"):
        made(content)


def test_a_model_in_a_pipe_is_said_with_the_setting_that_reaches_it() -> None:
    sheet = Sheet()
    pipe = sheet.add("ttN pipeLoader", ["PIPE_LINE", MODEL, VAE], ["sdxl.safetensors"])
    masks = sheet.add("SamLoaderOfAPack", ["SAM_PIPE"], ["sam_vit_b.pth"])
    decoded = sheet.add("DecoderOfAPack", [LATENT], vae=(pipe, 2, VAE))
    others = {"sam": (masks, 0, "SAM_PIPE"), "latent": (decoded, 0, LATENT)}
    sheet.add("ttN pipeKSampler", ["PIPE_LINE"], pipe=(pipe, 0, "PIPE_LINE"), **others)
    same, report = made(sheet.whole())
    assert same == sheet.whole() and not report.found.runs and report.found.runs_with_setting
    assert [remark.key for remark in report.found.hidden] == [str(pipe)] and not report.found.unknown
    assert "PARALLEL_MMDIT_EVERYWHERE=1" in report.found.hidden[0].why
    wire = sheet.add("CLIPTextEncode", [COND])
    sheet.add("KSampler", [LATENT], model=(pipe, 1, MODEL), positive=(wire, 0, COND))
    report = made(sheet.whole())[1]
    assert [len(entries) for entries in (report.changed, report.found.hidden)] == [1, 1]


def test_an_old_group_node_that_keeps_its_model_is_said_so() -> None:
    sheet = Sheet()
    group = sheet.add("workflow/Draw", [LATENT], ["sdxl.safetensors"])
    sheet.add("SaveLatent", samples=(group, 0, LATENT))
    members = {"nodes": [{"type": "CheckpointLoaderSimple"}, {"type": "KSampler"}, {"type": "TGateApply"}]}
    report = made(sheet.whole() | {"extra": {"groupNodes": {"Draw": members}}})[1]
    assert "turn the group into nodes first" in report.found.hidden[0].why
    assert ["attention and blocks" in remark.why for remark in report.found.refused] == [True]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("ScaleROPE", "attention and blocks"),
        ("TorchCompileModel", "`compile` of Mesh Config"),
        ("SeamlessTile", "network's own layers"),
        ("TGateApply", "attention and blocks"),
        ("TeaCache", "Step Cache (Parallel) work"),
        ("LLLiteLoader", "attention and blocks"),
        ("SUPIRApply", "network's own layers"),
    ],
)
def test_what_hangs_on_the_model_and_cant_be_honoured_is_named(kind: str, words: str) -> None:
    sheet = Sheet()
    loader = sheet.checkpoint("sdxl.safetensors")
    patched = sheet.add(kind, [MODEL], model=(loader, 0, MODEL))
    sheet.sampler(patched, loader)
    workflow, report = made(sheet.whole())
    assert len(added(workflow)) == 1 and not report.found.runs
    assert [(remark.key, remark.class_type) for remark in report.found.refused] == [(str(patched), kind)]
    assert words in report.found.refused[0].why


@pytest.mark.parametrize(
    "kind",
    [
        *("IPAdapterAdvanced", "ApplyInstantID", "ApplyPulid", "FreeU_V2", "NAGuidance", "SkipLayerGuidanceSD3"),
        *(
            "ApplyRAUNetSimple",
            "ApplyMSWMSAAttention",
            "PLADIS",
            "NAGCFGGuider",
            "FreeU2PPM",
            "KSamplerWithNAG (Advanced)",
        ),
        *("TomePatchModel", "TGateApplySimple", "ReferenceOnlySimple", "StyleAlignedBatchAlign"),
    ],
)
def test_what_hangs_inside_the_model_and_ranks_know_runs(kind: str) -> None:
    sheet = Sheet()
    loader = sheet.checkpoint("sdxl.safetensors")
    sheet.sampler(sheet.add(kind, [MODEL], model=(loader, 0, MODEL)), loader)
    report = made(sheet.whole())[1]
    assert report.found.runs and report.changed and not report.found.unknown and not report.found.refused


@pytest.mark.parametrize(
    "kind",
    [
        *("ControlNetApply", "ControlNetApplyAdvanced", "ControlNetApplySD3", "ControlNetInpaintingAliMamaApply"),
        *("ACN_AdvancedControlNetApply_v2", "ApplyInstantIDControlNet", "CR Apply Multi-ControlNet"),
    ],
)
def test_a_controlnet_on_the_prompt_runs(kind: str) -> None:
    sheet = Sheet()
    loader, net = sheet.checkpoint("sdxl.safetensors"), sheet.add("ControlNetLoader", [CONTROL], ["union.safetensors"])
    typed = sheet.add("SetUnionControlNetType", [CONTROL], ["depth"], control_net=(net, 0, CONTROL))
    wires = {"conditioning": (sheet.add("CLIPTextEncode", [COND]), 0, COND), "control_net": (typed, 0, CONTROL)}
    sheet.sampler(loader, loader, positive=(sheet.add(kind, [COND], **wires), 0, COND))
    report = made(sheet.whole())[1]
    assert report.found.runs and report.changed and not report.found.unknown


@pytest.mark.parametrize("form", ["editor", "API"])
def test_a_controlnet_that_patches_attention_is_named_and_one_of_another_model_is_not(form: str) -> None:
    reference = "ACN_ReferenceControlNet"
    if form == "API":
        content = prompt() | {"8": {"class_type": reference, "inputs": {}}}
        wires = {"positive": ["6", 0], "negative": ["6", 0], "control_net": ["8", 0]}
        content["7"] = {"class_type": "ACN_AdvancedControlNetApply_v2", "inputs": wires}
        content["3"]["inputs"]["positive"] = ["7", 0]
        assert [remark.class_type for remark in made(content)[1].found.refused] == [reference]
        return
    sheet = Sheet()
    flux, ours = sheet.checkpoint("flux1-dev.safetensors"), sheet.checkpoint("sdxl.safetensors")
    wires = {"conditioning": (sheet.add("CLIPTextEncode", [COND]), 0, COND)}
    wires["control_net"] = (net := sheet.add(reference, [CONTROL]), 0, CONTROL)
    control = sheet.add("ACN_AdvancedControlNetApply", [COND], **wires)
    first = sheet.sampler(flux, flux, positive=(control, 0, COND))
    sheet.sampler(ours, ours, latent_image=(first, 0, LATENT))
    assert made(sheet.whole())[1].found.runs
    sheet.sampler(ours, ours, negative=(control, 0, COND))
    assert [remark.key for remark in made(sheet.whole())[1].found.refused] == [str(net)]


def test_a_class_that_nobody_knows_is_told_and_not_refused() -> None:
    content = prompt() | {"3": {"class_type": "SamplerOfAPack", "inputs": {"model": ["5", 0], "positive": ["6", 0]}}}
    report = made(content)[1]
    assert [remark.class_type for remark in report.found.unknown] == ["SamplerOfAPack"] and report.found.runs


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("sd3.5_large_fp8_scaled.safetensors", ""),
        ("sd3.5_large-Q4_0.gguf", ""),
        ("svdq-int4-sdxl.safetensors", "SVDQuant"),
        ("sdxl-nf4.safetensors", ""),
        ("SDXL\\old.ckpt", ""),
        ("cosxl_edit.safetensors", ""),
        ("playground-v2.5-1024px-aesthetic.fp16.safetensors", ""),
        ("sd_xl_base_1.0_inpainting_0.1.safetensors", ""),
        ("SDXL/iclight_fbc.safetensors", "changes the network's own layers"),
        ("sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors", ""),
        ("dreamshaperXL_v2-1.safetensors", ""),
        ("SDXL\\name.safetensors", ""),
    ],
)
def test_a_file_that_cant_be_taken_is_told_by_its_name(file: str, words: str) -> None:
    workflow, report = made(plain(file))
    assert len(added(workflow)) == 1
    assert [words in remark.why for remark in report.found.refused] == ([True] if words else [])
    assert any("as Windows does" in note for note in report.found.notes) == ("\\" in file)


@pytest.mark.parametrize(
    "file",
    [
        *(
            "flux1-dev-fp8.safetensors",
            "wan2.1_t2v_14B.safetensors",
            "z_image_turbo.safetensors",
            "v1-5-pruned.safetensors",
        ),
        *("ltx-video-2b.safetensors", "ace_step_v1_3.5b.safetensors", "v2-1_768-ema-pruned.safetensors"),
    ],
)
def test_a_workflow_of_another_family_is_left_alone(file: str) -> None:
    content = plain(file)
    same, report = made(content)
    assert same == content and not report.found.concerns_us and NOTHING_TO_DO in report.lines()


def test_other_nodes_tell_the_family_where_the_file_doesnt() -> None:
    sheet = Sheet()
    loader = sheet.add("UNETLoader", [MODEL], ["mine.safetensors"])
    texts = sheet.add("CLIPLoader", ["x", CLIP], ["t5.safetensors", "wan", "default"])
    sheet.sampler(loader, texts)
    assert not made(sheet.whole())[1].changed
    sheet.nodes[1]["widgets_values"][1] = "sd3"
    report = made(sheet.whole())[1]
    assert report.changed and not report.found.notes
    sheet.nodes[1]["widgets_values"][1] = "stable_diffusion"
    report = made(sheet.whole())[1]
    assert report.changed and "Nothing tells the family" in report.found.notes[0]


def test_a_model_that_nothing_samples_is_left_alone() -> None:
    sheet = Sheet()
    loader = sheet.checkpoint("sdxl.safetensors")
    sheet.add("ModelSave", model=(loader, 0, MODEL))
    assert not made(sheet.whole())[1].found.concerns_us


def test_the_command_writes_a_copy_beside_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "draw.json"
    file.write_text(json.dumps(plain(), indent=2))
    before = file.read_text()
    assert main(["workflow", "--check", str(file)]) == 0 and list(tmp_path.iterdir()) == [file]
    assert main(["workflow", str(file)]) == 0
    assert len(added(json.loads((tmp_path / "draw-parallel.json").read_text()))) == 1 and file.read_text() == before
    assert main(["workflow", str(file), "-o", str(file)]) == 2 and file.read_text() == before
    assert "is the workflow itself" in capsys.readouterr().err


def test_the_commands_status_and_last_line_say_how_many_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents = {
        "a": plain(),
        "b": prompt("svdq-int4-sdxl.safetensors"),
        "c": plain("flux1.safetensors"),
        "d": [],
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert main(["workflow", "--check", str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 of 2 run; files without a model of SD3 or SDXL: 1."
    (tmp_path / "broken.json").write_text('{"nodes": [')
    assert main(["workflow", str(tmp_path / "broken.json")]) == 2
    assert main(["workflow", str(tmp_path / "missing.json")]) == 2
    assert "is not JSON" in (told := capsys.readouterr().err) and "is not there" in told


@pytest.mark.parametrize(
    "path",
    sorted([*WORKFLOWS.glob("*.json"), *WORKFLOWS.glob("api/*.json")]),
    ids=lambda p: str(p.relative_to(WORKFLOWS)),
)
def test_this_packs_own_workflows_run_and_are_parallel_already(path: Path) -> None:
    content = json.loads(path.read_text())
    same, report = made(content)
    assert same == content and report.found.runs and report.found.parallel and not report.found.unknown
