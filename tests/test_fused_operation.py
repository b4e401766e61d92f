"""A kernel of our own is tried beside its twin before it is used, and not used where it fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import count

import pytest
import torch
from fake_cuda.device import fake_cuda, on_cuda
from fake_cuda.watch import Watch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from parallel_backend.fused.all import FUSED
from parallel_backend.fused.operation import Fused, fault_of, note_of

CPU = torch.device("cpu")
_numbers = count()


def doubled(x: Tensor) -> Tensor:
    return x + x


def made(launch: Callable[..., object], schema: str = "(Tensor x) -> Tensor", plain: Callable = doubled) -> Fused:
    name = f"of_a_test_{next(_numbers)}"
    return Fused(
        name,
        schema,
        plain,
        launch,
        lambda device: [torch.ones(3, device=device), torch.zeros(3)][: 1 + ("out" in schema)],
    )


def broken(x: Tensor) -> Tensor:
    raise RuntimeError("no kernel image is available\nand more words")


def out_of_memory(x: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


def write_doubled(x: Tensor, out: Tensor) -> None:
    out.copy_(x + x)


def write_nothing(x: Tensor, out: Tensor) -> None:
    pass


WRITES = {"schema": "(Tensor x, Tensor(a!) out) -> ()", "plain": write_doubled}


def test_a_kernel_that_is_right_has_no_fault() -> None:
    assert fault_of(made(lambda x: 2 * x), CPU) is None
    assert fault_of(made(write_doubled, **WRITES), CPU) is None


def test_one_that_is_wrong_or_fails_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    wrong, failing, idle = made(lambda x: x * 3), made(broken), made(write_nothing, **WRITES)
    nan = made(lambda x: x * float("nan"))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert fault_of(wrong, CPU) == "gave wrong numbers (off by 1)"
            assert fault_of(idle, CPU) == "gave wrong numbers (off by 2)"
            assert fault_of(nan, CPU) == "gave wrong numbers (off by nan)"
            assert fault_of(failing, CPU) == "failed (RuntimeError: no kernel image is available)"
    assert len(caplog.records) == 4


def test_a_lack_of_memory_says_nothing_of_a_kernel() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        fault_of(made(out_of_memory), CPU)


def test_where_the_kernel_fails_the_twin_computes() -> None:
    failing, right = made(broken), made(lambda x: 2 * x)
    assert torch.equal(failing._on_gpu(torch.ones(3)), torch.full((3,), 2.0))
    assert torch.equal(right._on_gpu(torch.ones(3)), torch.full((3,), 2.0))


def test_on_a_gpu_each_is_one_launch_of_the_twins_shape() -> None:
    with fake_cuda(), torch.inference_mode():
        for fused in FUSED:
            plain = fused.tried(fused.plain, CPU)
            arguments = tree_map_only(Tensor, _on_cuda, list(fused.trial(CPU)))
            with Watch() as watch:
                found = fused(*arguments)
            found = tree_leaves(arguments[-1] if found is None else found)
            assert watch.launches.total() == 1, fused.name
            laid = [[(x.shape, x.dtype, x.stride()) for x in results] for results in (found, plain)]
            assert laid[0] == laid[1], fused.name


def _on_cuda(x: Tensor) -> Tensor:
    return on_cuda(*x.shape, dtype=x.dtype).as_strided(x.shape, x.stride())


def test_a_note_names_those_that_do_not_work_on_a_gpu() -> None:
    assert note_of(FUSED, CPU) == ""
    note = note_of([made(broken)], torch.device("cuda", 7))  # which is not there: it fails before it begins
    assert note.startswith("on cuda:7 plain operations compute in place of fused kernels: 'of_a_test_")
