"""A rank that runs out of memory in the middle of bands: all ranks hear of it, none waits, and the next job runs."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from test_vae import FILES
from torch import Tensor

from parallel_backend import Backend
from parallel_backend.checkpoint_files.content import content_key
from parallel_backend.distributed.band_attention import BandImageAttention
from parallel_backend.distributed.band_conv import BandConv2d
from parallel_backend.distributed.band_norm import BandGroupNorm
from parallel_backend.distributed.control import Control
from parallel_backend.distributed.device_faults import OutOfStep, breaks_rank
from parallel_backend.errors import CancelledError, OutOfMemoryError
from parallel_backend.models import vae
from parallel_backend.rank.engine import Engine
from parallel_backend.rank.jobs import Job
from parallel_backend.rpc.headers import RequestHeader
from parallel_backend.rpc.messages import Decode, Encode, Loaded, LoadVAE
from parallel_backend.rpc.wire import tensor_meta

pytestmark = pytest.mark.busy

NO_MEMORY = "CUDA out of memory. Tried to allocate 2.00 MiB."
# Before a layer's exchange, between two, and after the last.
PLACES = {
    "first convolution": (BandConv2d, "forward", 1),
    "after its exchange": (BandConv2d, "of_rows", 4),
    "before a norm's": (BandGroupNorm, "on_cpu", 2),
    "attention": (BandImageAttention, "forward", 1),
    "of the second image": (BandConv2d, "of_rows", 30),
}


class Ranks:
    """This rank with a VAE in it."""

    def __init__(self, models: Path, name: str) -> None:
        self.engine, self.control, self.gives_up = Engine(torch.device("cpu")), Control(), False
        self.job = Job(self.control, lambda body, tensors: None, lambda: self.gives_up and self.control.rank == 0)
        paths = [models / file for file in FILES[name]]
        load = LoadVAE(list(map(str, paths)), "-".join(map(content_key, paths)), "float32")
        loaded, _ = self.engine.handle(RequestHeader(1, load), [], self.job)
        assert isinstance(loaded, Loaded)
        self.vae = loaded

    def __call__(self, what: type[Decode | Encode]) -> list[Tensor]:
        shape = (2, 5, 3) if what is Decode else (2, 40, 24)
        x = torch.linspace(0, 1, 2 * 15 * (self.vae.channels if what is Decode else 192))
        x = x.view(2, self.vae.channels, *shape[1:]) if what is Decode else x.view(*shape, 3)
        return self.engine.handle(RequestHeader(2, what(self.vae.model, 0), [tensor_meta(x)]), [x], self.job)[1]


@contextmanager
def lacking(owner: object, name: str, call: int) -> Iterator[None]:
    """The method lacks memory when it is called for the `call`th time."""
    own, calls = getattr(owner, name), [0]

    def method(layer: object, x: Tensor, **more: object) -> object:
        calls[0] += not x.is_meta
        if calls[0] == call and not x.is_meta:
            raise torch.OutOfMemoryError(NO_MEMORY)
        return own(layer, x, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(owner, name, method)
        yield


def lacking_case(models: Path, name: str, what: type[Decode | Encode], places: list[str], who: tuple[int, ...]) -> str:
    """What this rank is told where those ranks lack memory at each of these places; the jobs after it are as before."""
    ranks, said = Ranks(models, name), set()
    before = ranks(what)
    for place in places:
        owner, method, call = PLACES[place]
        here = call if ranks.control.rank in who else 0
        with lacking(owner, method, here), pytest.raises(OutOfMemoryError) as caught:
            ranks(what)
        said.add(caught.value.message.partition(":")[0])
        assert all(map(torch.equal, ranks(what), before)), place
    ranks.gives_up = True
    with pytest.raises(CancelledError):
        ranks(what)
    ranks.gives_up = False
    assert all(map(torch.equal, ranks(what), before))
    (only,) = said
    return only


@pytest.mark.parametrize("what", [Decode, Encode])
@pytest.mark.parametrize(("world_size", "who"), [(1, (0,)), (2, (1,)), (2, (0, 1)), (3, (0,)), (3, (1,))], ids=str)
def test_all_ranks_hear_of_the_one_that_lacks_memory(
    what: type[Decode | Encode], world_size: int, who: tuple[int, ...], ranks: RankPool, models: Path
) -> None:
    places = [place for place in PLACES if world_size > 1 or place == "first convolution"]
    said = ranks(world_size, lacking_case, models, "kl-16", what, places, who)
    assert said == [f"Rank {who[0]} on cpu is out of memory"] * world_size


def test_a_rank_without_a_band_hears_of_it_too(ranks: RankPool, models: Path) -> None:
    """5 rows on 4 ranks are 2 + 1 + 1 + 1; TAESD has no norms, and its layers have other shapes."""
    said = ranks(4, lacking_case, models, "taesd3", Decode, ["first convolution", "after its exchange"], (3,))
    assert said == ["Rank 3 on cpu is out of memory"] * 4


def no_room_case(models: Path) -> str:
    """Rank 0 has no room for the others' bands."""
    ranks = Ranks(models, "kl-16")
    with pytest.MonkeyPatch.context() as patched, pytest.raises(OutOfMemoryError) as caught:
        if ranks.control.rank == 0:
            patched.setattr(vae, "slots_on_first", no_memory)
        ranks(Decode)
    return f"{caught.value.message.partition(':')[0]}, {len(ranks(Decode))}"


