"""Residuals of a ControlNet: each rank adds those of its own rows or tokens, and they lie in memory on one machine."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from local_network import local_network
from rank_pool import RankPool, groups
from reference_models import diffusers_mmdit
from safetensors.torch import load_file
from served import POSITIVE
from torch import Tensor
from unet_inputs import unet_prompt

from parallel_backend import Backend, MeshSpec, RemoteModel
from parallel_backend.client.connection import Connection
from parallel_backend.client.sent_tensors import Attachment, SentTensors
from parallel_backend.client.shared_area import SharedArea
from parallel_backend.distributed.mesh import build_mesh
from parallel_backend.errors import InputError, ProtocolError, UnseenTensorsError
from parallel_backend.models.families import SD3, SDXL, Kind
from parallel_backend.models.network import Network
from parallel_backend.models.prediction import Predictor
from parallel_backend.models.residuals import Residuals
from parallel_backend.models.rows import Prompt, Rows
from parallel_backend.models.unet import input_blocks
from parallel_backend.rank.shared_tensors import SharedTensors
from parallel_backend.rpc import shared_memory
from parallel_backend.rpc.headers import SharedPlace, TensorMeta
from parallel_backend.rpc.messages import Forget
from parallel_backend.rpc.shared_memory import folders, new_name
from parallel_backend.small_checkpoints.unet import CONFIGS, random_unet

ROOT = Path(__file__).parents[1]
ROWS, SIZES = 3, [(16, 12), (13, 9)]


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet_residuals(height: int, width: int) -> Residuals:
    """At every second place, and with one row for all at some."""
    places = CONFIGS["tiny"].places

    def tensor(index: int, seed: int) -> Tensor:
        channels, level = places[index]
        rows = 1 if index == 3 else ROWS
        return seeded(rows, channels, -(-height // 2**level), -(-width // 2**level), seed=seed)

    count = range(len(places))
    inputs = [tensor(i, i) if i % 2 else None for i in count]
    outputs = [tensor(i, 10 + i) if i % 2 == 0 or i == 3 else None for i in count]
    return Residuals(inputs, tensor(len(places) - 1, 20), outputs)


def mmdit_residuals(height: int, width: int, depth: int, hidden: int) -> Residuals:
    tokens = -(-height // 2) * -(-width // 2)
    outputs = [seeded(1 if i == 1 else ROWS, tokens, hidden, seed=i) for i in range(depth)]
    return Residuals(output=[None, *outputs[1:]])


def unet_rows(size: tuple[int, int]) -> Rows:
    prompt = Prompt(*unet_prompt(CONFIGS["tiny"], 1, 77, ROWS))
    return Rows(seeded(ROWS, 4, *size, seed=5), torch.tensor([900.0, 500.0, 20.0]), prompt, unet_residuals(*size))


def mmdit_rows(size: tuple[int, int], depth: int, hidden: int) -> Rows:
    prompt = Prompt(POSITIVE.context.expand(ROWS, -1, -1), POSITIVE.pooled.expand(ROWS, -1))
    times, added = torch.tensor([900.0, 500.0, 20.0]), mmdit_residuals(*size, depth, hidden)
    return Rows(seeded(ROWS, 16, *size, seed=5), times, prompt, added)


@cache
def network(path: Path, mesh: MeshSpec) -> Network:
    return local_network(path, build_mesh(mesh, groups()))


@torch.inference_mode()
def output_case(path: Path, mesh: MeshSpec, kind: Kind, rows: Rows) -> Tensor:
    predictor = Predictor(network(path, mesh), build_mesh(mesh, groups()), torch.float32, torch.device("cpu"), kind)
    return predictor.output(rows)


def adding(tensor: Tensor | None) -> Callable[[Any, Any, Any], Any]:
    """A hook that adds to the last of what a block gives."""

    def hook(_: Any, __: Any, out: Any) -> Any:
        if tensor is None:
            return None
        return (*out[:-1], out[-1] + tensor) if isinstance(out, tuple) else out + tensor

    return hook


@cache
def unet_expected(size: tuple[int, int]) -> Tensor:
    model, rows = random_unet(CONFIGS["tiny"]), unet_rows(size)
    given = rows.residuals
    for block, tensor in zip(input_blocks(model), given.input, strict=True):
        block.register_forward_hook(adding(tensor))
    skips = [torch.zeros(()) if tensor is None else tensor for tensor in given.output]
    with torch.inference_mode():
        return model(
            *(rows.x, rows.timesteps, rows.prompt.context),
            class_labels=rows.prompt.pooled,
            down_block_additional_residuals=skips,
            mid_block_additional_residual=given.middle,
        ).sample


UNET_MESHES = [
    *(MeshSpec(patch=degree) for degree in (1, 2, 3, 4)),
    *(MeshSpec(patch=2, sliced=True), MeshSpec(cfg=2), MeshSpec(dp=2), MeshSpec(dp=3), MeshSpec(cfg=2, patch=2)),
]
MMDIT_MESHES = [
    *(MeshSpec(), MeshSpec(ulysses=2), MeshSpec(ring=2), MeshSpec(tp=2), MeshSpec(pp=2), MeshSpec(cfg=2)),
    *(MeshSpec(ring=3), MeshSpec(ulysses=2, tp=2), MeshSpec(ring=2, pp=2), MeshSpec(dp=2, ring=2)),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mesh", UNET_MESHES, ids=MeshSpec.describe)
def test_a_unets_residuals_equal_diffusers(mesh: MeshSpec, size: tuple[int, int], ranks: RankPool, unets: Path) -> None:
    rows, expected = unet_rows(size), unet_expected(size)
    for out in ranks(mesh.world_size, output_case, unets / "unet-tiny.safetensors", mesh, SDXL, rows):
        assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("mesh", MMDIT_MESHES, ids=MeshSpec.describe)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_transformers_residuals_equal_one_process(
    mesh: MeshSpec, size: tuple[int, int], ranks: RankPool, large: Path
) -> None:
    config = network(large, MeshSpec()).config
    rows = mmdit_rows(size, config.depth, config.hidden)
    plain = dataclasses.replace(rows, residuals=Residuals())
    expected, without = (output_case(large, MeshSpec(), SD3, given) for given in (rows, plain))
    assert (expected - without).abs().max() > 1e-2 * expected.abs().max()
    for out in ranks(mesh.world_size, output_case, large, mesh, SD3, rows):
        assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_transformers_residuals_equal_diffusers(large: Path) -> None:
    config = network(large, MeshSpec()).config
    model = diffusers_mmdit(config, load_file(large))
    rows = mmdit_rows((16, 12), config.depth, config.hidden)
    for block, tensor in zip(model.transformer_blocks, rows.residuals.output, strict=True):
        block.register_forward_hook(adding(tensor))
    with torch.inference_mode():
        expected = model(rows.x, rows.prompt.context, rows.prompt.pooled, rows.timesteps, return_dict=False)[0]
    out = output_case(large, MeshSpec(), SD3, rows)
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


WRONG = [
    ({"output": [seeded(1, 64, 5, 5)]}, r"output 0 has shape \[1, 64, 5, 5\]; .* need \(rows, 64, 8, 6\)"),
    ({"input": [None, seeded(1, 128, 8, 6)]}, r"input 1 has shape"),
    ({"middle": [seeded(1, 64, 2, 2)]}, "middle has shape"),
    ({"output": [seeded(2, 64, 8, 6)]}, r"\[2, 64, 8, 6\] came for 3 latents"),
    ({"output": [None] * 9 + [seeded(1, 64, 8, 6)]}, "10 output residuals; this model has 6 places"),
    ({"output": [seeded(1, 12, 64)]}, r"output 0 has shape \[1, 12, 64\]"),
]


@pytest.fixture(scope="module")
def unet(backend2: Backend, unets: Path) -> RemoteModel:
    return backend2.load_model(unets / "unet-tiny.safetensors", MeshSpec(patch=2), "float32")


def evaluated(model: RemoteModel, **more: Any) -> Tensor:
    rows = unet_rows((8, 6))
    return model.forward(rows.x, rows.timesteps, rows.prompt.context, rows.prompt.pooled, **more)


@pytest.mark.parametrize(("residuals", "words"), WRONG, ids=[words[:20] for _, words in WRONG])
def test_residuals_that_do_not_fit_are_named_and_the_next_evaluation_works(
    residuals: dict[str, list[Tensor | None]], words: str, unet: RemoteModel
) -> None:
    with pytest.raises(InputError, match=words):
        evaluated(unet, residuals=residuals)
    assert evaluated(unet).isfinite().all()


def fitting() -> dict[str, list[Tensor | None]]:
    given = unet_residuals(8, 6)
    return {"input": list(given.input), "middle": [given.middle], "output": list(given.output)}


def test_they_lie_in_memory_and_go_by_the_socket_where_ranks_do_not_see_it(unet: RemoteModel) -> None:
    area = unet.backend._sent.area
    assert area is not None
    by_memory = evaluated(unet, residuals=fitting())
    path = area._path
    assert path is not None and path.is_file() and path.stat().st_mode & 0o777 == 0o600
    area._path = path.with_name(new_name())  # ranks of another machine would find no file of that name either
    try:
        by_socket = evaluated(unet, residuals=fitting())
        assert unet.backend._sent.area is None and torch.equal(by_memory, by_socket)
    finally:
        area.close()
        unet.backend._sent.area = SharedArea()
    assert not path.is_file()
    assert torch.equal(evaluated(unet, residuals=fitting()), by_memory)
    assert not torch.equal(evaluated(unet), by_memory)


@pytest.mark.parametrize("first", ["freed", "unseen"])
def test_a_request_whose_tensors_are_freed_and_not_seen_is_answered(
    first: str, unet: RemoteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, exchange, tries = unet.backend, Connection._exchange, [0]
    expected = evaluated(unet, residuals=fitting())
    other, keys, area = Backend.attach("test2"), list(line._sent._copies), line._sent.area
    assert area is not None and area._path is not None
    elsewhere = area._path.with_name(new_name())
    happen = {"freed": lambda: other.request(Forget(keys)), "unseen": lambda: setattr(area, "_path", elsewhere)}

    def exchanged(connection: Connection, *args: Any) -> Any:
        if connection is line:
            if tries[0] == 1:
                happen.popitem()[1]()
            tries[0] += 1
        return exchange(connection, *args)

    happen.pop(first)()
    monkeypatch.setattr(Connection, "_exchange", exchanged)
    try:
        assert torch.equal(evaluated(unet, residuals=fitting()), expected) and tries[0] == 3
    finally:
        area.close()
        line._sent.area = SharedArea()
        other.close()


def test_what_is_laid_is_read_and_rewritten() -> None:
    area, ranks = SharedArea(), SharedTensors()
    sent = SentTensors(area)
    for size in (5, 70, 3):
        tensors = [torch.randn(size, 3), torch.zeros(0, 2), torch.arange(size, dtype=torch.float16)]
        metas, travelling, keys = sent.prepare([Attachment(tensor, shared=True) for tensor in tensors])
        assert not travelling and not keys
        found = ranks.complete(metas, [None] * 3)
        assert all(torch.equal(a, b) for a, b in zip(tensors, found, strict=True))
    name = metas[0].shared.name
    for start, shared, words in ((10**9, name, "ends at byte"), (3, name, "begins at byte 3"), (0, "../x", "no file")):
        lie = TensorMeta("float32", [4], sent=False, shared=SharedPlace(shared, start))
        with pytest.raises(ProtocolError, match=words):
            ranks.complete([lie], [None])
    area.close()
    with pytest.raises(UnseenTensorsError, match=new_name().split("-")[0]):
        SharedTensors().complete(metas, [None] * 3)


def test_where_one_place_is_full_they_lie_in_the_next_and_at_last_go_by_the_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    room, places = {tmp_path / "memory": 2**10, tmp_path / "disk": 2**14}, (tmp_path / "memory", tmp_path / "disk")
    allocate = os.posix_fallocate

    def allocated(file: int, start: int, size: int) -> None:
        if size > room[Path(os.readlink(f"/proc/self/fd/{file}")).parent]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(file, start, size)

    monkeypatch.setattr(os, "posix_fallocate", allocated)
    monkeypatch.setattr(shared_memory, "_FOLDERS", places)
    for place in places:
        place.mkdir()
    area, ranks = SharedArea(), SharedTensors()
    sent = SentTensors(area)
    for count, held in ((100, (1, 0)), (1000, (0, 1)), (100, (0, 1)), (10_000, (0, 0)), (100, (0, 0))):
        tensor = torch.randn(count)
        metas, travelling, _ = sent.prepare([Attachment(tensor, shared=True)])
        (found,) = travelling or ranks.complete(metas, [None])
        assert torch.equal(found, tensor) and bool(travelling) == (held == (0, 0))
        files = [list(place.iterdir()) for place in places]
        assert tuple(map(len, files)) == held
        assert all(file.stat().st_blocks * 512 >= file.stat().st_size for here in files for file in here)
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(": ")[2] for line in said] == [f"they go in {places[1]} instead", "they go by the socket"]


# It may have any number, as in a container: that of none here.
OTHER_CLIENT = """
import os, sys
os.getpid = lambda: 2**22 + 1
import torch
from parallel_backend.client.shared_area import SharedArea
area = SharedArea()
print(area.lay([torch.zeros(3)])[0].name, flush=True)
input()
"""


def test_files_of_processes_that_have_ended_are_removed_and_no_others() -> None:
    command = [sys.executable, "-c", OTHER_CLIENT]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        path = folders()[0] / other.stdout.readline().strip()
        for is_alive in (True, False):
            area = SharedArea()
            assert area.lay([torch.zeros(3)])
            area.close()
            assert path.is_file() == is_alive
            other.kill()
            other.wait()
