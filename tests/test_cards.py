"""Which GPUs ranks take, how a backend is told from that of other GPUs, and what is said where some are hidden or none fits."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from parallel_backend import Backend
from parallel_backend.client import cards, launcher
from parallel_backend.client import differences as client_differences
from parallel_backend.client.cards import Card, Ranks, Seen, choose_ranks
from parallel_backend.client.differences import differences
from parallel_backend.client.gpu_environment import difference, gpu_environment
from parallel_backend.client.launcher import LOCAL
from parallel_backend.client.names import backend_name, meant
from parallel_backend.config import BackendSpec
from parallel_backend.errors import ConfigError, StartError
from parallel_backend.rank.place import rank_state
from parallel_backend.rpc import runtime_dir as files
from parallel_backend.rpc.own_code import LOADED
from parallel_backend.version import __version__

ROOT = Path(__file__).parents[1]
GIB = 2**30
RTX4090 = Card("NVIDIA GeForce RTX 4090", (8, 9), 24 * GIB, 128, "")
RTX3090 = Card("NVIDIA GeForce RTX 3090", (8, 6), 24 * GIB, 82, "")
RTX4060 = Card("NVIDIA GeForce RTX 4060", (8, 9), 8 * GIB, 24, "")
T400 = Card("NVIDIA T400 4GB", (7, 5), 4 * GIB, 6, "")
A100, LARGE_A100 = (Card("NVIDIA A100", (8, 0), size * GIB, 108, "") for size in (40, 80))


def machine(*found: Card, **more: Any) -> Seen:
    """Its GPUs are called a, b, c, ..."""
    return Seen(tuple(replace(card, uuid=chr(ord("a") + number)) for number, card in enumerate(found)), **more)


@pytest.mark.parametrize(
    ("found", "count", "devices", "taken"),
    [
        ((RTX4090, RTX4090), None, (), Ranks("cuda", 2)),
        ((T400, RTX4090, RTX4090), None, (), Ranks("cuda", 2, (1, 2))),
        ((RTX4090, RTX4090, T400), 0, (), Ranks("cuda", 2)),
        ((RTX4060, RTX3090, RTX3090), None, (), Ranks("cuda", 2, (1, 2))),  # the newer one is the weaker one
        ((A100, LARGE_A100), None, (), Ranks("cuda", 1, (1,))),
        ((RTX4090, replace(RTX4090, total_bytes=24 * GIB - 2**20)), None, (), Ranks("cuda", 2)),
        ((T400, RTX4090, RTX4090), 1, (), Ranks("cuda", 1, (1,))),
        ((T400, RTX4090, RTX4090), 3, (), Ranks("cuda", 3)),
        ((T400, RTX4090, RTX4090), None, (0, 1), Ranks("cuda", 2, (0, 1))),
        ((), None, (), Ranks("cpu", 2)),
        ((), 3, (), Ranks("cpu", 3)),
    ],
)
def test_ranks_take_the_cards_of_the_best_ones_kind(
    found: tuple[Card, ...], count: int | None, devices: tuple[int, ...], taken: Ranks
) -> None:
    assert replace(choose_ranks(machine(*found), None, count, devices), note="") == taken


def test_what_is_left_out_is_said_where_nothing_was_asked_for() -> None:
    mixed = machine(T400, RTX4090, RTX4090)
    assert "Left out: GPU 0 (NVIDIA T400 4GB, 4 GiB)" in choose_ranks(mixed).note
    assert [choose_ranks(*asked).note for asked in ((mixed, None, 2), (mixed, "cpu"), (machine(RTX4090),))] == [""] * 3


def test_gpus_that_are_hidden_are_counted_and_said() -> None:
    one = machine(RTX4090, visible="0", present=4)
    said = "1 of 4 GPUs is visible here: CUDA_VISIBLE_DEVICES=0 (ComfyUI's --cuda-device sets it)."
    assert choose_ranks(one) == Ranks("cuda", 1, note=said)
    assert choose_ranks(machine(visible="", present=2)).note.startswith("0 of 2 GPUs are visible here")
    for shown in (machine(RTX4090), machine(RTX4090, visible="0", present=1), machine(RTX4090, visible="0")):
        assert choose_ranks(shown).note == ""


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch tells of two of them."""
    found = {"name": RTX3090.name, "total_memory": 24 * GIB, "multi_processor_count": 82, "major": 8, "minor": 6}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: RTX3090.name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: SimpleNamespace(**found, uuid=f"uuid of {n}"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (20 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)


def test_gpus_are_counted_by_the_driver_where_some_may_be_hidden(
    two_gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    both = tuple(replace(RTX3090, uuid=f"uuid of {number}") for number in (0, 1))
    assert cards.seen() == Seen(both) and cards.seen("cpu") == Seen()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    monkeypatch.setattr(cards, "_DRIVER", tmp_path / "driver")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nfor n in 0 1 2; do echo GPU $n: RTX; echo '  MIG 1g'; done\n")
    tool.chmod(0o755)
    for path, folders, present in ((tmp_path / "none", 0, None), (tmp_path, 0, 3), (tmp_path, 4, 4)):
        cards.present.cache_clear()
        monkeypatch.setenv("PATH", f"{path}:/bin" if path == tmp_path else str(path))
        for number in range(folders):
            (tmp_path / "driver" / str(number)).mkdir(parents=True)
        assert cards.seen() == Seen(both, "0,2", present)
    cards.present.cache_clear()


def test_a_rank_tells_its_cards_uuid_and_capability(two_gpus: None) -> None:
    state = rank_state(torch.device("cuda", 1), 3)
    assert (state.uuid, state.capability, state.device) == (f"uuid of {torch.device('cuda', 1)}", (8, 6), "cuda:1")
    plain = rank_state(torch.device("cpu"), 0)
    assert (plain.uuid, plain.capability) == ("", (0, 0))


@pytest.mark.parametrize(
    ("arch", "has"),
    [
        ("gfx1030", False),
        ("gfx1010:xnack-", False),
        ("gfx906:sramecc+:xnack-", False),
        ("gfx90a", True),
        ("gfx1100", True),
    ],
)
def test_a_rank_tells_whether_its_amd_card_has_bfloat16(
    arch: str, has: bool, two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(**vars(torch.cuda.get_device_properties(0)), gcnArchName=arch)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    assert rank_state(torch.device("cuda", 0), 0).bfloat16, "CUDA's capability tells"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert rank_state(torch.device("cuda", 0), 0).bfloat16 is has


def test_asking_for_a_gpu_that_is_hidden_names_what_hides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "seen", lambda: machine(RTX4090, visible="0", present=8))
    with pytest.raises(ConfigError) as raised:
        launcher.check_here(BackendSpec("x", 4, "cuda"), LOCAL)
    assert "GPUs 1, 2, 3 were asked for; torch sees 1 here. 1 of 8 GPUs is visible" in str(raised.value)
    assert "CUDA_VISIBLE_DEVICES=0" in str(raised.value) and "without --cuda-device" in str(raised.value)


@pytest.mark.parametrize("other", ["an Intel GPU (torch.xpu)", "an Apple GPU (torch.mps)"])
def test_another_kind_of_accelerator_is_named_and_the_cpu_taken_only_on_request(other: str) -> None:
    here = Seen(other=other)
    with pytest.raises(ConfigError) as raised:
        choose_ranks(here)
    assert other in str(raised.value) and "Set device to 'cpu'" in str(raised.value)
    assert choose_ranks(here, "cpu") == Ranks("cpu", 2)


def test_the_default_backend_is_one_for_each_set_of_gpus() -> None:
    first, second = (machine(RTX4090, RTX4090, visible=v, present=4) for v in ("0,1", "1,0"))
    second = replace(second, cards=second.cards[::-1])
    others = Seen((replace(RTX4090, uuid="c"), replace(RTX4090, uuid="d")), "2,3", 4)
    own = backend_name("default", "cuda", first)
    assert own.startswith("default-") and own == backend_name("default", "cuda", second)
    assert own != backend_name("default", "cuda", others)
    BackendSpec(own, 2, "cuda")  # a name that can be used
    whole = (machine(RTX4090), machine(RTX4090, visible="0", present=1))
    assert {backend_name("default", "cuda", here) for here in whole} == {"default"}
    assert backend_name("default", "cpu", first) == "default" and backend_name("mine", "cuda", first) == "mine"


@pytest.fixture
def living(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Writes records of backends, all of which this process stands for."""
    monkeypatch.setenv("PARALLEL_MMDIT_RUNTIME_DIR", str(tmp_path))

    def write(name: str, world_size: int = 1, device: str = "cpu", **known: Any) -> None:
        pid, address = os.getpid(), "ipc:///none"
        files.write_record(name, files.BackendRecord(__version__, "g", pid, pid, address, world_size, device, **known))

    return write


def test_without_a_name_the_backend_that_runs_is_meant(living: Callable[..., None]) -> None:
    here = machine(RTX4090, visible="0", present=4)
    own = backend_name("default", "cuda", here)
    living("mine")
    assert meant(None, Seen) == "default"
    living("default-00000000")
    assert meant(None, Seen) == "default-00000000"
    living("default-11111111")
    with pytest.raises(StartError, match="Several backends run: default-00000000, default-11111111"):
        meant(None, lambda: here)
    living(own)
    living("default")
    assert (meant(None, lambda: here), meant(None, Seen), meant("mine")) == (own, "default", "mine")


def test_a_backend_on_other_cards_of_the_same_numbers_is_not_taken(
    living: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    living("mine", 2, "cuda", cards=["a", "b"], code=LOADED)
    record = files.read_record("mine")
    assert record is not None
    spec = BackendSpec("mine", 2, "cuda")
    monkeypatch.setattr(client_differences, "seen", lambda: machine(RTX4090, RTX4090))
    monkeypatch.setattr(client_differences, "unlike", lambda *_: [])
    assert differences(record, spec) == []
    # The same two, by other numbers.
    shifted = Seen((replace(RTX4090, uuid="z"), *machine(RTX4090, RTX4090).cards))
    monkeypatch.setattr(client_differences, "seen", lambda: shifted)
    assert differences(record, BackendSpec("mine", 2, "cuda", (1, 2))) == []
    assert [*map(str, differences(record, spec))] == ["2 ranks on cuda (a, b), 2 on cuda (z, a) are asked for"]
    # Where torch doesn't tell cards apart, numbers have to do.
    monkeypatch.setattr(client_differences, "seen", lambda: Seen((RTX4090, RTX4090)))
    assert differences(record, spec) == []


def test_variables_that_a_backend_was_started_without_are_said() -> None:
    started = {"NCCL_DEBUG": "WARN", "CUDA_VISIBLE_DEVICES": "0"}
    record = files.BackendRecord("", "", 0, 0, "", 1, "cuda", environment=started)
    assert difference("mine", record, started | {"PATH": "/bin"}) is None
    what, remedy = difference("mine", record, {"NCCL_DEBUG": "WARN", "NCCL_P2P_DISABLE": "1"}) or ("", "")
    there, here = what.split("; here: ")
    assert there == "Backend 'mine' was started with CUDA_VISIBLE_DEVICES=0, NCCL_P2P_DISABLE unset"
    assert here == "CUDA_VISIBLE_DEVICES unset, NCCL_P2P_DISABLE=1." and "stop --name mine" in remedy
    assert gpu_environment(started | {"GLOO_SOCKET_IFNAME": "lo"}, "cpu") == {"GLOO_SOCKET_IFNAME": "lo"}


def test_variables_that_chose_the_same_cards_are_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    started = {"NCCL_DEBUG": "WARN", "CUDA_VISIBLE_DEVICES": "1,0"}
    record = files.BackendRecord("", "", 0, 0, "", 1, "cuda", cards=["a"], environment=started)
    here = {"NCCL_DEBUG": "WARN", "CUDA_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "0"}
    assert difference("mine", record, here, ["a", "b"]) is None
    assert difference("mine", record, here | {"NCCL_DEBUG": "INFO"}, ["a"]) is not None
    others = difference("mine", record, here, ["b"]) or ("", "")
    assert "CUDA_VISIBLE_DEVICES=1,0" in others[0] and "HIP" not in others[0], "HIP's is nothing to NVIDIA's"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "HIP_VISIBLE_DEVICES=0" in (difference("mine", record, here, ["b"]) or ("", ""))[0]
    assert difference("mine", record, here, ["a"]) is None


def test_amds_gpus_are_counted_and_what_hides_them_is_named(
    two_gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for node, simds in enumerate((0, 256, 256, 256)):
        (tmp_path / str(node)).mkdir()
        (tmp_path / str(node) / "properties").write_text(f"cpu_cores_count 0\nsimd_count {simds}\n")
    for name in cards.HIDING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cards, "_AMD_NODES", tmp_path)
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "0,1")
    cards.present.cache_clear()
    assert not cards.seen().narrowed, "NVIDIA's heed it not"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    cards.present.cache_clear()
    assert cards.seen().hidden().startswith("2 of 3 GPUs are visible here: HIP_VISIBLE_DEVICES=0,1")
    cards.present.cache_clear()


def test_where_ranks_cant_run_it_is_said_and_the_pack_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(files.platform, "system", lambda: "Windows")
    with pytest.raises(StartError, match="Ranks run on Linux; this is Windows"):
        Backend(2, "cpu", "windows")
    assert files.running_names() == [] and files.machine().startswith("win32/")
    monkeypatch.undo()
    unix = {"fcntl", "grp", "pwd", "resource", "termios"}
    parts = ("nodes", *(f"parallel_backend/{part}" for part in ("client", "rpc", "checkpoint_files", "demo")))
    for file in (file for part in parts for file in (ROOT / part).rglob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not unix & {alias.name for alias in node.names} and getattr(node, "module", "") not in unix, file
