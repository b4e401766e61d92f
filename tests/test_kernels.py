"""Attention kernels: which comes first on which card, which is refused by name, and what is found out by trying it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from diffusers.models import attention_dispatch
from rank_pool import RankPool
from torch import Tensor

from parallel_backend import MeshSpec
from parallel_backend.checkpoint_files.content import content_key
from parallel_backend.distributed import kernel_packages, kernel_trial, kernels
from parallel_backend.distributed.control import Control
from parallel_backend.distributed.kernel_trial import choose_kernel, tried
from parallel_backend.distributed.kernels import KERNELS, PACKAGES, Use, resolve_kernel
from parallel_backend.errors import ConfigError
from parallel_backend.rank import engine as engine_module
from parallel_backend.rank.engine import Engine
from parallel_backend.rank.jobs import Job
from parallel_backend.rpc.headers import RequestHeader
from parallel_backend.rpc.messages import Loaded, LoadModel

ON_CPU = Use(torch.device("cpu"), torch.float32, ring=False, heads=3, head_dim=64)
ON_GPU = Use(torch.device("cuda"), torch.bfloat16, ring=False, heads=3, head_dim=64)
TURING, AMPERE, ADA, HOPPER, BLACKWELL, SMALL_BLACKWELL = (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)
ALL = tuple(PACKAGES)


def card(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    installed: tuple[str, ...] = (),
    picks_cudnn: bool = False,
) -> None:
    """A GPU of that capability, with those kernels' packages; torch itself picks cuDNN on it or not."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {capability[0]}.{capability[1]}")
    monkeypatch.setattr(kernels, "native_is_cudnn", lambda use: picks_cudnn)
    for name in ALL:
        monkeypatch.setattr(attention_dispatch, KERNELS[name].function, len if name in installed else None)


@pytest.mark.parametrize(
    ("capability", "installed", "dtype", "ring", "picks_cudnn", "first"),
    [
        (TURING, ALL, torch.float16, False, False, "native"),
        (TURING, ALL, torch.float16, True, False, "native"),
        (AMPERE, (), torch.bfloat16, False, False, "native"),
        (AMPERE, ALL, torch.bfloat16, False, False, "flash"),
        (AMPERE, ALL, torch.float32, False, False, "native"),
        (ADA, ("flash",), torch.float16, True, False, "flash"),
        (HOPPER, ALL, torch.bfloat16, False, False, "cudnn"),
        (HOPPER, ALL, torch.bfloat16, False, True, "native"),
        (HOPPER, ALL, torch.bfloat16, True, True, "cudnn"),
        (HOPPER, ALL, torch.float32, True, False, "native"),
        (BLACKWELL, ALL, torch.float16, False, False, "cudnn"),
        (SMALL_BLACKWELL, ("flash",), torch.bfloat16, False, False, "flash"),
        (SMALL_BLACKWELL, ("sage",), torch.bfloat16, False, False, "native"),
    ],
)
def test_auto_prefers_the_fastest_kernel_of_the_card(
    capability: tuple[int, int],
    installed: tuple[str, ...],
    dtype: torch.dtype,
    ring: bool,
    picks_cudnn: bool,
    first: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card(monkeypatch, capability, installed, picks_cudnn)
    names = resolve_kernel("auto", replace(ON_GPU, dtype=dtype, ring=ring))
    assert names[0] == first and "native" in names and len(set(names)) == len(names)


def test_auto_falls_back_on_hopper_to_flash_attn_3_and_then_to_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, HOPPER, ALL)
    assert resolve_kernel("auto", ON_GPU) == ["cudnn", "flash3", "native", "efficient"]
    card(monkeypatch, BLACKWELL, ALL)
    assert resolve_kernel("auto", ON_GPU) == ["cudnn", "native", "efficient"]


