"""A parallel MODEL as ComfyUI and its nodes see it: the network is of core's own class, and what they change on it is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from comfyui.core_run import run_script
from comfyui.installation import HERE, ComfyInstallation

from parallel_backend.small_checkpoints.unet import CONFIGS, write_unet

MMDIT, UNET = "OpenAISignatureMMDITWrapper", "UNetModel"
CLASSES = {"sd3-medium": MMDIT, "sd3.5-medium": MMDIT, "sd3.5-large": MMDIT, "sdxl-koala": UNET, "unet-tiny": UNET}
# What does more than hand on, around the forward of all transformer blocks.
AROUND = (
    *("without_options", "twice", "doubled", "where_it_is_small", "of_tensors", "by_a_flag", "whatever_fails"),
    *("round_and_round", "a change within"),
)
REFUSED = {
    "SeamlessTile": "the changed padding_mode of input_blocks.0.0; the changed padding_mode of",
    "Asymmetric Tiled KSampler": "the replaced _conv_forward of input_blocks.0.0",
    "TGate": "the replaced _forward of input_blocks.3.1.transformer_blocks.0",
    "NAG": "computes with the layer input_blocks.3.1.transformer_blocks.0.attn2.to_k",
    "forward": "the replaced forward of the network",
    "layer's forward": "the replaced forward of input_blocks.1.0; put there by __main__.",
    "made of text": "the replaced forward of input_blocks.1.0; put there by code without a module",
    "hook": "a forward hook of input_blocks.1.0.",
    "pre-hook": "a forward pre-hook of the network",
    "class": "the replaced class of input_blocks.1.0 (Other)",
    "all of a class": "the replaced forward of all ResBlock layers, until ComfyUI restarts without it",
    "all of a class, before": "the replaced forward of all ResBlock layers, until ComfyUI restarts without it; put there by __main__.",
    **dict.fromkeys(
        [f"all blocks, {change}" for change in AROUND],
        "the replaced forward of all BasicTransformerBlock layers, until ComfyUI restarts without it; put there by __main__.",
    ),
    "all of a class, of what it is made from": "the replaced forward of all Linear layers, until ComfyUI restarts without it",
    "layer": "the replaced layer input_blocks.1.",
    "weight": "the replaced weight of out.2",
    "network": "the replaced diffusion_model (Identity)",
    "apply_model": "the replaced apply_model of the model",
    "object patch": "the object patch 'apply_model'",
    "by outer_sample": "the changed padding_mode of x_embedder.proj",
    "by sampler_sample": "the changed padding_mode of x_embedder.proj",
    "by diffusion_model": "the changed padding_mode of input_blocks.0.0",
    "compute dtype": "computing in bfloat16 (ModelComputeDtype), where its ranks compute in float32",
    "compiled": "torch.compile of the network (TorchCompileModel). Remove that node; Mesh Config",
    "SLG": "the layers 99 of skip-layer guidance: this model's are 0 to",
    "SLG of DiT": "the layers 99 of skip-layer guidance: this model's are 0 to",
    "named as PAG's": "the attn1 patch at middle 0 by PerturbedAttentionGuidance.execute.<locals>.perturbed_attention of nodes_pag",
    "a pack's": "Guided of __main__ (sampler_post_cfg_function), which patches blocks",
}
NOTHING = ("nothing", *(f"nothing, {how}" for how in ("by LayerDiffuse", "by several", "by name", "between")))
# Between the first evaluation and the second.
REFUSED_LATER = {
    **{name: REFUSED[name] for name in ("layer's forward", "hook", "all of a class")},
    "pre-hook": "a forward pre-hook of x_embedder",
    **dict.fromkeys(NOTHING, "nothing"),
}


@pytest.fixture(scope="module")
def outcomes(comfy: ComfyInstallation, unets: Path) -> dict[str, Any]:
    if not (koala := unets / "sdxl-koala.safetensors").exists():
        write_unet(koala, CONFIGS["koala"], "single file")
    return json.loads(run_script(comfy, "network.py", HERE.parents[1], unets, seconds=180).splitlines()[-1])


def alike(name: str) -> dict[str, Any]:
    mmdit = CLASSES[name] == MMDIT
    expected = {
        "class": CLASSES[name],
        "in_channels": 16 if mmdit else 4,
        "has": [not mmdit, mmdit, False],
        "default": "default",
        "devices": ["meta"],
        "size": 1,
    }
    if name != "unet-tiny":  # at widths that ComfyUI's own loaders have no name for
        expected |= {"instance": True, "names and shapes": True, "modules": True}
    return expected


@pytest.mark.parametrize("name", CLASSES)
def test_the_network_is_of_comfyuis_class_with_its_names_and_shapes_and_takes_no_memory(
    name: str, outcomes: dict[str, Any]
) -> None:
    assert outcomes["alike"][name] == alike(name)


def test_so_it_is_where_comfyuis_layers_start_without_weights(outcomes: dict[str, Any]) -> None:
    lazy = outcomes["lazy"]
    if isinstance(lazy, str):
        pytest.skip(lazy)
    assert lazy == alike("sd3.5-medium")


@pytest.mark.parametrize("name", CLASSES)
def test_a_file_under_diffusers_names_gives_comfyuis_own(name: str, outcomes: dict[str, Any]) -> None:
    assert outcomes["diffusers"][name] == [True, True, True]


def test_a_model_that_nobody_changed_is_never_held_to_be_and_copies_share_the_backends(
    outcomes: dict[str, Any],
) -> None:
    assert len(outcomes["kept"]) == 8 and not any(outcomes["kept"].values()), outcomes["kept"]


def test_what_evaluations_tell_is_told_once_in_the_order_of_its_coming(outcomes: dict[str, Any]) -> None:
    first, second, third = "a graph", "NaN in step 2", "a kernel"
    assert outcomes["told"] == [[first], [first, second], [first, second, third]]


def test_a_saved_checkpoint_is_a_local_models(outcomes: dict[str, Any]) -> None:
    assert all(names and far <= 1e-6 for names, far in outcomes["saved"].values()), outcomes["saved"]


def test_nodes_that_leave_the_blocks_alone_give_a_local_models_latent(outcomes: dict[str, Any]) -> None:
    assert len(outcomes["differences"]) == 12
    assert max(outcomes["differences"].values()) < 1e-5, outcomes["differences"]


def test_what_nodes_change_is_named_before_the_first_request(outcomes: dict[str, Any]) -> None:
    refused = outcomes["refused"]
    assert refused.keys() == REFUSED.keys()
    assert {name: words for name, words in REFUSED.items() if words not in refused[name][0]} == {}, refused
    assert {name: requests for name, (_, requests) in refused.items() if requests} == {}


def test_what_is_put_on_layers_between_evaluations_is_named_before_the_next_one(outcomes: dict[str, Any]) -> None:
    refused = outcomes["refused later"]
    assert {name: words for name, words in REFUSED_LATER.items() if words not in refused[name][0]} == {}, refused
    assert {name: requests for name, (_, requests) in refused.items() if requests != 1} == dict.fromkeys(NOTHING, 2)


def test_what_was_refused_once_is_refused_again(outcomes: dict[str, Any]) -> None:
    first, second = outcomes["refused again"]
    assert first == second and first[0].startswith("a forward hook of input_blocks.1.0")
