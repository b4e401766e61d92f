"""The machine: its devices, its folders for backends, its network."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import torch

from ..client.cards import present, seen
from ..client.environment import loopback_interface
from ..distributed.device_memory import memory_of
from ..errors import BackendError
from ..rpc import runtime_dir as files
from .finding import Finding, wrong

LEAST_FREE = 256 * 2**20


def devices() -> Iterator[Finding]:
    here = seen()
    kind, count = ("cuda" if here.cards else "cpu"), len(here.cards)
    if here.other:
        yield Finding("note", f"this machine has {here.other}, which ranks can't use", "Use NVIDIA or AMD GPUs.")
    if hidden := here.hidden():
        yield Finding("note", hidden, "Unset CUDA_VISIBLE_DEVICES for all of them.")
    if kind == "cpu":
        yield _without_gpu(hidden=here.visible is not None)
    elif not torch.distributed.is_nccl_available():
        yield Finding("wrong", "this torch has no NCCL, which GPUs need", "Install a CUDA build of torch for Linux.")
    else:
        version = ".".join(map(str, torch.cuda.nccl.version()))
        yield Finding("ok", f"NCCL {version}")
    for number in range(count if kind == "cuda" else 0):
        yield from _gpu(number, count)
    free, total, _ = memory_of(torch.device("cpu"))
    yield Finding("ok", f"{os.cpu_count()} cores, {free / 2**30:.1f} of {total / 2**30:.1f} GiB memory free")
    shared = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    if kind == "cuda" and (shared is None or shared.free < LEAST_FREE):
        yield Finding("wrong", "/dev/shm is too small for NCCL", "In a container: --shm-size=1g, or --ipc=host.")


def _without_gpu(*, hidden: bool) -> Finding:
    """A machine may have none; what is wrong is a GPU that its driver knows and torch doesn't find."""
    built, there = torch.version.cuda or torch.version.hip, present()
    if not built:
        return Finding("note", "torch is built for CPUs: everything works, slowly", "Install a CUDA build for GPUs.")
    what = f"torch is built for {'ROCm' if torch.version.hip else 'CUDA'} {built} but sees no GPU"
    if there and not hidden:
        remedy = "Install a driver that is new enough for that, or a torch for this driver: nvidia-smi names its CUDA."
        return Finding("wrong", f"{what}, and this machine has {there}", remedy)
    remedy = "If this machine has one, see that nvidia-smi lists it, and that CUDA_VISIBLE_DEVICES names it."
    return Finding("note", f"{what}: ranks run on the CPU, slowly", remedy)


def _gpu(number: int, count: int) -> Iterator[Finding]:
    free, total = torch.cuda.mem_get_info(number)
    name = torch.cuda.get_device_name(number)
    line = f"GPU {number}: {name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if free < total / 2:
        yield Finding("note", line, "Other programs hold the rest: see nvidia-smi.")
    else:
        yield Finding("ok", line)
    unreached = [n for n in range(count) if n != number and not torch.cuda.can_device_access_peer(number, n)]
    if unreached:
        others = ", ".join(map(str, unreached))
        yield Finding(
            "note", f"GPU {number} reaches GPU {others} only through the host", "Prefer cfg and pp to tp there."
        )


def folders() -> Iterator[Finding]:
    try:
        root = files.runtime_root()
        folder = files.runtime_dir("doctor")
        folder.rmdir()
    except BackendError as error:
        yield wrong(error, "no backend can be started or found: ")
        return
    disk = shutil.disk_usage(root)
    if disk.free < 16 * 2**20:
        yield Finding("wrong", f"the disk of {root} is full", "Make room, or set PARALLEL_MMDIT_RUNTIME_DIR.")
    else:
        yield Finding("ok", f"runtime folder {root}")


def network() -> Iterator[Finding]:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 2):
            yield Finding("ok", "loopback ports can be opened")
    except OSError as error:
        yield Finding(
            "wrong", f"no port can be opened on loopback: {error}", "torchrun needs one: look at the firewall."
        )
    if not loopback_interface():
        remedy = "Bring it up with `ip link set lo up`; else ranks meet over the interface of this host's name."
        yield Finding("note", "no loopback interface is up", remedy)
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        what = f"this host's name {socket.gethostname()!r} has no address; ranks of one host don't need it"
        yield Finding("note", what, "For a backend of several hosts, add it to /etc/hosts or use serve --interface.")