@pytest.mark.parametrize(
    ("name", "capability", "change", "words"),
    [
        ("flash", TURING, {}, r"'flash' is made for compute capability 8.0 or more; Card 7.5 has 7.5"),
        ("flash3", AMPERE, {}, r"9.0 or more, below 10.0; Card 8.0"),
        ("flash3", BLACKWELL, {}, r"9.0 or more, below 10.0; Card 10.0"),
        ("sage", TURING, {}, "8.0 or more; Card 7.5"),
        ("cudnn", HOPPER, {"dtype": torch.float32}, "can't compute in float32"),
        ("flash", ADA, {"dtype": torch.float32}, "can't compute in float32"),
        ("sage", ADA, {"ring": True}, "no log-sum-exp"),
        ("sage", ADA, {"head_dim": 160}, "up to 128 values; this model's have 160"),
    ],
)
def test_kernels_that_cant_run_on_a_card_are_refused_by_name(
    name: str, capability: tuple[int, int], change: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    card(monkeypatch, capability, ALL)
    with pytest.raises(ConfigError, match=words) as refused:
        resolve_kernel(name, replace(ON_GPU, **change))
    assert "'auto'" in refused.value.remedy or "'native'" in refused.value.remedy


@pytest.mark.parametrize("name", ["flash", "sage", "cudnn", "efficient"])
def test_kernels_of_gpus_are_refused_on_cpus(name: str) -> None:
    with pytest.raises(ConfigError, match="needs a GPU"):
        resolve_kernel(name, ON_CPU)
    assert resolve_kernel("auto", ON_CPU) == resolve_kernel("native", ON_CPU) == ["native"]


def test_packages_that_are_not_there_or_broken_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, AMPERE)
    with pytest.raises(ConfigError, match="needs the package flash_attn, built for this torch"):
        resolve_kernel("flash", ON_GPU)
    monkeypatch.setitem(kernels.BROKEN, "flash_attn", "ImportError: undefined symbol: _ZN3c10")
    with pytest.raises(ConfigError, match=r"flash_attn, which can't be imported here: .*undefined symbol") as refused:
        resolve_kernel("flash", ON_GPU)
    assert torch.__version__ in refused.value.remedy


def test_a_package_that_raises_when_imported_is_as_if_it_were_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "built_for_another_torch.py").write_text('raise ImportError("undefined symbol: x\\nand more")')
    (tmp_path / "built_for_this_torch.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("built_for_another_torch", "built_for_this_torch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setitem(sys.modules, name, monkeypatch)  # both are put back afterwards
        del sys.modules[name]
    names = ["built_for_another_torch", "built_for_this_torch", "built_for_nothing"]
    assert kernel_packages.hide_broken(names) == {names[0]: "ImportError: undefined symbol: x"}
    assert importlib.util.find_spec(names[0]) is None and importlib.util.find_spec(names[1]) is not None


# -- the trial --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ring", [False, True], ids=["plain", "ring"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_torchs_own_kernel_passes_its_trial(dtype: torch.dtype, ring: bool) -> None:
    assert choose_kernel("auto", replace(ON_CPU, dtype=dtype, ring=ring)) == ("native", "")


def raises(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")


FAULTS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], str]] = {
    "raises": (
        raises,
        r"failed \(RuntimeError: CUDA error: no kernel image is available for execution on the device\)",
    ),
    "NaN": (lambda q, k, v: q * float("nan"), "gave NaN"),
    "wrong": (lambda q, k, v: v, "gave wrong numbers"),
    "another form": (lambda q, k, v: v.transpose(1, 2), r"gave a tensor of shape \[2, 3, 130, 64\]"),
    "a tuple": (lambda q, k, v: (v, v), "failed"),
}