def stuck_case(models: Path) -> bool:
    """Rank 1 has no memory even for its part of the others' exchanges."""
    ranks = Ranks(models, "kl-16")
    ranks(Decode)
    if ranks.control.rank == 0:
        return True  # it would wait until rank 1's end is seen
    held: Any = ranks.engine.residents[ranks.vae.model].model
    with pytest.MonkeyPatch.context() as patched, pytest.raises(OutOfStep) as caught:
        patched.setattr(BandConv2d, "forward", no_memory)
        held._bands(held._decoded, torch.zeros(1, 16, 2, 3), 8)
    return breaks_rank(caught.value) and isinstance(ranks.control.named(caught.value), OutOfMemoryError)


def test_a_rank_that_can_t_give_the_others_anything_ends(ranks: RankPool, models: Path) -> None:
    assert ranks(2, stuck_case, models) == [True, True]


def no_memory(*_: object) -> None:
    raise torch.OutOfMemoryError(NO_MEMORY)


def test_rank_0_without_room_for_the_image_leaves_no_other_waiting(ranks: RankPool, models: Path) -> None:
    assert ranks(2, no_room_case, models) == [f"Rank 0 on cpu is out of memory, {i}" for i in (1, 0)]


def limit_memory(pid: int, more: int | None) -> None:
    """The process may take so many bytes more than it has; None takes the limit away."""
    with open(f"/proc/{pid}/status") as lines:
        size = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize"))
    limit = resource.RLIM_INFINITY if more is None else size + more
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def test_a_backend_whose_rank_lacks_memory_stays_and_decodes_what_fits(models: Path, backend2: Backend) -> None:
    vae = backend2.load_vae(models / "vae" / "sd3_vae.safetensors", "float32")
    small, large = torch.rand(1, 16, 8, 8), torch.rand(1, 16, 128, 96)
    before, generation, pid = vae.decode(small), backend2.generation, backend2.status().ranks[1].pid
    limit_memory(pid, 200 * 2**20)
    try:
        with pytest.raises(OutOfMemoryError, match=r"Rank 1 on cpu is out of memory: .* were asked for"):
            vae.decode(large)
        assert torch.equal(vae.decode(small), before)
    finally:
        limit_memory(pid, None)
    assert backend2.generation == generation and vae.name in [model.model for model in backend2.status().models]
