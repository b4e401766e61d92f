"""The GPUs that this process sees, which of them ranks take by themselves, and what is hidden from it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ..config import DeviceType
from ..errors import ConfigError

# The variables that hide GPUs from a process; AMD's heed all, the first that is set is told.
HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
CPU_RANKS = 2
_DRIVER = Path("/proc/driver/nvidia/gpus")
_AMD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")


@dataclass(frozen=True)
class Card:
    """A GPU; `uuid` is its own wherever it is counted from, and empty where torch doesn't tell."""

    name: str
    capability: tuple[int, int]
    total_bytes: int
    processors: int
    uuid: str

    @property
    def kind(self) -> tuple[str, tuple[int, int], int]:
        """What cards of equal speed and size share; a few MiB differ between boards."""
        return self.name, self.capability, round(self.total_bytes / 2**30)

    @property
    def strength(self) -> tuple[float, int]:
        """Orders kinds roughly by how fast they are, then by their memory."""
        return self.processors * (self.capability[0] + self.capability[1] / 10), self.total_bytes

    def describe(self) -> str:
        return f"{self.name}, {self.total_bytes / 2**30:.0f} GiB"


@dataclass(frozen=True)
class Seen:
    """What a process sees: its `cards` by number, and another kind of accelerator, if any.

    `visible` is the value of the variable `by`, which hides others, and `present` how many GPUs the machine has; None where
    there is none, or it isn't known.
    """

    cards: tuple[Card, ...] = ()
    visible: str | None = None
    present: int | None = None
    other: str = ""
    by: str = HIDING[0]

    @property
    def narrowed(self) -> bool:
        """Whether there may be GPUs that are hidden from it."""
        return self.visible is not None and (self.present is None or self.present > len(self.cards))

    def hidden(self) -> str:
        """A sentence that says so where it is known; else empty."""
        if not self.narrowed or self.present is None:
            return ""
        number = len(self.cards)
        return (
            f"{number} of {self.present} GPUs {'is' if number == 1 else 'are'} visible here: {self.by}={self.visible} "
            "(ComfyUI's --cuda-device sets it)."
        )

    def uuids(self, ordinals: Sequence[int]) -> list[str]:
        """Of the cards of these numbers; none where one isn't here or not known."""
        found = [self.cards[number].uuid for number in ordinals if 0 <= number < len(self.cards)]
        return found if len(found) == len(ordinals) and all(found) else []


@dataclass(frozen=True)
class Ranks:
    """How many ranks on which devices, and what to tell of the choice."""

    device: DeviceType
    count: int
    devices: tuple[int, ...] = ()
    note: str = ""


def seen(device: DeviceType | None = None) -> Seen:
    """By this process, now; nothing where ranks are to run on the CPU, which is not worth CUDA's start."""
    if device == "cpu":
        return Seen()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cards = tuple(_card(number) for number in range(count))
    by = next((name for name in hiding() if name in os.environ), HIDING[0])
    visible = os.environ.get(by)
    return Seen(cards, visible, None if visible is None else present(), "" if cards else _other(), by)


def hiding() -> tuple[str, ...]:
    """The variables that this torch's GPUs are hidden by."""
    return HIDING if torch.version.hip else HIDING[:1]


def choose_ranks(
    here: Seen, device: DeviceType | None = None, count: int | None = None, devices: Sequence[int] = ()
) -> Ranks:
    """The ranks that are asked for; what is left open: the cards of the best one's kind, or two ranks on the CPU.

    Raises: ConfigError: nothing was said, and what is here is an accelerator of another kind.
    """
    if device is None and not here.cards and here.other and not devices:
        raise ConfigError(
            f"This machine has {here.other}; ranks run on NVIDIA and AMD GPUs, by torch.cuda.",
            "Set device to 'cpu' to run on the CPU all the same, or name the address of a backend that has GPUs.",
        )
    if device == "cpu" or (device is None and not here.cards):
        return Ranks("cpu", count or len(devices) or CPU_RANKS, tuple(devices), here.hidden() if device is None else "")
    if devices or not here.cards:
        return Ranks("cuda", count or len(devices) or CPU_RANKS, tuple(devices), here.hidden())
    best = max(here.cards, key=lambda card: card.strength).kind
    alike = [number for number, card in enumerate(here.cards) if card.kind == best]
    left_out = "" if count else _left_out(here.cards, alike)
    chosen = alike[: count or None] if (count or 0) <= len(alike) else list(range(count or 0))
    named = () if chosen == list(range(len(chosen))) else tuple(chosen)
    return Ranks("cuda", len(chosen), named, " ".join(filter(None, [here.hidden(), left_out])))


def _left_out(cards: Sequence[Card], alike: Sequence[int]) -> str:
    others = [f"GPU {n} ({card.describe()})" for n, card in enumerate(cards) if n not in alike]
    if not others:
        return ""
    best = f"{len(alike)} x {cards[alike[0]].describe()}"
    return f"Left out: {', '.join(others)}; ranks share alike, on {best}. Name them in devices to use them too."


def _card(number: int) -> Card:
    found = torch.cuda.get_device_properties(number)
    capability = (found.major, found.minor)
    return Card(
        found.name, capability, found.total_memory, found.multi_processor_count, str(getattr(found, "uuid", ""))
    )


def _other() -> str:
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return "an Intel GPU (torch.xpu)"
    if torch.backends.mps.is_available():
        return "an Apple GPU (torch.mps)"
    return ""


@cache
def present() -> int | None:
    """GPUs of the machine, or of the container; None where the driver doesn't tell."""
    if torch.version.hip:
        return _amd_present() or None
    if _DRIVER.is_dir():
        return len(list(_DRIVER.iterdir())) or None
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        done = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=3, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines()) or None


def _amd_present() -> int:
    """Nodes of the driver that have SIMD units; the others are CPUs. A container may be kept from reading some."""
    counts = []
    for node in _AMD_NODES.glob("*/properties"):
        with suppress(OSError):
            counts += [line.split()[1] for line in node.read_text().splitlines() if line.startswith("simd_count ")]
    return sum(count != "0" for count in counts)
