"""The switch for graphs: where it is refused, what it changes of a resident model, what is told, and when graphs leave."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from fake_cuda.device import fake_cuda, on_cuda
from fake_cuda.networks import Config, Evaluations, from_scratch, large, predictor, shallow_sdxl
from fake_cuda.watch import Watch
from rank_pool import RankPool
from recordings import Recorder
from test_weight_patches import QKV, low_rank
from torch import Tensor

from parallel_backend.checkpoint_files.content import content_key
from parallel_backend.checkpoint_files.patch_file import write_low_rank
from parallel_backend.config import MeshSpec, SamplerSpec, StepCache
from parallel_backend.distributed.control import Control
from parallel_backend.distributed.stale import Step
from parallel_backend.errors import ConfigError
from parallel_backend.models.captured import CapturedNetwork
from parallel_backend.models.cuda_graphs import check_graphs
from parallel_backend.models.prediction import Predictor, timesteps_of
from parallel_backend.rank import engine as engine_module
from parallel_backend.rank import residents as residents_module
from parallel_backend.rank.engine import Engine
from parallel_backend.rank.jobs import Job
from parallel_backend.rank.residents import Residents
from parallel_backend.rpc.headers import RequestHeader
from parallel_backend.rpc.messages import (
    Decode,
    Encode,
    Forward,
    Loaded,
    LoadModel,
    LoadVAE,
    Patches,
    Prompt,
    Request,
    Result,
    Sample,
)
from parallel_backend.rpc.wire import tensor_meta
from parallel_backend.small_checkpoints.prompts import random_prompt

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Rank:
    """An engine that takes recordings for CUDA's graphs; each load that asks for some gets `recorders[-1]`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, patches: Path = Path(), *, fails: bool = False) -> None:
        self.recorders: list[Recorder] = []

        def recorder(_: torch.device) -> Recorder:
            self.recorders.append(Recorder(fails=fails))
            return self.recorders[-1]

        monkeypatch.setattr(engine_module, "check_graphs", lambda device, *, sliced: None)
        monkeypatch.setattr(engine_module, "CUDAGraphs", recorder)
        self.engine = Engine(CPU, patches_folder=patches)
        self.control = Control()

    def ask(self, body: Request, tensors: Sequence[Tensor] = ()) -> tuple[Any, list[Tensor]]:
        header = RequestHeader(1, body, [tensor_meta(tensor) for tensor in tensors])
        job = Job(self.control, lambda body, tensors: None, lambda: False)
        return self.engine.handle(header, list(tensors), job)

    def load(self, path: Path, mesh: MeshSpec = MeshSpec(), **settings: Any) -> Loaded:  # noqa: B008 - frozen
        return self.ask(LoadModel(str(path), content_key(path), "float32", mesh, **settings))[0]

    def sample(self, model: str, patches: Patches = Patches(), **settings: Any) -> tuple[Result, Tensor]:  # noqa: B008
        spec = SamplerSpec(**({"steps": 4, "cfg_scale": 4.0} | settings))
        tensors = [torch.zeros(1, 16, 8, 8), *random_prompt(1, 7), *random_prompt(2, 12)]
        result, (out, *_) = self.ask(Sample(model, spec, 0, Prompt(1, 2), Prompt(3, 4), patches=patches), tensors)
        return result, out

    def captured(self, model: str) -> CapturedNetwork | None:
        resident = self.engine.residents[model].model
        assert isinstance(resident, Predictor)
        return resident.captured


def test_on_cpus_and_with_sliced_weights_they_are_refused_by_name(large: Path) -> None:
    load = LoadModel(str(large), content_key(large), "float32", MeshSpec(), graphs=True)
    job = Job(Control(), lambda body, tensors: None, lambda: False)
    with pytest.raises(ConfigError, match="graphs are CUDA's, and the ranks compute on cpu") as refused:
        Engine(CPU).handle(RequestHeader(1, load), [], job)
    assert refused.value.remedy == "Turn graphs off in Mesh Config."
    with pytest.raises(ConfigError, match="weights that sliced gathers"):
        check_graphs(CUDA, sliced=True)
    check_graphs(CUDA, sliced=False)


