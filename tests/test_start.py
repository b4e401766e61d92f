"""What ranks are started with: their environment, over loopback, and outside the service that starts them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from parallel_backend.client import launcher
from parallel_backend.client.environment import environment, loopback_interface
from parallel_backend.client.own_scope import scope_command, service_of
from parallel_backend.config import BackendSpec, Hosts
from parallel_backend.doctor import machine

CUDA = BackendSpec("e", 2, "cuda")
CPU = BackendSpec("e", 2, "cpu")
SEVERAL = Hosts(2, 0, "10.0.0.1:29500")


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """This process's environment, for now a small one."""
    small = {"PATH": "/bin", "HOME": "/home/me"}
    monkeypatch.setattr(os, "environ", small)
    return small


def test_ranks_are_given_what_means_something_to_them_and_no_more(environ: dict[str, str]) -> None:
    kept = {
        "LD_LIBRARY_PATH": "/cuda", "LC_ALL": "C", "https_proxy": "p", "NCCL_P2P_DISABLE": "1", "COVERAGE_PROCESS_START": "c",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "HF_HOME": "h", "MALLOC_ARENA_MAX": "2", "CUDA_VISIBLE_DEVICES": "1",
    }  # fmt: skip
    environ |= kept | {"AWS_SECRET_ACCESS_KEY": "s", "MASTER_ADDR": "elsewhere", "RANK": "7", "COMFYUI_FLAG": "1"}
    given = environment(CPU)
    assert given.items() >= (kept | {"PATH": "/bin", "HOME": "/home/me"}).items()
    assert not given.keys() & {"AWS_SECRET_ACCESS_KEY", "MASTER_ADDR", "RANK", "COMFYUI_FLAG"}
    assert str(Path(launcher.__file__).parents[2]) in given["PYTHONPATH"].split(os.pathsep)


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ("backend:cudaMallocAsync", "expandable_segments:True"),
        ("max_split_size_mb:512, backend:cudaMallocAsync", "max_split_size_mb:512,expandable_segments:True"),
        ("expandable_segments:False", "expandable_segments:False"),
    ],
)
def test_ranks_on_gpus_dont_take_comfyuis_allocator(
    name: str, found: str, wanted: str, environ: dict[str, str]
) -> None:
    environ[name] = found
    assert {n: v for n, v in environment(CUDA).items() if "ALLOC_CONF" in n} == {name: wanted}
    assert environment(CPU)[name] == found


