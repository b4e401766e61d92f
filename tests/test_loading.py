"""How weights come from a file onto a device: through pinned buffers, cast there, and read in shares."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool
from torch import Tensor

from parallel_backend import MeshSpec
from parallel_backend.checkpoint_files.content import content_key
from parallel_backend.distributed import peer_access
from parallel_backend.distributed.control import Control
from parallel_backend.distributed.mesh import BandAxes, build_mesh
from parallel_backend.distributed.peer_access import cards_reach_each_other
from parallel_backend.errors import BackendError, CancelledError
from parallel_backend.models import checkpoint, staging, vae_checkpoint
from parallel_backend.models.checkpoint import load_parameters
from parallel_backend.models.families import open_model
from parallel_backend.models.shared_reading import readers
from parallel_backend.models.staging import Staging, placing
from parallel_backend.rank import engine as engine_module
from parallel_backend.rank.engine import Engine
from parallel_backend.rank.jobs import Job
from parallel_backend.rpc.headers import RequestHeader
from parallel_backend.rpc.messages import Loaded, LoadModel
from parallel_backend.small_checkpoints.mmdit import small_config, write_mmdit

CPU = torch.device("cpu")
BUFFER = 1024


@dataclass
class Link:
    """The way to a card: what is sent from a buffer must stay there until somebody has waited for its arrival."""

    under_way: dict[int, Tensor] = field(default_factory=dict)
    most: int = 0
    copies: int = 0

    def send(self, to: Tensor, pinned: Tensor) -> Link.Copy:
        assert to.dtype == pinned.dtype, "torch would cast this on the CPU"
        assert pinned.nbytes <= BUFFER and pinned.data_ptr() not in self.under_way
        to.copy_(pinned)
        self.under_way[pinned.data_ptr()] = pinned.clone()
        self.most, self.copies = max(self.most, len(self.under_way)), self.copies + 1
        return Link.Copy(self, pinned)

    @dataclass
    class Copy:
        link: Link
        pinned: Tensor

        def synchronize(self) -> None:
            assert torch.equal(self.link.under_way.pop(self.pinned.data_ptr()), self.pinned)


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Link:
    """Loading goes over a link to a card, which is this CPU in truth."""
    link = Link()
    monkeypatch.setattr(checkpoint, "placing", lambda device: staged(link))
    monkeypatch.setattr(vae_checkpoint, "placing", lambda device: staged(link))
    return link


def staged(link: Link) -> staging.Place:
    return Staging(CPU, [torch.empty(BUFFER, dtype=torch.uint8) for _ in range(2)], link.send).place


TENSORS: dict[str, Callable[[], Tensor]] = {
    "a number": lambda: torch.randn(()),
    "nothing": lambda: torch.randn(0, 7),
    "a small one": lambda: torch.randn(3, 5),
    "rows": lambda: torch.randn(100, 30),
    "rows longer than a buffer": lambda: torch.randn(3, 2000),
    "one row": lambda: torch.randn(5000),
    "a kernel": lambda: torch.randn(40, 9, 3, 3),
    "a slice of columns": lambda: torch.randn(100, 60)[:, 7:50],
    "long rows of a slice": lambda: torch.randn(4, 3000)[:, 100:2900],
    "turned": lambda: torch.randn(60, 70).t(),
}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("file_dtype", [torch.float32, torch.float16], ids=str)
def test_a_tensor_arrives_bit_for_bit_and_is_cast_there(kind: str, file_dtype: torch.dtype, dtype: torch.dtype) -> None:
    link, tensor = Link(), TENSORS[kind]().to(file_dtype)
    placed = staged(link)(tensor, dtype)
    assert placed.dtype == dtype and placed.is_contiguous() and torch.equal(placed, tensor.to(dtype))
    assert link.copies >= tensor.numel() * tensor.element_size() / BUFFER
    assert link.most == min(link.copies, 2)  # two are in flight


def test_a_cpu_takes_its_own_copy_directly() -> None:
    whole = torch.randn(10, 10)
    placed = placing(CPU)(whole[2:5], torch.float32)
    assert torch.equal(placed, whole[2:5]) and placed.untyped_storage().nbytes() == placed.nbytes


@pytest.fixture(scope="module")
def half_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("half") / "m.safetensors"
    return write_mmdit(path, small_config("sd3.5-medium", depth=2), dtype=torch.float16)


def loaded(path: Path, spec: MeshSpec = MeshSpec(), **settings: object) -> dict[str, Tensor]:  # noqa: B008 - frozen
    opened = open_model(path)
    with torch.device("meta"):
        model = opened.build(build_mesh(spec), "native")
    settings = {"device": CPU, "dtype": torch.bfloat16} | settings
    load_parameters(model, opened.source, unread=opened.unread(model), **settings)  # type: ignore[arg-type]
    return dict(model.named_parameters())


def test_a_model_that_came_over_a_link_is_the_files(half_file: Path, link: Link) -> None:
    over_link = loaded(half_file)
    assert link.copies > len(over_link)
    with patch.object(checkpoint, "placing", placing):
        directly = loaded(half_file)
    assert all(torch.equal(over_link[name], directly[name]) for name in directly)


def test_a_vae_that_came_over_a_link_is_the_files(models: Path, link: Link) -> None:
    def weights() -> dict[str, Tensor]:
        opened = vae_checkpoint.open_vae([models / "vae" / "sdxl_vae.safetensors"])
        return opened.build(CPU, torch.bfloat16, BandAxes()).model.state_dict()

    over_link = weights()
    assert link.copies > len(over_link)
    with patch.object(vae_checkpoint, "placing", placing):
        directly = weights()
    assert all(torch.equal(over_link[name], directly[name]) for name in directly)


def test_a_load_over_a_link_is_cancelled_between_two_tensors(half_file: Path, link: Link) -> None:
    loaded(half_file)
    whole = link.copies
    link.under_way.clear()
    asked = iter([False] * 5 + [True])
    with pytest.raises(CancelledError):
        loaded(half_file, should_stop=lambda: next(asked))
    assert whole < link.copies < 1.5 * whole


# -- in shares --------------------------------------------------------------------------------------------------


def test_shares_of_the_reading_are_about_equal_and_each_tensor_is_in_one() -> None:
    sizes = {f"{i}": 1000 - i for i in range(50)} | {"large": 9000, "bias": 3}
    chosen = readers(sizes, 4)
    assert chosen.keys() == sizes.keys()
    read = [sum(sizes[name] for name in sizes if chosen[name] == rank) for rank in range(4)]
    assert max(read) - min(read) <= 1000
    assert readers(dict(reversed(sizes.items())), 4) == chosen


def load_in_shares(path: Path, spec: MeshSpec, failing: int | None = None) -> tuple[list[int], bool] | str:
    """What each rank read, and whether it holds all; or the code of the error. Rank `failing` can't read."""
    engine, control = Engine(CPU), Control()
    job = Job(control, lambda body, tensors: None, lambda: False)
    header = RequestHeader(1, LoadModel(str(path), content_key(path), "float32", spec))

    def unreadable(*_: object) -> Tensor:
        raise OSError("the disk is gone")

    def place(device: torch.device) -> staging.Place:
        return unreadable if control.rank == failing else placing(device)

    with (
        patch.object(engine_module, "cards_reach_each_other", lambda *_: True),
        patch.object(checkpoint, "placing", place),
    ):
        try:
            reply, _ = engine.handle(header, [], job)
        except BackendError as error:
            ones = torch.ones(1)
            dist.all_reduce(ones)  # the ranks are in step
            return f"{error.code}: {error.message}" if ones == dist.get_world_size() else "out of step"
    assert isinstance(reply, Loaded)
    network = engine.residents[reply.model].model.network
    held, whole = dict(network.model.named_parameters()), loaded(path, spec, dtype=torch.float32)
    return reply.bytes_read, all(torch.equal(held[name], whole[name]) for name in whole)