def test_a_resident_model_gets_them_and_loses_them_without_a_read(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(monkeypatch)
    loaded = rank.load(large)
    _, expected = rank.sample(loaded.model)
    assert rank.captured(loaded.model) is None and not rank.recorders
    again = rank.load(large, graphs=True)
    assert again.model == loaded.model and again.bytes_read == [0]
    for _ in range(2):
        result, out = rank.sample(loaded.model)
        assert torch.equal(out, expected) and result.notes == []
    (recorder,) = rank.recorders
    # Two branches of 4 steps, twice: one of each ran as ever.
    assert (recorder.evaluated, recorder.recorded_ones, recorder.done_again) == (2, 2, 14)
    rank.load(large, graphs=True)
    assert len(rank.recorders) == 1
    rank.load(large)
    assert rank.captured(loaded.model) is None
    assert torch.equal(rank.sample(loaded.model)[1], expected) and recorder.done_again == 14


def test_where_one_cannot_be_made_the_node_is_told(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(monkeypatch, fails=True)
    loaded = rank.load(large, graphs=True)
    told = ["CUDA graphs: an evaluation runs without (NotRecordableError: planted)"]
    assert rank.sample(loaded.model)[0].notes == told  # of both branches
    assert rank.sample(loaded.model)[0].notes == []
    x, timesteps, (context, pooled) = torch.zeros(1, 16, 8, 8), torch.full((1,), 500.0), random_prompt(1, 9)
    results = [rank.ask(Forward(loaded.model, 0, 1, 2, 3), [x, timesteps, context, pooled])[0] for _ in range(3)]
    assert [result.notes for result in results] == [[], told, []]


def test_a_timeline_is_of_evaluations_that_run_as_ever(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(monkeypatch)
    loaded, prompt = rank.load(large, graphs=True), random_prompt(1, 7)
    body = Sample(loaded.model, SamplerSpec(steps=4), 0, Prompt(1, 2), trace=True)
    _, (_, timeline) = rank.ask(body, [torch.zeros(1, 16, 8, 8), *prompt])
    assert len(timeline) >= 4 and rank.recorders[0].evaluated == rank.recorders[0].recorded_ones == 0


def test_a_step_cache_is_of_evaluations_that_run_as_ever(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank, asked = Rank(monkeypatch), {"steps": 8, "step_cache": StepCache("first_block", threshold=0.7, first_steps=1)}
    loaded = rank.load(large)
    result, expected = rank.sample(loaded.model, **asked)
    assert result.ranks[0].reused
    rank.load(large, graphs=True)
    exact = rank.sample(loaded.model)[1]
    assert not torch.equal(exact, expected) and rank.recorders[0].done_again == 6
    assert torch.equal(rank.sample(loaded.model, **asked)[1], expected) and rank.recorders[0].done_again == 6
    assert torch.equal(rank.sample(loaded.model)[1], exact) and rank.recorders[0].done_again == 14


@pytest.mark.parametrize("weights", ["", "fp8"])
def test_they_stay_where_weights_change_in_place_and_leave_where_not(
    weights: str, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = Patches(write_low_rank(tmp_path, [low_rank(QKV, (768, 256), 1)]), [1.0])
    rank = Rank(monkeypatch, tmp_path)
    loaded = rank.load(large, weights=weights)
    expected = [rank.sample(loaded.model, patches)[1] for patches in (Patches(), lora, Patches())]
    assert not torch.equal(expected[0], expected[1]) and torch.equal(expected[0], expected[2])
    rank.load(large, weights=weights, graphs=True)
    for patches, wanted in zip((Patches(), lora, Patches()), expected, strict=True):
        assert torch.equal(rank.sample(loaded.model, patches)[1], wanted)
    assert rank.recorders[0].recorded_ones == (6 if weights else 2)


def test_they_leave_before_any_model_does(large: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(monkeypatch)
    loaded = rank.load(large, graphs=True)
    rank.sample(loaded.model)
    captured = rank.captured(loaded.model)
    assert captured is not None and captured._graphs
    # Room for the model, once no graph is there.
    monkeypatch.setattr(residents_module, "fits", lambda *_: not captured._graphs)
    other = rank.load(models / "diffusion_models" / "sd3.5-medium.safetensors")
    assert not captured._graphs and other.evicted == [] and loaded.model in rank.engine.residents
    rank.sample(loaded.model)
    assert captured._graphs, "they are made again"


def test_they_leave_where_a_vae_needs_their_memory(large: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(monkeypatch)
    loaded = rank.load(large, graphs=True)
    files = models / "vae" / "sd3_vae.safetensors"
    vae = rank.ask(LoadVAE([str(files)], content_key(files), "float32"))[0].model
    rank.sample(loaded.model)
    captured, latent, image = rank.captured(loaded.model), torch.zeros(1, 16, 4, 6), torch.zeros(1, 32, 48, 3)
    assert captured is not None
    needed = 32 * 48 * 768 * 4
    for body, tensor in ((Decode(vae, 0), latent), (Encode(vae, 0), image)):
        for free in (needed, needed - 1):
            rank.sample(loaded.model)
            monkeypatch.setattr(Residents, "free_bytes", lambda self, free=free: free)
            rank.ask(body, [tensor])
            assert bool(captured._graphs) == (free == needed)
    assert loaded.model in rank.engine.residents


def pipefusion_case(path: str, spec: MeshSpec) -> tuple[bool, list[int]]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        rank = Rank(monkeypatch)
        loaded = rank.load(Path(path), spec)
        outs = [rank.sample(loaded.model, warmup_steps=2)[1]]
        rank.load(Path(path), spec, graphs=True)
        outs += [rank.sample(loaded.model, warmup_steps=2)[1]]
        (recorder,) = rank.recorders
        counts = [recorder.evaluated, recorder.recorded_ones]
        exact = [rank.sample(loaded.model)[1]]
        rank.load(Path(path), spec)
        exact += [rank.sample(loaded.model)[1]]
    return torch.equal(*outs) and torch.equal(*exact), [*counts, recorder.recorded_ones]


def test_pipefusion_runs_without_and_exact_stages_with_them(ranks: RankPool, large: Path) -> None:
    assert ranks(2, pipefusion_case, str(large), MeshSpec(pp=2)) == [(True, [0, 0, 2])] * 2


class OnePiece:
    """Stands for CUDA where no tensor has values: to launch what was recorded is one call."""

    def __init__(self) -> None:
        self.launched = Mock()

    def beside(self, function: Any) -> Tensor:
        return function()

    def recorded(self, function: Any) -> tuple[Any, Tensor]:
        return self.launched, function()

    def let_go(self) -> None:
        """Nothing is kept."""


@pytest.mark.parametrize(
    ("config", "mesh"),
    [
        (large(2), MeshSpec()),
        (from_scratch(2), MeshSpec()),
        (large(2), MeshSpec(ulysses=2)),
        (shallow_sdxl(), MeshSpec()),
        (shallow_sdxl(), MeshSpec(patch=2)),
    ],
    ids=["large", "from scratch", "large, ulysses", "sdxl", "sdxl, bands"],
)
def test_a_step_is_two_copies_one_launch_and_a_copy_of_the_result(config: Config, mesh: MeshSpec) -> None:
    with fake_cuda(0, mesh.world_size), torch.inference_mode():
        run, recorder = Evaluations(predictor(config, mesh), (512, 512)), OnePiece()
        captured = CapturedNetwork(run.predictor.network, run.predictor.mesh, recorder)
        prepared = run.share().calls[0].own
        x = on_cuda(prepared.context.shape[0], *run.shape[1:], dtype=torch.bfloat16)
        for number in range(4):
            times = timesteps_of(torch.tensor(900.0), len(x), x.device)
            with Watch() as watch:
                captured(x.clone(), times, prepared, Step(number))
        # One for what comes in bf16, one for what comes in fp32; beside the copy of x above.
        assert +watch.launches == {"_foreach_copy_": 2, "clone": 2} and not watch.collectives
        assert recorder.launched.call_count == 3
