"""Where ranks share a GPU with ComfyUI: whose models leave when room is short, what is counted, and the dtype that both take."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from comfyui.core_run import run_script
from comfyui.installation import HERE, ComfyInstallation

from parallel_backend.client import dtypes
from parallel_backend.rank import place
from parallel_backend.rpc.state import RankState

BOTH = {"said": "", "loaded": ["Held", "ModelPatcher"]}


@pytest.fixture(scope="module")
def outcomes(comfy: ComfyInstallation, models: Path) -> dict[str, Any]:
    model = models / "diffusion_models" / "sd3.5-medium.safetensors"
    return json.loads(run_script(comfy, "room.py", HERE.parents[1], model, seconds=180).splitlines()[-1])


def test_comfyuis_own_models_leave_when_a_rank_lacks_room_and_only_then(outcomes: dict[str, Any]) -> None:
    rooms = dict(outcomes["rooms"])
    short = rooms.pop("short")
    assert len(rooms) == 5 and all(room == BOTH for room in rooms.values()), rooms
    assert short["loaded"] == ["Held"], "what a backend holds is not ComfyUI's own"
    assert "11776 MiB are needed for rank 3 on cuda:0 (2048 MiB free)" in short["said"]


def test_a_request_without_memory_is_made_again_once_comfyuis_own_models_have_left(outcomes: dict[str, Any]) -> None:
    assert outcomes["again"] == {"said": "done", "held": [2, 1]}
    assert outcomes["in vain"] == {"said": "no memory", "held": [1]}, "nothing was left to make room with"
    assert outcomes["of others"] == {"said": "no memory", "held": [2]}, "no rank is on ComfyUI's device"


def test_comfyui_counts_weights_in_a_backend_once_and_asks_them_to_leave_once(outcomes: dict[str, Any]) -> None:
    assert outcomes["counted"] == [1, 100] and outcomes["beside"]
    assert outcomes["loads"] == [], "a backend that has just loaded them is not asked to"
    assert outcomes["events"] == ["a leaves", "a is back"]


def test_a_backend_that_cant_let_go_raises_nothing_into_comfyui_and_its_weights_still_count(
    outcomes: dict[str, Any],
) -> None:
    assert outcomes["ends"] == {"interrupted": [True, 2**30, 0], "closed": [False, 2**30, 0]}


def test_weights_that_left_without_comfyuis_doing_are_loaded_again_for_the_next_use(outcomes: dict[str, Any]) -> None:
    assert outcomes["gone"] == {"kept": [2**30], "lost": ["a is back", 2**30], "silent": [2**30]}


def test_a_model_of_a_backend_leaves_room_to_another_of_the_same_by_the_ranks_choice_alone(
    outcomes: dict[str, Any],
) -> None:
    assert {how: outcomes["neighbours"][how] for how in ("same", "another")} == {"same": [], "another": ["a leaves"]}


def test_comfyui_makes_room_for_what_ranks_compute_on_its_own_gpu(outcomes: dict[str, Any]) -> None:
    assert outcomes["neighbours"]["activations"]


def test_comfyuis_free_empties_its_own_backends_alone(outcomes: dict[str, Any]) -> None:
    assert outcomes["own backends"] == ["mine"]


def rank_on(name: str, capability: tuple[int, int]) -> RankState:
    return RankState(0, "", "", 0, "cuda:0", name, 0, 0, 0, "", capability)


def test_dtype_auto_is_what_comfyui_computes_in_on_the_same_card(outcomes: dict[str, Any]) -> None:
    taken = set()
    for card in outcomes["dtypes"]:
        ranks = [rank_on(card["name"], tuple(card["capability"]))]
        assert set(card["models"].values()) == {dtypes.model_dtype(ranks)}, card
        assert card["vae"] == dtypes.vae_dtype(ranks), card
        taken |= {dtypes.model_dtype(ranks), card["vae"]}
    assert taken == {"float16", "bfloat16", "float32"} and len(outcomes["dtypes"]) == 14


def test_no_amd_card_that_comfyui_spares_bfloat16_takes_it_here(
    outcomes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    cards = [SimpleNamespace(gcnArchName=arch) for arch in outcomes["without bfloat16"]]
    assert len(cards) > 5 and not any(map(place.has_bfloat16, cards))


def test_the_weakest_rank_decides_the_dtype() -> None:
    pascal, turing, hopper = (rank_on("", capability) for capability in ((6, 1), (7, 5), (9, 0)))
    cpu = RankState(0, "", "", 0, "cpu", "2 threads", 0, 0, 0)
    found = [dtypes.model_dtype(ranks) for ranks in ([hopper, turing], [hopper, pascal], [cpu, cpu])]
    assert found == ["float16", "float32", "float32"]
    assert [dtypes.vae_dtype(ranks) for ranks in ([hopper], [hopper, turing])] == ["bfloat16", "float32"]
    navi = msgspec.structs.replace(rank_on("AMD Radeon RX 6800", (10, 3)), bfloat16=False)
    assert (dtypes.model_dtype([navi]), dtypes.vae_dtype([navi])) == ("float16", "float32")
    scratch = [dtypes.model_dtype(ranks, from_scratch=True) for ranks in ([hopper], [hopper, turing])]
    assert scratch == ["bfloat16", "float32"]


def test_a_dtype_that_comfyui_was_started_with_goes_before_the_cards(outcomes: dict[str, Any]) -> None:
    assert outcomes["told"] == {
        "None": ["auto", "for vae"],
        "bf16_unet": ["bfloat16", "for vae"],
        "fp32_vae": ["auto", "float32"],
        "fp16_vae": ["auto", "float16"],
        "force_fp32": ["float32", "float32"],
        "force_fp16": ["float16", "for vae"],
        "fp8_e5m2_unet": ["float8_e5m2", "for vae"],
        "asked": ["float16", "float16"],
        "fp8": ["fp8", "for vae"],
        "computed in": {
            "bf16_unet": ["bfloat16", "auto"],
            "force_fp32": ["float32", "float32"],
            "force_fp16": ["float16", "float16"],
        },
        "told": [
            "",
            "ComfyUI's --fp64-unet is not heeded: ranks hold weights in float32, float16, bfloat16, float8_e4m3fn or "
            "float8_e5m2, or as the file has them quantised.",
        ],
        "products": [
            {"fast_fp8": True, "has_fp8": False},
            {"fast_fp8": False, "has_fp8": False},
            {"fast_fp8": True, "has_fp8": True},
        ],
    }


def test_fp8_of_a_loader_is_heeded_where_mesh_config_leaves_it_open_and_does_not_compile(
    outcomes: dict[str, Any],
) -> None:
    asked = outcomes["asked"]
    assert {case: found[0] for case, found in asked.items()} == {
        "auto False torch.float8_e4m3fn": "float8_e4m3fn",
        "auto True torch.float8_e4m3fn": "auto",
        "fp8 True torch.float8_e4m3fn": "fp8",
        "bfloat16 False torch.float8_e5m2": "bfloat16",
    }
    unheeded = [case for case, (_, said) in asked.items() if "float8_e4m3fn is not heeded: compile" in said]
    assert unheeded == ["auto True torch.float8_e4m3fn"]


def test_every_model_is_parallel_from_the_start_where_the_variable_or_the_stored_setting_says_so(
    outcomes: dict[str, Any],
) -> None:
    said = outcomes["everywhere"]
    refused = {key: text for key, text in said.items() if key.startswith("yes")}
    assert len(refused) == 4 and all("='yes' means nothing" in text for text in refused.values())
    on = {key for key in said.keys() - refused.keys() if said[key]}
    assert on == {'{"ParallelMMDiT.Everywhere": true}', *(key for key in said if key.startswith("1"))}
    assert len(said) == 16
