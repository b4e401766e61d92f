"""What is said where memory is short: the figures, and a mesh in which it would be enough."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import msgspec
import pytest
import torch

from parallel_backend.checkpoint_files.content import content_key
from parallel_backend.config import MeshSpec
from parallel_backend.distributed.control import Control
from parallel_backend.distributed.device_memory import as_out_of_memory, memory_of
from parallel_backend.errors import CheckpointError, OutOfMemoryError
from parallel_backend.models.prediction import KEPT_PROMPTS, Predictor
from parallel_backend.models.prepared import PreparedPrompt, PreparedPrompts
from parallel_backend.rank.engine import Engine
from parallel_backend.rank.jobs import Job
from parallel_backend.rank.residents import Residents
from parallel_backend.rank.room import check_fits
from parallel_backend.rpc.headers import RequestHeader
from parallel_backend.rpc.messages import (
    Decode,
    Encode,
    Loaded,
    LoadModel,
    LoadVAE,
    Unload,
)
from parallel_backend.rpc.wire import tensor_meta
from parallel_backend.small_checkpoints.prompts import random_prompt

GIB = 2**30
CUDA_WORDS = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.10 GiB is free."
)
CPU_WORDS = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 3221225472 bytes."


@pytest.mark.parametrize(
    ("kind", "spec", "needed", "free", "remedy"),
    [
        ("mmdit", MeshSpec(cfg=2, ulysses=2), 16 * GIB, 10 * GIB, "It fits with tp=2"),
        ("mmdit", MeshSpec(cfg=2, ulysses=2), 16 * GIB, 5 * GIB, "It fits with tp=4"),
        ("mmdit", MeshSpec(cfg=2, tp=2), 8 * GIB, 5 * GIB, "It fits with tp=4"),
        ("mmdit", MeshSpec(tp=4), 8 * GIB, 5 * GIB, "No split of its weights over these ranks fits"),
        ("unet", MeshSpec(patch=4), 5 * GIB, 4 * GIB, "It fits with sliced"),
        ("unet", MeshSpec(cfg=2, dp=2), 5 * GIB, 4 * GIB, "It fits with sliced"),
        ("unet", MeshSpec(patch=4, sliced=True), 5 * GIB, 4 * GIB, "No split of its weights over these ranks fits"),
        ("vae", MeshSpec(), 5 * GIB, 4 * GIB, "No split of its weights over these ranks fits"),
    ],
)
def test_a_model_that_does_not_fit_is_told_where_it_would(
    kind: str, spec: MeshSpec, needed: int, free: int, remedy: str
) -> None:
    with pytest.raises(
        OutOfMemoryError, match=f"big needs {needed // 2**20} MiB on rank 3, which has {free // 2**20}"
    ) as caught:
        check_fits(needed, free, "cuda", "big", kind, spec, 4, 3)
    assert remedy in caught.value.remedy


def test_a_model_that_fits_passes() -> None:
    check_fits(8 * GIB, 10 * GIB, "cuda", "big", "mmdit", MeshSpec(cfg=2, tp=2), 4, 0)


@pytest.mark.parametrize("beside", [200, -40])
def test_another_model_leaves_where_that_makes_room(beside: int, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many MiB are free beside the weights of the second model: less than the reserve, or than they need."""
    large, medium = (models / "diffusion_models" / f"sd3.5-{size}.safetensors" for size in ("large", "medium"))
    needed = _load(Engine(torch.device("cpu")), medium).resident_bytes[0]
    engine = Engine(torch.device("cpu"))
    first = _load(engine, large)
    # It is small; it leaves in place of one of 1 GiB.
    engine.residents[first.model].state = msgspec.structs.replace(engine.residents[first.model].state, rank_bytes=GIB)
    monkeypatch.setattr(Residents, "free_bytes", lambda held: needed + beside * 2**20 + GIB * (first.model not in held))
    second = _load(engine, medium)
    assert second.evicted == [large.name] and list(engine.residents) == [second.model]


def test_a_model_stays_where_another_fits_beside_it(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(torch.device("cpu"))
    monkeypatch.setattr(Residents, "free_bytes", lambda held: GIB)
    for size in ("large", "medium"):
        assert _load(engine, models / "diffusion_models" / f"sd3.5-{size}.safetensors").evicted == []
    assert len(engine.residents) == 2


def _load(engine: Engine, path: Path) -> Loaded:
    job = Job(Control(), lambda body, tensors: None, lambda: False)
    body = LoadModel(str(path), content_key(path), "float32", MeshSpec())
    reply, _ = engine.handle(RequestHeader(1, body), [], job)
    assert isinstance(reply, Loaded)
    return reply


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError(CUDA_WORDS), "2560 MiB more"),
        (RuntimeError(CPU_WORDS), "3072 MiB more"),
        (MemoryError(), "More than it has"),
    ],
)
def test_an_allocation_that_failed_is_named_with_its_figures(error: Exception, asked: str) -> None:
    found = as_out_of_memory(error, torch.device("cpu"), 2)
    assert found is not None and found.message.startswith("Rank 2 on cpu is out of memory") and asked in found.message
    assert "MiB free" in found.message and "ulysses" in found.remedy


