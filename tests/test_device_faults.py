"""What CUDA and NCCL say when they fail: the remedy for each, and whether the ranks can go on."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool

from parallel_backend.checkpoint_files.content import content_key
from parallel_backend.config import MeshSpec, SamplerSpec
from parallel_backend.distributed import device_faults
from parallel_backend.distributed.control import Control
from parallel_backend.distributed.device_faults import breaks_rank, known_fault
from parallel_backend.distributed.device_memory import as_out_of_memory
from parallel_backend.errors import BackendError, InputError, OutOfMemoryError, RankError
from parallel_backend.rank.engine import Engine
from parallel_backend.rank.jobs import Job
from parallel_backend.rank.place import own_device
from parallel_backend.rpc.headers import RequestHeader
from parallel_backend.rpc.messages import Loaded, LoadModel, Prompt, Sample
from parallel_backend.rpc.wire import tensor_meta
from parallel_backend.small_checkpoints.prompts import random_prompt

NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, "
UNHANDLED = NCCL + "unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.28.9\n"
NO_KERNEL = "CUDA error: no kernel image is available for execution on the device"


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        (NCCL + "unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.28.9", "--shm-size=1g"),
        (UNHANDLED + "Cuda failure 217 'peer access is not supported between these two devices'", "NCCL_P2P_DISABLE=1"),
        (NO_KERNEL, "compute capability"),
        (UNHANDLED + "Cuda failure 'invalid device context'", "NCCL_P2P_DISABLE=1"),
        (NCCL + "remote process exited or there was a network error, NCCL version 2.28.9", "Another rank fell first"),
    ],
)
def test_words_of_a_device_have_their_remedy(text: str, remedy: str) -> None:
    named = Control().named(dist.DistBackendError(text))
    assert isinstance(named, RankError) and remedy in named.remedy and text.splitlines()[0][:150] in named.message
    assert "\n" not in named.message and text in str(named)


@pytest.mark.parametrize(
    "words",
    [
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'",
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nFailed to CUDA calloc async 4194304 bytes",
    ],
)
def test_a_communicator_without_memory_is_out_of_memory_and_ends_the_rank(words: str) -> None:
    error = dist.DistBackendError(UNHANDLED + words)
    assert isinstance(as_out_of_memory(error, torch.device("cpu"), 1), OutOfMemoryError)
    assert breaks_rank(error), "who holds half a communicator can't go on"


@pytest.mark.parametrize(
    ("error", "broken"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (dist.DistBackendError(UNHANDLED), True),
        (torch.AcceleratorError(NO_KERNEL), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB."), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul"), False),
        (InputError("A latent came that says CUDA error: in its name.", ""), False),
        (ValueError("shape mismatch"), False),
    ],
    ids=str,
)
def test_a_lost_context_ends_the_rank_and_what_the_next_try_would_meet_again_does_not(
    error: Exception, broken: bool
) -> None:
    assert breaks_rank(error) == broken
    kept = Control().verdict(error, [])
    assert (kept is None) == broken


def test_torch_before_2_8_has_no_class_of_its_own_for_errors_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "AcceleratorError")
    older = importlib.reload(device_faults)
    try:
        assert older.breaks_rank(RuntimeError("CUDA error: device-side assert triggered"))
        assert not older.breaks_rank(ValueError("shape mismatch"))
    finally:
        monkeypatch.undo()
        importlib.reload(device_faults)


@pytest.mark.parametrize(
    "words", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x"]
)
def test_what_cudas_libraries_lack_is_memory_too(words: str) -> None:
    assert isinstance(as_out_of_memory(RuntimeError(words), torch.device("cpu"), 1), OutOfMemoryError)


def lost_on_one(folder: str) -> str:
    """What a job comes to on rank 0, where it alone has lost its context inside what all ranks do alike."""
    control = Control(dist.FileStore(f"{folder}/store", dist.get_world_size()))

    def local() -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    if control.rank == 1:
        return ""  # it would wait until rank 0's end is seen
    try:
        control.agreed(local)
    except torch.AcceleratorError as error:
        return str(error)
    raise AssertionError


def test_a_lost_context_is_not_made_an_error_of_the_job(ranks: RankPool, tmp_path: Path) -> None:
    assert "illegal memory access" in ranks(2, lost_on_one, str(tmp_path))[0]


def test_one_text_does_not_say_both_that_ranks_go_on_and_that_they_restart() -> None:
    alone = Control().named(ValueError("odd"))
    assert alone.remedy == "", "whoever hears of it adds what comes of it"
    kept = Control().verdict(ValueError("odd"), [])
    assert kept is not None and "go on" in kept.remedy


def test_no_known_words_are_found_in_an_ordinary_error() -> None:
    assert known_fault(ValueError("a mask of 4 channels")) is None


@pytest.mark.parametrize(
    ("kind", "ordinals", "local", "device", "sharers"),
    [
        ("cuda", "", 1, "cuda:1", 1),
        ("cuda", "3,1,2", 0, "cuda:3", 1),
        ("cuda", "0,0,1", 1, "cuda:0", 2),
        ("cpu", "", 2, "cpu", 3),
    ],
)
def test_a_rank_knows_its_device_and_who_shares_its_memory(
    kind: str, ordinals: str, local: int, device: str, sharers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr("parallel_backend.rank.place.never_preempt", lambda: None)
    assert own_device(kind, ordinals) == (torch.device(device), sharers)
    assert chosen == ([torch.device(device)] if kind == "cuda" else [])


def pipeline_that_fails_on_one(path: str) -> str:
    """What every rank says of displaced steps whose preparation fails on rank 1 alone."""
    engine, control = Engine(torch.device("cpu")), Control()
    job = Job(control, lambda body, tensors: None, lambda: False)
    load = LoadModel(path, content_key(Path(path)), "float32", MeshSpec(pp=2))
    loaded, _ = engine.handle(RequestHeader(1, load), [], job)
    assert isinstance(loaded, Loaded)
    tensors = [torch.zeros(1, 16, 16, 16), *random_prompt(1, 77)]
    body = Sample(loaded.model, SamplerSpec(steps=3, warmup_steps=1), 0, Prompt(1, 2))
    header = RequestHeader(2, body, [tensor_meta(tensor) for tensor in tensors])
    with pytest.MonkeyPatch.context() as patched:
        if control.rank == 1:
            patched.setattr("parallel_backend.rank.sample.Pipeline", no_memory)
        with pytest.raises(BackendError) as failed:
            engine.handle(header, tensors, job)
    reply, _ = engine.handle(header, tensors, job)
    return f"{failed.value.message} {type(reply).__name__}"


def no_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")


def test_a_stage_that_can_t_prepare_leaves_no_other_waiting(ranks: RankPool, large: Path) -> None:
    said = ranks(2, pipeline_that_fails_on_one, str(large))
    assert all(text.startswith("Rank 1 on cpu is out of memory: 2 MiB more") for text in said)
    assert all(text.endswith("Result") for text in said), "the next job runs"
