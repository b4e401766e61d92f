"""Which backend is meant, how it is started, and whom it serves. These travel as they are."""

from __future__ import annotations

import re
from typing import Literal, get_args

import msgspec

from ..command_line import command_line
from ..errors import ConfigError
from .choices import choose

DeviceType = Literal["cuda", "cpu"]
DEFAULT_IDLE_SECONDS = 1800
LONGEST_IDLE_SECONDS = 1e8


def gpu_numbers(text: str) -> tuple[int, ...]:
    """CUDA ordinals, as a person writes them: 0,1,3. Raises: ConfigError: something else."""
    try:
        return tuple(int(part) for part in text.replace(" ", "").split(",") if part)
    except ValueError:
        raise ConfigError(
            f"devices {text!r} is not a list of GPU numbers.", "Write it like 0,1,3 or leave it empty."
        ) from None


class BackendSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which backend is meant, and how it is started when none of that name runs.

    `devices` lists CUDA ordinals, one per rank; empty means 0, 1, ... in order. With an `address` (tcp://host:port) it is
    one that runs elsewhere, is never started from here, and lets in who has its `keys` (a folder); a world_size of 0 then
    takes any.
    """

    name: str = "default"
    world_size: int = 2
    device: DeviceType = "cpu"
    devices: tuple[int, ...] = ()
    idle_seconds: float = DEFAULT_IDLE_SECONDS
    memory_budget: int = 0
    address: str = ""
    keys: str = ""

    def __post_init__(self) -> None:
        if self.address and not (self.address.startswith("tcp://") and self.address.rpartition(":")[2].isdigit()):
            raise ConfigError(f"Address {self.address!r} can't be used.", "Write it like tcp://host:5555.")
        if self.address and not self.keys:
            raise ConfigError(
                f"{self.address} can't be used without keys.",
                f"Name the folder that `{command_line('keys', 'FOLDER')}` has made.",
            )
        if not self.name or not all(c.isalnum() or c in "-_." for c in self.name) or self.name.startswith("."):
            raise ConfigError(f"Backend name {self.name!r} can't be used.", "Use letters, digits, '-', '_' and '.'.")
        choose(self.device, get_args(DeviceType), "Device")
        if self.world_size < (0 if self.address else 1):
            raise ConfigError(f"world_size={self.world_size} is not possible.", "Use one rank or more.")
        if self.devices and self.device == "cpu":
            raise ConfigError(
                f"devices={','.join(map(str, self.devices))} name GPUs, but the ranks are to run on the CPU.",
                "Leave devices empty, or use device 'cuda'.",
            )
        if self.devices and len(self.devices) != self.world_size:
            raise ConfigError(
                f"{len(self.devices)} devices are named for {self.world_size} ranks.", "Name one device per rank."
            )
        if not 0 < self.idle_seconds <= LONGEST_IDLE_SECONDS:
            raise ConfigError(
                f"idle_seconds={self.idle_seconds} is not possible.", f"Use up to {LONGEST_IDLE_SECONDS:.0f} seconds."
            )
        if self.memory_budget < 0:
            raise ConfigError(f"memory_budget={self.memory_budget} is not possible.", "Use bytes per rank, 0 for none.")


class Hosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A backend's part on this host, of several: `index` 0 is where rank 0 and its socket are, at `rendezvous` (host:port)."""

    count: int = 1
    index: int = 0
    rendezvous: str = ""
    interface: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ConfigError(f"Host {self.index} of {self.count} is not possible.", "Count hosts from 0.")
        if self.count > 1 and not self.rendezvous.rpartition(":")[2].isdigit():
            raise ConfigError(
                f"rendezvous {self.rendezvous!r} can't be used.",
                "Give host 0's address and a free port: 10.0.0.1:29500.",
            )


class ServeSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What only `serve` can set: who may reach the backend, and which files it opens for them.

    `models`: folders below which files are opened; none is any file. `listen`: a tcp:// address beside the local socket, for
    those who have `keys`. `metrics_port`: of the Prometheus page on loopback; 0 is none.
    """

    models: tuple[str, ...] = ()
    listen: str = ""
    keys: str = ""
    metrics_port: int = 0
    hosts: Hosts = Hosts()

    def __post_init__(self) -> None:
        if self.listen and not self.keys:
            raise ConfigError(
                f"{self.listen} is not listened on without keys.", f"Make some with `{command_line('keys', 'FOLDER')}`."
            )
        if self.listen and not re.fullmatch(r"tcp://[^/\s]+:\d+", self.listen):
            raise ConfigError(f"listen {self.listen!r} can't be used.", "Write it like tcp://0.0.0.0:5555.")
        if self.listen and not self.models:
            raise ConfigError(
                "Whoever has the keys could have any file opened.", "Name the model folders with --models."
            )
