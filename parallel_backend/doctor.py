"""One page about this installation: what is wrong with it, and what to do."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement

from .client.backend import Backend
from .client.cards import choose_ranks, seen
from .client.environment import loopback_interface
from .client.gpu_environment import difference
from .client.links import measure_links, prove_links
from .client.requirements import COMMANDS_NEED, FILES_NEED, RANKS_NEED, shortfall
from .command_line import command_line
from .config import BackendSpec
from .distributed.device_memory import memory_of
from .errors import BackendError, ConfigError
from .rpc import runtime_dir as files
from .version import __version__

Verdict = Literal["ok", "note", "wrong"]
OPTIONAL = {
    "flash-attn": "attention kernel 'flash'; torch's own is as fast",
    "prometheus-client": "serve --metrics-port",
}
LEAST_FREE = 256 * 2**20


@dataclass(frozen=True)
class Finding:
    """`remedy` is what to do about a note or what is wrong."""

    verdict: Verdict
    what: str
    remedy: str = ""


def examine() -> list[Finding]:
    """All findings, in the order of the page."""
    parts: list[Callable[[], Iterator[Finding]]] = [versions, devices, folders, network, links, backends]
    return [finding for part in parts for finding in part()]


def versions() -> Iterator[Finding]:
    yield Finding("ok", f"parallel-mmdit {__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    for requirement in (*RANKS_NEED, *COMMANDS_NEED, *FILES_NEED):
        if short := shortfall(requirement):
            yield Finding("wrong", f"parallel-mmdit {short.what}", short.remedy)
        else:
            name = Requirement(requirement).name
            yield Finding("ok", f"{name} {importlib.metadata.version(name)}")
    for name, use in OPTIONAL.items():
        try:
            yield Finding("ok", f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            yield Finding("note", f"{name} is not installed: no {use}", f"pip install {name}, if you want it")
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        yield Finding(
            "wrong", "this torch was built without torch.distributed or gloo", "Install torch from pytorch.org."
        )


def devices() -> Iterator[Finding]:
    here = seen()
    kind, count = ("cuda" if here.cards else "cpu"), len(here.cards)
    if here.other:
        yield Finding("note", f"this machine has {here.other}, which ranks can't use", "Use NVIDIA or AMD GPUs.")
    if hidden := here.hidden():
        yield Finding("note", hidden, "Unset CUDA_VISIBLE_DEVICES for all of them.")
    if kind == "cpu":
        built = torch.version.cuda or torch.version.hip
        if built:
            remedy = "See that nvidia-smi lists your GPUs, and that CUDA_VISIBLE_DEVICES names them."
            yield Finding("wrong", f"torch is built for CUDA {built}, but sees no GPU", remedy)
        else:
            yield Finding("note", "torch is built for CPUs: everything works, slowly", "Install a CUDA build for GPUs.")
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
        yield Finding("wrong", f"no backend can be started or found: {error.message}", error.remedy)
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


def links() -> Iterator[Finding]:
    """Ranks as a backend would have them, started for this: on GPUs a link that is broken is silent, and is met in no other way."""
    here = seen()
    ranks = choose_ranks(here, "cuda" if here.cards else "cpu")
    if ranks.count < 2:
        return
    try:
        figures = prove_links(BackendSpec("doctor", ranks.count, ranks.device, ranks.devices))
    except BackendError as error:
        yield Finding("wrong", error.message, error.remedy)
        return
    yield from (Finding("ok", f"{ranks.count} ranks on {ranks.device}: {figure}") for figure in figures)


def print_links() -> None:
    """Prints what messages of each kind take between ranks as a backend would have them.

    Raises: ConfigError: there is one rank alone. StartError: they don't hear each other.
    """
    here = seen()
    ranks = choose_ranks(here, "cuda" if here.cards else "cpu")
    if ranks.count < 2:
        raise ConfigError("One GPU has no link to another.", "Nothing is to be measured here.")
    print(f"{ranks.count} ranks on {ranks.device}; seconds and bytes are one rank's\n")
    print("| message | bytes sent | ms | GB/s |\n|---|---|---|---|")
    for kind, nbytes, seconds in measure_links(BackendSpec("doctor", ranks.count, ranks.device, ranks.devices)):
        print(f"| {kind} | {nbytes:,} | {seconds * 1000:.3f} | {nbytes / seconds / 1e9:.2f} |")


def backends() -> Iterator[Finding]:
    running = files.running_names()
    for name in running:
        record = files.read_record(name)
        if record is not None and record.version != __version__:
            what = f"backend {name!r} runs version {record.version}, this is {__version__}"
            yield Finding(
                "wrong",
                what,
                f"Queue a prompt, which restarts it where nobody works with it; or run `{command_line('stop', '--name', name)}`.",
            )
            continue
        try:
            backend = Backend.attach(name)
            state = backend.status()
            backend.close()
        except BackendError as error:
            yield Finding("wrong", f"backend {name!r} doesn't answer: {error.message}", error.remedy)
            continue
        if record is not None and (other := difference(name, record, os.environ, [card.uuid for card in seen().cards])):
            yield Finding("note", *other)
        line = f"backend {name!r}: {len(state.ranks)} ranks, {state.jobs_done} jobs, {state.restarts} restarts"
        yield Finding("note" if state.restarts else "ok", line, "Its log says why." if state.restarts else "")
    try:
        left = sorted(files.runtime_root().glob("*/backend.json"))
    except BackendError:
        return  # `folders` has said so
    for path in left:
        try:
            restarting = files.restarting(path.parent.name)
        except BackendError as error:
            yield Finding("wrong", f"{path} can't be looked at: {error.message}", error.remedy)
            continue
        if restarting:
            yield Finding("note", f"backend {path.parent.name!r} is starting its ranks anew", "Its log says why.")
        elif path.parent.name not in running:
            yield Finding("note", f"{path} is of a backend that is gone", "Nothing: the next start takes its place.")


def print_page() -> bool:
    """Prints the findings; whether nothing is wrong."""
    found = examine()
    for finding in found:
        print(f"{finding.verdict:<6} {finding.what}" + (f"\n       -> {finding.remedy}" if finding.remedy else ""))
    wrong = sum(finding.verdict == "wrong" for finding in found)
    print(f"{wrong} wrong" if wrong else "nothing is wrong")
    return not wrong