@pytest.mark.parametrize("spec", [MeshSpec(cfg=2), MeshSpec(cfg=2, ulysses=2)], ids=MeshSpec.describe)
def test_ranks_that_hold_the_same_read_a_share_each(spec: MeshSpec, half_file: Path, ranks: RankPool) -> None:
    opened = open_model(half_file)
    unread = {"pos_embed"}
    whole = sum(2 * torch.Size(opened.source.shape(n)).numel() for n in opened.source.names() if n not in unread)
    for bytes_read, complete in ranks(spec.world_size, load_in_shares, half_file, spec):
        assert complete and sum(bytes_read) == whole
        assert max(bytes_read) < 1.2 * whole / spec.world_size


def test_ranks_that_hold_slices_read_their_own(half_file: Path, ranks: RankPool) -> None:
    (first, _), _ = ranks(2, read_slices, half_file)
    assert min(first) == max(first)


def read_slices(path: Path) -> tuple[list[int], bool]:
    """As `load_in_shares`; no weights are compared."""
    engine = Engine(CPU)
    job = Job(Control(), lambda body, tensors: None, lambda: False)
    header = RequestHeader(1, LoadModel(str(path), content_key(path), "float32", MeshSpec(tp=2)))
    with patch.object(engine_module, "cards_reach_each_other", lambda *_: True):
        reply, _ = engine.handle(header, [], job)
    assert isinstance(reply, Loaded)
    return reply.bytes_read, True


@pytest.mark.parametrize("failing", [0, 1])
def test_a_share_that_cant_be_read_ends_the_load_alike_on_all_ranks(
    failing: int, half_file: Path, ranks: RankPool
) -> None:
    told = ranks(2, load_in_shares, half_file, MeshSpec(cfg=2), failing)
    assert told[0] == told[1] and f"rank: Rank {failing} failed: OSError: the disk is gone" in told[0]


def reach(cards: list[int], disabled: bool) -> bool:
    rank, environ = dist.get_rank(), {"LOCAL_WORLD_SIZE": "2"} | ({"NCCL_P2P_DISABLE": "1"} if disabled else {})
    with (
        patch.dict(os.environ, environ),
        patch.object(peer_access.torch.cuda, "can_device_access_peer", lambda own, other: (own, other) != (1, 2)),
    ):
        return cards_reach_each_other(torch.device("cuda", cards[rank]), Control())


@pytest.mark.parametrize(
    ("cards", "disabled", "reached"),
    [
        ([0, 1], False, True),
        ([1, 2], False, False),
        ([2, 1], False, False),
        ([0, 0], False, False),
        ([0, 1], True, False),
    ],
    ids=["all", "not the second", "not the first", "one card for two", "forbidden"],
)
def test_whether_cards_reach_each_other_is_one_answer_for_all_ranks(
    cards: list[int], disabled: bool, reached: bool, ranks: RankPool
) -> None:
    assert ranks(2, reach, cards, disabled) == [reached, reached]


def test_ranks_on_cpus_read_from_the_page_cache() -> None:
    assert not cards_reach_each_other(CPU, Control())