@pytest.fixture
def broken_flash(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """flash is what "auto" prefers, and it has the fault that the test names; what is computed is on the CPU."""
    fault, words = FAULTS[request.param]
    plain = kernel_trial.attend
    monkeypatch.setattr(
        kernel_trial, "attend", lambda name, *qkv: fault(*qkv) if name == "flash" else plain("native", *qkv)
    )
    monkeypatch.setattr(
        kernel_trial, "resolve_kernel", lambda name, use: ["flash", "native"] if name == "auto" else [name]
    )
    return words


@pytest.mark.parametrize("broken_flash", FAULTS, indirect=True)
def test_a_kernel_that_fails_its_trial_gives_way_and_its_user_is_told(broken_flash: str) -> None:
    kernel, note = choose_kernel("auto", ON_CPU)
    assert kernel == "native"
    with pytest.raises(ConfigError, match=broken_flash):  # the same words in both
        raise ConfigError(note)
    assert note.startswith("on this CPU attention kernel 'native' computes, for 'flash' ")


@pytest.mark.parametrize("broken_flash", FAULTS, indirect=True)
def test_a_named_kernel_that_fails_its_trial_is_an_error_with_what_works(broken_flash: str) -> None:
    with pytest.raises(ConfigError, match=f"'flash' {broken_flash}.* on this CPU") as refused:
        choose_kernel("flash", ON_CPU)
    assert "'native', which works" in refused.value.remedy


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda out, lse: (out,), r"failed \(ValueError: not enough values to unpack"),
        (lambda out, lse: (out, lse, lse), r"failed \(ValueError: too many values"),
        (
            lambda out, lse: (out, lse.transpose(1, 2)),
            r"gave a tensor of shape \[2, 3, 130\] in place of \[2, 130, 3\]",
        ),
        (lambda out, lse: (out, lse * 0.9), "wrong numbers"),
        (lambda out, lse: (out, lse / 0), "wrong numbers"),
    ],
    ids=["one tensor", "three", "heads first", "wrong", "infinite"],
)
def test_a_log_sum_exp_that_is_not_one_is_found_out_before_ring_uses_it(
    fault: Callable[[Tensor, Tensor], Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = KERNELS["native"]
    assert native.lse is not None
    right = native.lse
    monkeypatch.setitem(KERNELS, "native", replace(native, lse=lambda *qkv: fault(*right(*qkv))))
    assert tried("native", ON_CPU) is None  # without ring nobody asks for it
    with pytest.raises(ConfigError, match=words):
        choose_kernel("native", replace(ON_CPU, ring=True))


def test_a_rank_without_memory_says_nothing_about_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(kernel_trial, "attend", full)
    with pytest.raises(torch.OutOfMemoryError):
        choose_kernel("auto", ON_CPU)


@pytest.mark.parametrize(("kernel", "heads_first"), [("flash", True), ("flash3", False)])
def test_log_sum_exp_has_one_layout_whatever_the_kernel_gives(
    kernel: str, heads_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, lse = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3)
    given = lse.transpose(1, 2) if heads_first else lse
    monkeypatch.setattr(kernels, "dispatch_attention_fn", lambda *args, **settings: (q, given))
    with_lse = KERNELS[kernel].lse
    assert with_lse is not None and torch.equal(with_lse(q, q, q)[1], lse)


@pytest.mark.parametrize("kernel", ["native", "cudnn", "efficient"])
@pytest.mark.parametrize("capability", [TURING, HOPPER])
def test_torchs_kernels_give_their_log_sum_exp_of_the_right_form_on_gpus(
    kernel: str, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch's own rules for tensors without values: the calls fit the signatures of this torch."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    card(monkeypatch, capability)
    contiguous = lambda x: torch.clone(x, memory_format=torch.contiguous_format)  # noqa: E731 - a build for CPUs lacks it
    monkeypatch.setattr(Tensor, "contiguous", contiguous)
    with_lse = KERNELS[kernel].lse
    assert with_lse is not None
    with FakeTensorMode():
        q, k, v = (torch.empty(2, tokens, 3, 64, device="cuda", dtype=torch.float16) for tokens in (130, 77, 77))
        out, lse = with_lse(q, k, v)
        assert (out.shape, lse.shape, lse.dtype) == (q.shape, (2, 130, 3), torch.float32)


# -- at load ----------------------------------------------------------------------------------------------------


def load_saying(path: Path, spec: MeshSpec) -> tuple[Use, list[str]]:
    """What a rank asks of its kernel when it loads a model, and what is told of it; all but rank 0 fall back."""
    asked = []

    def choose(name: str, use: Use) -> tuple[str, str]:
        asked.append(use)
        return "native", "it fell back" if job.control.rank else ""

    job = Job(Control(), lambda body, tensors: None, lambda: False)
    header = RequestHeader(1, LoadModel(str(path), content_key(path), "bfloat16", spec))
    with patch.object(engine_module, "choose_kernel", choose):
        reply, _ = Engine(torch.device("cpu")).handle(header, [], job)
    assert isinstance(reply, Loaded)
    return asked[0], reply.notes


@pytest.mark.parametrize(
    ("file", "spec", "heads", "ring"),
    [
        ("sd3.5-large", MeshSpec(), 4, False),
        ("sd3.5-large", MeshSpec(ring=2), 4, True),
        ("sd3.5-large", MeshSpec(ulysses=2), 2, False),
        ("sd3.5-large", MeshSpec(tp=2), 2, False),
        ("unet-tiny", MeshSpec(cfg=2), 2, False),
    ],
    ids=["mmdit", "mmdit ring", "mmdit ulysses", "mmdit tp", "unet"],
)
def test_a_kernel_is_tried_as_the_rank_will_use_it_and_every_ranks_note_is_told(
    file: str, spec: MeshSpec, heads: int, ring: bool, unets: Path, ranks: RankPool
) -> None:
    told = ranks(spec.world_size, load_saying, unets / f"{file}.safetensors", spec)
    for use, notes in told:
        assert (use.heads, use.head_dim, use.ring, use.dtype) == (heads, 64, ring, torch.bfloat16)
        assert notes == (["it fell back"] if spec.world_size > 1 else [])
