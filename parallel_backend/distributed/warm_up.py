"""The communicators of a mesh, made before anything else takes their memory.

NCCL joins ranks at their first message: all members stand still for it, and it takes up to hundreds of MB of a GPU. Here it
happens when a model is loaded, so that what is free afterwards is free, and a link that fails is named before the first
picture. Gloo has its connections since the group was made; there this is a handful of messages.
Source: ProcessGroupNCCL, whose point-to-point messages have a communicator for each pair of ranks, unless they are batched.
"""

from __future__ import annotations

import torch

from .collectives import (
    Handle,
    all_to_all,
    start_all_reduce,
    start_receive,
    start_ring_exchange,
    start_send,
)
from .mesh import Mesh, MeshAxis


def warm_up(mesh: Mesh, device: torch.device) -> None:
    """Every communicator that this rank uses in a job on `mesh` is there.

    Comm: an all-reduce of one element over each axis, and where ranks send each other messages, one of those; over pp, a byte to
    the next stage, and from the last to the first.
    """
    one = torch.ones(1, device=device)
    for axis in mesh.axes:  # not first_stage, which sends flags on the CPU alone
        start_all_reduce(one.clone(), axis).wait()
    # Ranks that send each other messages are connected pair by pair, at the first one.
    for axis in (mesh.ulysses, mesh.patch):
        ones = [1] * axis.degree
        all_to_all(one.repeat(len(ones)), ones, ones, axis)
    if mesh.ring.degree > 1:
        start_ring_exchange(one, (1,), mesh.ring).wait()
    if mesh.pp.degree > 1:
        _meet_neighbours(mesh.pp, device)
        _meet_over_the_way_back(mesh.way_back, device)


def _meet_neighbours(pp: MeshAxis, device: torch.device) -> None:
    """Pairs meet one after the other, from the first stage on: no rank waits for one that waits for it."""
    if pp.rank > 0:
        _receive(pp.rank - 1, pp, device).wait()
    if pp.rank < pp.degree - 1:
        _send(pp.rank + 1, pp, device).wait()


def _meet_over_the_way_back(way_back: MeshAxis, device: torch.device) -> None:
    last = way_back.degree - 1
    if way_back.rank == last:
        _send(0, way_back, device).wait()
    elif way_back.rank == 0:
        _receive(last, way_back, device).wait()


def _send(to: int, axis: MeshAxis, device: torch.device) -> Handle:
    return start_send(torch.zeros(1, dtype=torch.uint8, device=device), to, axis)


def _receive(source: int, axis: MeshAxis, device: torch.device) -> Handle:
    return start_receive(torch.empty(1, dtype=torch.uint8, device=device), source, axis)