def test_another_error_is_not_taken_for_a_lack_of_memory() -> None:
    assert as_out_of_memory(RuntimeError("shape mismatch"), torch.device("cpu"), 0) is None


@pytest.mark.parametrize("kind", ["vae", "compiled"])
def test_a_model_that_is_unloaded_is_gone_at_once(kind: str, models: Path) -> None:
    """Its hooks and compiled blocks refer to it, so nothing but a collection frees it."""
    engine, paths = Engine(torch.device("cpu")), [models / "diffusion_models" / "sd3.5-large.safetensors"]
    if kind == "vae":
        paths = [models / "vae" / "sd3_vae.safetensors"]
        load: LoadVAE | LoadModel = LoadVAE([str(paths[0])], content_key(paths[0]), "float32")
    else:
        load = LoadModel(str(paths[0]), content_key(paths[0]), "float32", MeshSpec(), compile=True)
    job = Job(Control(), lambda body, tensors: None, lambda: False)
    engine.handle(RequestHeader(1, load), [], job)
    (resident,) = engine.residents.values()
    held, resident = weakref.ref(resident.model), None  # type: ignore[assignment]
    gc.disable()
    try:
        engine.handle(RequestHeader(2, Unload()), [], job)
        assert held() is None
    finally:
        gc.enable()


def test_memory_is_told_in_bytes_that_can_be() -> None:
    free, total, used = memory_of(torch.device("cpu"))
    assert 0 < free < total and 0 < used < total


def test_what_a_decode_or_a_load_that_failed_took_is_given_back(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where others may need it; torch would keep it for this rank."""
    given: list[str] = []
    monkeypatch.setattr("parallel_backend.rank.vaes.give_back", lambda device: given.append("decode"))
    monkeypatch.setattr(Residents, "give_back_memory", lambda residents: given.append("load"))
    engine, job = Engine(torch.device("cpu")), Job(Control(), lambda body, tensors: None, lambda: False)
    path = models / "vae" / "sd3_vae.safetensors"
    reply, _ = engine.handle(RequestHeader(1, LoadVAE([str(path)], content_key(path), "float32")), [], job)
    assert isinstance(reply, Loaded) and given == []
    latent, image = torch.zeros(1, 16, 4, 4), torch.zeros(1, 32, 32, 3)
    engine.handle(RequestHeader(2, Decode(reply.model, 0), [tensor_meta(latent)]), [latent], job)
    engine.handle(RequestHeader(3, Encode(reply.model, 0), [tensor_meta(image)]), [image], job)
    assert given == ["decode", "decode"]
    with pytest.raises(CheckpointError):
        engine.handle(RequestHeader(4, LoadModel(str(path), content_key(path), "float32", MeshSpec())), [], job)
    assert given[2:] == ["load"] and engine.meshes._joining is None


def test_a_prompt_is_made_ready_once_for_all_evaluations_that_ask_with_it(models: Path) -> None:
    engine = Engine(torch.device("cpu"))
    name = _load(engine, models / "diffusion_models" / "sd3.5-large.safetensors").model
    predictor = engine.residents[name].model
    assert isinstance(predictor, Predictor)
    context, pooled = random_prompt(1, 77)
    ready = predictor.prompt(context, pooled, 2)
    assert predictor.prompt(context, pooled, 2) is ready
    assert predictor.prompt(context, pooled, 1) is not ready
    other = context.clone()
    assert predictor.prompt(other, pooled, 2) is not ready
    for _ in range(3):  # of tensors that are gone at once: the next may have the same number
        gone = predictor.prompt(torch.rand_like(context), pooled, 2)
        assert predictor.prompt(torch.rand_like(context), pooled, 2) is not gone
    for tensor in [context.clone() for _ in range(KEPT_PROMPTS)]:
        predictor.prompt(tensor, pooled, 2)
    assert predictor.prompt(context, pooled, 2) is not ready, "the oldest are let go"
    assert len(predictor._prompts) == KEPT_PROMPTS


def test_what_a_network_makes_of_a_prompt_is_kept_by_identity_and_leaves_with_it() -> None:
    class Somebody:
        pass

    def make() -> PreparedPrompt:
        made.append(len(made))
        return PreparedPrompt(torch.zeros(1), torch.zeros(1), {"number": torch.tensor(made[-1])})

    kept, made, network = PreparedPrompts(2), list[int](), Somebody()
    first, second, pooled = torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), torch.zeros(1, 4)
    prepared = kept.of(network, first, pooled, make)
    assert kept.of(network, first, pooled, make) is prepared and made == [0]
    assert kept.of(network, second, pooled, make) is not prepared, "of other tensors"
    assert kept.of(Somebody(), first, pooled, make) is not prepared, "of another network"
    kept.at_version(0)
    assert kept.of(network, first, pooled, make) is not prepared and len(made) == 4, "the oldest had left"
    kept.at_version(1)
    kept.of(network, first, pooled, make)
    assert len(made) == 5, "weights have changed"
    leaves = weakref.ref(kept.of(network, torch.zeros(2, 3, 4), pooled, make).tensors["number"])
    kept.of(network, first, pooled, make)
    assert leaves() is None, "nobody has its prompt any more"
