"""Whether GPUs read each other's memory."""

from __future__ import annotations

import os

import msgspec
import torch

from .control import Control


class _Card(msgspec.Struct):
    ordinal: int


class _Reaches(msgspec.Struct):
    all: bool


def cards_reach_each_other(device: torch.device, control: Control) -> bool:
    """Whether every rank has a GPU of its own that reads every other's memory itself: in one host, over NVLink or PCIe.

    Comm: two notes of each rank, where they are GPUs of one host.
    """
    one_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == control.world_size
    if device.type != "cuda" or not one_host or os.environ.get("NCCL_P2P_DISABLE", "0") != "0":
        return False
    cards = [note.ordinal for note in control.gather(_Card(device.index))]
    others = cards[: control.rank] + cards[control.rank + 1 :]
    reaches = all(card != device.index and torch.cuda.can_device_access_peer(device.index, card) for card in others)
    return all(note.all for note in control.gather(_Reaches(reaches)))