def test_ranks_on_gpus_have_growing_segments_and_an_nccl_that_tells(environ: dict[str, str]) -> None:
    given = environment(CUDA)
    assert given["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True" and "PYTORCH_ALLOC_CONF" not in given
    assert given["NCCL_DEBUG"] == "WARN" and given["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    environ["NCCL_DEBUG"] = "INFO"
    assert environment(CUDA)["NCCL_DEBUG"] == "INFO"


@pytest.mark.parametrize("spec", [CUDA, CPU], ids=["cuda", "cpu"])
def test_the_cores_are_shared_out_unless_the_user_has_done_so(spec: BackendSpec, environ: dict[str, str]) -> None:
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    given = environment(spec)
    assert given["OMP_NUM_THREADS"] == given["TORCHINDUCTOR_COMPILE_THREADS"] == share
    environ |= {"OMP_NUM_THREADS": "5", "TORCHINDUCTOR_COMPILE_THREADS": "6"}
    given = environment(spec)
    assert (given["OMP_NUM_THREADS"], given["TORCHINDUCTOR_COMPILE_THREADS"]) == ("5", "6")


def test_ranks_of_one_host_meet_over_loopback_alone(environ: dict[str, str]) -> None:
    loopback = loopback_interface()
    assert loopback in [name for _, name in socket.if_nameindex()]
    assert [environment(CUDA)[f"{library}_SOCKET_IFNAME"] for library in ("GLOO", "NCCL")] == [loopback] * 2
    assert "--local-addr=127.0.0.1" in launcher.command(CUDA)
    environ["NCCL_SOCKET_IFNAME"] = "eth7"
    assert environment(CUDA)["NCCL_SOCKET_IFNAME"] == "eth7"


def test_ranks_of_several_hosts_meet_where_they_are_told_to(environ: dict[str, str]) -> None:
    assert not [name for name in environment(CPU, SEVERAL) if name.endswith("IFNAME")]
    named = Hosts(2, 1, "10.0.0.1:29500", interface="eth1")
    assert environment(CPU, named)["GLOO_SOCKET_IFNAME"] == environment(CPU, named)["NCCL_SOCKET_IFNAME"] == "eth1"


def test_loopback_is_known_by_its_flags_whatever_its_name(tmp_path: Path) -> None:
    for name, flags in (("eth0", "0x1003"), ("lo", "0x8"), ("loop7", "0x9")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "flags").write_text(f"{flags}\n")
    assert loopback_interface(tmp_path) == "loop7"  # "lo" is down
    assert loopback_interface(tmp_path / "nowhere") == ""


# -- a host whose name leads nowhere ---------------------------------------------------------------------------

NAMELESS = """
import json, socket
from parallel_backend import Backend
try:
    socket.getaddrinfo(socket.gethostname(), None)
except OSError:
    backend = Backend(2, "cpu", "nameless")
    print(json.dumps([rank.host for rank in backend.status().ranks]))
    backend.stop()
"""


def test_a_host_whose_name_has_no_address_starts_too(runtime_folder: Path) -> None:
    for apart in (["unshare", "--uts"], ["unshare", "--user", "--map-root-user", "--uts"]):
        command = [*apart, "sh", "-c", 'hostname nosuch.invalid && exec "$0" "$@"']
        if (
            shutil.which("unshare")
            and subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
        ):
            break
    else:
        pytest.skip("this user can't give a process another host name")
    done = subprocess.run(
        [*command, sys.executable, "-c", NAMELESS],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1], check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == ["nosuch.invalid"] * 2


def test_doctor_says_that_a_name_without_an_address_harms_several_hosts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(socket, "gethostname", lambda: "nosuch.invalid")
    (found,) = [finding for finding in machine.network() if "nosuch.invalid" in finding.what]
    assert found.verdict == "note" and "ranks of one host don't need it" in found.what
    assert "several hosts" in found.remedy and "--interface" in found.remedy


# -- systemd ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "service"),
    [
        ("0::/system.slice/comfyui.service", "comfyui.service"),
        ("0::/system.slice/comfyui.service/payload", "comfyui.service"),
        ("4:memory:/system.slice/x.service\n1:name=systemd:/system.slice/comfyui.service\n0::/", "comfyui.service"),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/comfy.service", "comfy.service"),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/vte-1.scope", ""),
        ("0::/user.slice/user-1000.slice/session-3.scope", ""),
        ("4:memory:/system.slice/x.service\n0::/", ""),
        ("0::/", ""),
    ],
)
def test_the_service_of_a_process_is_the_innermost_unit(lines: str, service: str, tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text(lines + "\n")
    assert service_of(tmp_path / "cgroup") == service
    assert service_of(tmp_path / "nowhere") == ""


def systemd_run(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A stand-in for systemd-run, found before any other."""
    (folder / "systemd-run").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "systemd-run").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def started(monkeypatch: pytest.MonkeyPatch, name: str, service: str, stays: bool) -> tuple[int, list[str]]:
    """The process that `start` made in a service, and what is in its log; in torchrun's place is a shell that tells its number."""
    monkeypatch.setattr(launcher, "service_of", lambda: service)
    monkeypatch.setattr(launcher, "command", lambda *_, **__: ["sh", "-c", "echo $$"])
    process = launcher.start(BackendSpec(name, 1, "cpu"), stays=stays)
    assert process.wait(10) == 0
    return process.pid, (launcher.files.runtime_dir(name) / "backend.log").read_text().splitlines()


def test_a_service_starts_its_backend_in_a_scope_of_its_own(
    runtime_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_given = '[ "$*" = "${*#*true}" ] && echo "scope: $*"; while [ "$1" != -- ]; do shift; done; shift; exec "$@"'
    systemd_run(tmp_path, monkeypatch, as_given)
    pid, log = started(monkeypatch, "scoped", "comfyui.service", stays=True)
    assert log[0].startswith("scope: ") and "--scope" in log[0]
    assert ("--user" in log[0]) == (os.getuid() != 0)
    assert log[1:] == [str(pid)]  # systemd-run has become the command: who ends the process ends the backend
    assert started(monkeypatch, "scoped", "", stays=True)[1] != log
    _, log = started(monkeypatch, "scoped", "parallel-mmdit.service", stays=False)
    assert len(log) == 1  # `serve` in the foreground, itself a service, keeps its ranks


def test_a_service_without_a_scope_is_told_that_its_backend_ends_with_it(
    runtime_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    systemd_run(tmp_path, monkeypatch, "echo no bus >&2; exit 1")
    assert scope_command() == []
    pid, log = started(monkeypatch, "unscoped", "comfyui.service", stays=True)
    assert "ends when comfyui.service is stopped" in log[0] and log[1:] == [str(pid)]
