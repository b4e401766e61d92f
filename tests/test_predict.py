"""The predictor: what a stand-in counts, how messages are laid between computing, and what is said of it. No time is asserted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import rank_pool
import torch
from rank_pool import RankPool

from parallel_backend.__main__ import main
from parallel_backend.bench import predict
from parallel_backend.bench.links import LOOPBACK, STATED, Link, Speed, from_times, rounds, stated
from parallel_backend.bench.players import Play, roles, takes_turns
from parallel_backend.bench.predict import Asked, candidates
from parallel_backend.bench.predict_check import Compared
from parallel_backend.bench.prediction_table import Predicted, fastest, median_of, predicted, table
from parallel_backend.bench.replay import Replay
from parallel_backend.bench.stand_in import Played, Run, Subject, journal_of, paced, play, predictor_of
from parallel_backend.config import MMDIT_AXES, UNET_AXES, MeshSpec
from parallel_backend.distributed.control import Control
from parallel_backend.distributed.journal import Entry
from parallel_backend.distributed.links import MEASURED_ELEMENTS, measure_links
from parallel_backend.distributed.mesh import build_mesh
from parallel_backend.errors import ConfigError
from parallel_backend.mesh_choice.tables import read
from parallel_backend.models.families import open_model

# 13 x 9 latent cells: neither they nor the 77 and 154 tokens of prompts divide by 2 and 3.
HEIGHT, WIDTH = 104, 72


def run(steps: int = 2, warmup: int | None = None, num_patches: int = 0, **degrees: int) -> Run:
    return Run(MeshSpec(**degrees), HEIGHT, WIDTH, steps, warmup, num_patches)  # type: ignore[arg-type]


MMDIT_RUNS = [
    *(run(**{axis: n}) for n in (2, 3) for axis in ("dp", "pp", "ring", "ulysses", "tp")),
    run(cfg=2),
    *(run(5, 1, ring=n) for n in (2, 3)),
    run(5, 1, 4, pp=2),
    run(5, 1, 3, pp=3),
]
UNET_RUNS = [run(cfg=2), run(patch=2), run(patch=3), run(4, 1, patch=2), run(4, 1, patch=3)]


def name(run: Run) -> str:
    return f"{run.mesh.describe()}{', displaced' * (run.warmup is not None)}"


@cache
def subject(path: Path) -> Subject:
    return Subject(open_model(path), torch.device("cpu"), torch.float32)


@cache
def control() -> Control:
    return Control()


@torch.inference_mode()
def real_journal(path: Path, run: Run) -> list[Entry]:
    """Of this rank, among others that are there."""
    of, line = subject(path), control()
    return journal_of(of, predictor_of(of, build_mesh(run.mesh, rank_pool.groups())), run, line)


def check_counts(ranks: RankPool, path: Path, run: Run) -> None:
    real = ranks(run.mesh.world_size, real_journal, path, run)
    for rank, entries in enumerate(real):
        alone = play(subject(path), run, rank).entries
        assert [e.message for e in alone if e.what == "start"] == [e.message for e in entries if e.what == "start"]
        assert [(e.what, e.axis, e.number) for e in alone] == [(e.what, e.axis, e.number) for e in entries]


@pytest.mark.parametrize("run", MMDIT_RUNS, ids=name)
def test_a_stand_in_starts_the_messages_of_a_real_rank_and_awaits_them_where_it_does(
    run: Run, ranks: RankPool, models: Path
) -> None:
    check_counts(ranks, models / "diffusion_models" / "sd3.5-medium.safetensors", run)


@pytest.mark.parametrize("run", UNET_RUNS, ids=name)
def test_a_stand_in_of_a_band_does_too(run: Run, ranks: RankPool, unets: Path) -> None:
    check_counts(ranks, unets / "unet-tiny.safetensors", run)


def test_bytes_of_an_evaluation_are_those_of_the_formula(models: Path) -> None:
    """ulysses on two ranks: q, k and v and what comes back, and the output tokens."""
    path = models / "diffusion_models" / "sd3-medium.safetensors"
    found = predicted(run(ulysses=2), [play(subject(path), run(ulysses=2), rank) for rank in (0, 1)], stated("pcie4"))
    config = subject(path).opened.config
    image, text = 7 * 5, 154
    mine = -(-image // 2) + text // 2
    out = -(-image // 2) * config.patch_size**2 * 16
    halves = config.depth * (3 * mine * config.hidden // 2 + (image + text - mine) * config.hidden // 2)
    assert found.nbytes == 4 * 2 * (halves + out)  # fp32, two rows
    assert found.messages == 2 * config.depth + 1


def test_nothing_is_left_of_the_world_that_was_played(models: Path) -> None:
    path = models / "diffusion_models" / "sd3-medium.safetensors"
    play(subject(path), run(tp=2), 1)
    assert not torch.distributed.is_initialized()
    with pytest.raises(ConfigError, match="patch=2 can't be used"):
        play(subject(path), run(patch=2), 0)
    with pytest.raises(ConfigError, match="spreads 4 heads too thin"):
        play(subject(path), run(ulysses=8), 0)
    with pytest.raises(ConfigError, match="steps=2 leaves none after 3"):
        play(subject(path), run(2, 2, ring=2), 0)
    assert not torch.distributed.is_initialized()


# -- schedules --------------------------------------------------------------------------------------------------

TEN = Link("ten", Speed(2.0, 0.0, 10.0))  # 2 s, and 0.1 s a byte


def start(
    seconds: float, number: int, nbytes: int = 0, kind: str = "gather", axis: str = "cfg", peer: int = -1
) -> Entry:
    return Entry("start", seconds, seconds, axis, number, kind, nbytes, peer)  # type: ignore[arg-type]


def wait(seconds: float, number: int, axis: str = "cfg") -> Entry:
    return Entry("wait", seconds, seconds, axis, number)


def step(seconds: float) -> Entry:
    return Entry("step", seconds, seconds)


def ends(mesh: MeshSpec, link: Link, *journals: Sequence[Entry]) -> list[list[float]]:
    return Replay(mesh, journals, link).schedule().steps


def test_a_message_that_nothing_is_computed_beside_is_exposed() -> None:
    journal = [start(1.0, 1, 20), wait(0.0, 1), step(0.5)]
    assert ends(MeshSpec(cfg=2), TEN, journal, journal) == [[5.5], [5.5]]


def test_computing_hides_a_message_as_long_as_it_lasts() -> None:
    for beside, end in ((3.0, 5.0), (4.0, 5.0), (9.0, 10.0)):
        journal = [start(1.0, 1, 20), wait(beside, 1), step(0.0)]
        assert ends(MeshSpec(cfg=2), TEN, journal, journal) == [[end], [end]]


def test_ranks_wait_for_the_slower_one_and_it_does_not_wait() -> None:
    slow, fast = ([start(s, 1), wait(0.0, 1), step(0.0)] for s in (5.0, 1.0))
    assert ends(MeshSpec(cfg=2), TEN, slow, fast) == [[7.0], [7.0]]


def test_messages_of_one_line_follow_each_other_and_of_two_axes_don_t() -> None:
    one = [start(0.0, 1, 10), start(0.0, 2, 10), wait(0.0, 1), wait(0.0, 2), step(0.0)]
    assert ends(MeshSpec(cfg=2), TEN, one, one)[0] == [6.0]
    two = [start(0.0, 1, 10), start(0.0, 1, 10, axis="tp"), wait(0.0, 1), wait(0.0, 1, "tp"), step(0.0)]
    assert ends(MeshSpec(cfg=2, tp=2), TEN, two, two, two, two)[0] == [3.0]


def test_cores_that_copy_what_they_send_hide_the_wait_alone() -> None:
    taken = Link("taken", TEN.speed, taken=1.0)
    journal = [start(1.0, 1, 20), wait(9.0, 1), step(0.0)]
    assert ends(MeshSpec(cfg=2), taken, journal, journal)[0] == [12.0]


def test_a_ring_waits_for_the_rank_before_and_a_gather_for_all() -> None:
    def journals(kind: str, axis: str) -> list[list[Entry]]:
        return [[start(s, 1, 0, kind, axis), wait(0.0, 1, axis), step(0.0)] for s in (1.0, 5.0, 2.0, 3.0)]

    assert ends(MeshSpec(ring=4), TEN, *journals("ring", "ring")) == [[5.0], [7.0], [7.0], [5.0]]
    assert ends(MeshSpec(patch=4), TEN, *journals("gather", "patch")) == [[7.0]] * 4


def hand_on(seconds: float, number: int, stage: int, to: int) -> Entry:
    return start(seconds, number, 10, "send", "pp", to)


def test_exact_stages_compute_one_after_the_other() -> None:
    first = [
        hand_on(4.0, 1, 0, 1),
        wait(0.0, 1, "pp"),
        start(0.0, 2, 0, "broadcast", "pp"),
        wait(0.0, 2, "pp"),
        step(0.0),
    ]
    second = [
        start(0.0, 1, 0, "receive", "pp", 0),
        wait(0.0, 1, "pp"),
        start(6.0, 2, 0, "broadcast", "pp"),
        wait(0.0, 2, "pp"),
        step(0.0),
    ]
    # 4 s, a message of 3, 6 s, a message of 2.
    assert ends(MeshSpec(pp=2), TEN, first, second) == [[15.0], [15.0]]


def test_patches_flow_through_stages_as_fast_as_the_slowest() -> None:
    """Each stage computes a patch in 5 s, the second starts 3 s after the first, which is what a message takes."""
    patches, steps = 2, 3
    first: list[Entry] = []
    second: list[Entry] = []
    for number in range(1, steps * patches + 1):
        if number > patches:  # what the last stage has made of this patch a step ago
            first += [start(0.0, 2 * number - 1, 0, "receive", "pp", 1), wait(0.0, 2 * number - 1, "pp")]
            if number % patches == 1:
                first.append(step(0.0))
        first.append(hand_on(5.0, 2 * number, 0, 1))
        second += [start(0.0, 2 * number - 1, 0, "receive", "pp", 0), wait(0.0, 2 * number - 1, "pp")]
        second.append(hand_on(5.0, 2 * number, 1, 0))
    # A patch is away 5 s of the first stage, 3 on the way, 5 of the second, 3 on the way back: 16, and two are 10.
    told = ends(MeshSpec(pp=2), TEN, first, second)[0]
    assert told == [16.0, 32.0]
    quick = Link("quick", Speed(0.0, 0.0, 1e9))
    told = ends(MeshSpec(pp=2), quick, first, second)[0]
    assert told == pytest.approx([10.0, 20.0])  # nobody waits: two patches of 5 s


def test_a_rank_that_waits_for_nobody_s_message_is_named() -> None:
    with pytest.raises(ConfigError, match="Rank 0 waits for message 1 over cfg"):
        ends(MeshSpec(cfg=2), TEN, [start(0.0, 1), wait(0.0, 1)], [step(0.0)])
    with pytest.raises(ConfigError, match="cfg=2"):
        ends(MeshSpec(cfg=2), TEN, [step(0.0)])


# -- links ------------------------------------------------------------------------------------------------------


def test_a_message_takes_its_latency_each_round_s_and_its_bytes_time() -> None:
    link = Link("some", Speed(1.0, 0.5, 100.0), {"sum": Speed(0.0, 1.0, 50.0), "send": Speed(9.0, 0.0, 1.0)})
    assert link.waits("gather", 4) == 1.0 + 0.5 * 3 and link.carries("gather", 200) == 2.0
    assert link.waits("sum", 4) == 6.0 and link.carries("sum", 200) == 4.0
    assert link.waits("receive", 2) == 9.0
    assert [rounds(kind, 8) for kind in ("sum", "gather", "broadcast", "exchange", "ring")] == [14, 7, 3, 1, 1]


def test_every_stated_link_is_slower_for_more_bytes_and_more_ranks() -> None:
    for link in STATED.values():
        assert link.waits("sum", 8) > link.waits("sum", 2) > 0 and link.carries("sum", 2) > link.carries("sum", 1) > 0
    with pytest.raises(ConfigError, match=r"Link 'nvlink9' is not known"):
        stated("nvlink9")


def test_a_measured_link_is_the_line_through_what_was_measured() -> None:
    link = from_times(
        [("sum", 1000, 0.002), ("sum", 1001000, 0.012), ("send", 0, 0.001), ("send", 100, 0.002)], 3, "cpu"
    )
    assert link.of("sum").bandwidth == pytest.approx(1e8)
    assert link.waits("sum", 3) == pytest.approx(0.002 - 1000 / 1e8)
    assert link.taken == 1.0 and link.call == 0.0
    assert link.of("ring") == link.of("send")  # the slowest stands for what was not measured
    assert from_times([("sum", 1000, 0.002), ("sum", 2000, 0.003)], 2, "cuda").taken == 0.0
    with pytest.raises(ConfigError, match="no link to measure"):
        from_times([], 1, "cpu")


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_kind_of_message_is_measured(world_size: int, ranks: RankPool) -> None:
    for found in ranks(world_size, measure_links, torch.device("cpu")):
        kinds = ["gather", "sum", "exchange", "broadcast", "ring", "send"]
        assert [time.kind for time in found] == [kind for kind in kinds for _ in MEASURED_ELEMENTS]
        assert all(time.seconds > 0 and time.nbytes > 0 for time in found)


def test_doctor_prints_what_messages_take(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--links"]) == 0
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows == [
        "message",
        *(k for k in ("gather", "sum", "exchange", "broadcast", "ring", "send") for _ in "12"),
    ]


# -- what is said -----------------------------------------------------------------------------------------------


def row(step: float, exposed: float = 0.0, launching: float | None = None, **degrees: int) -> Predicted:
    return Predicted(MeshSpec(**degrees), step, exposed, launching, 3_000_000, 7)  # type: ignore[arg-type]


def test_the_fastest_mesh_of_each_number_of_ranks_is_marked() -> None:
    rows = [row(1.0), row(0.6, 0.15, cfg=2), row(0.5, 0.1, 0.2, ulysses=2), row(0.7, ring=2), row(0.4, cfg=2, tp=2)]
    assert {n: best.mesh.describe() for n, best in fastest(rows).items()} == {
        1: "one rank",
        2: "ulysses=2",
        4: "cfg=2 tp=2",
    }
    lines = table(rows, "title").splitlines()
    assert lines[5] == "| 2 | cfg=2 | 0.6000 | 1.67 | 75% | 25% | - | 7 | 3.00 |"
    assert lines[6] == "| 2 | ulysses=2 **fastest** | 0.5000 | 2.00 | 40% | 20% | 40% | 7 | 3.00 |"
    assert sum("fastest" in line for line in lines) == 1
    assert median_of([row(3.0), row(1.0), row(2.0)]).step == 2.0


def test_a_gpu_that_waits_for_python_is_as_slow_as_python() -> None:
    """Two steps count, of 2 s of the GPU each, and 5 of the host with the time that a message takes it."""
    journal = []
    for number in (1, 2, 3):
        journal += [
            Entry("start", 1.0, 4.0, "cfg", number, "gather", 0),
            Entry("wait", 0.5, 0.0, "cfg", number),
            step(0.0),
        ]
    once = Run(MeshSpec(cfg=2), 64, steps=3)
    link = Link("some", Speed(0.5, 0.0, 1e9), call=1.0)
    eager = predicted(once, [Played(journal, busy=1.5)] * 2, link)
    assert (eager.step, eager.exposed, eager.launching) == (5.0, 0.0, 3.5)
    on_cpu = predicted(once, [Played(journal)] * 2, link)
    assert (on_cpu.step, on_cpu.launching) == (1.5, None)
    graph = predicted(
        Run(MeshSpec(cfg=2), 64, steps=3, graphs=True), [Played(paced(journal, once, 3.0), 1.5)] * 2, link
    )
    assert (graph.step, graph.launching) == (3.0, 1.5)


def test_ranks_with_as_much_to_do_are_played_once() -> None:
    assert roles(MeshSpec(cfg=2, ulysses=2)) == [0, 1, 0, 1]
    assert roles(MeshSpec(dp=2, pp=2)) == [0, 1, 0, 1]
    assert takes_turns(run(pp=2)) and not takes_turns(run(5, 1, 4, pp=2)) and not takes_turns(run(cfg=2))


def test_candidates_are_one_axis_or_one_after_cfg() -> None:
    assert [m.describe() for m in candidates(1, MMDIT_AXES)] == ["one rank"]
    assert [m.describe() for m in candidates(4, UNET_AXES)] == ["cfg=2 patch=2", "patch=4"]
    assert [m.describe() for m in candidates(2, UNET_AXES)] == ["cfg=2", "patch=2"]
    assert all(m.world_size == 6 for m in candidates(6, MMDIT_AXES)) and len(candidates(3, MMDIT_AXES)) == 4


def test_a_prediction_is_close_within_15_percent_of_the_median_round() -> None:
    close = Compared("a", run(cfg=2), [1.0, 2.0, 9.0], [1.0, 1.8, 1.0])
    assert close.quotient == pytest.approx(2 / 1.8) and close.is_close
    assert not Compared("b", run(cfg=2), [1.2], [1.0]).is_close and not Compared("c", run(cfg=2), [0.8], [1.0]).is_close


def asked(**changes: object) -> Asked:
    usual: dict[str, object] = {"layout": "sdxl", "model": None, "device": "cpu", "dtype": "float32", "size": 64}
    return Asked(**usual | {"gpus": [1], "meshes": []} | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"layout": "flux"}, "Layout 'flux' is not known"),
        ({"dtype": "int8"}, "dtype 'int8' is not known"),
        ({"dtype": "float16"}, "dtype=float16 is for GPUs"),
        ({"size": 100}, "size=100 is not possible"),
        ({"gpus": [2, 0]}, "gpus=0 is not possible"),
        ({"device": "cuda"}, "No GPU is here"),
        ({"graphs": True}, "A CPU has no CUDA graphs"),
    ],
)
def test_what_can_t_be_predicted_is_refused_by_its_value(bad: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        asked(**bad)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--figures", "h100", "--layout", "sdxl", "--gpus", "2"), "--figures makes nothing of --gpus and --layout"),
        (("--figures", "h100", "--check"), "--figures makes nothing of --check"),
        (("--check", "--model", "file", "--mesh", "cfg=2"), "--check makes nothing of --mesh and --model"),
        (("--check", "--link", "nvlink4", "--graphs"), "--check makes nothing of --graphs and --link"),
        (("--patience", "5"), "a prediction without --check makes nothing of --patience"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused_by_name(
    given: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "predict", *given]) == 1
    assert words in capsys.readouterr().err


def test_meshes_that_the_model_can_t_have_are_left_out_by_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def play_planted(run: Run) -> list[Played]:
        if run.mesh.tp > 1:
            raise ConfigError("tp is too much.", "Use less.")
        steps = [step(seconds / run.mesh.world_size) for seconds in (9.0, 2.0, 4.0, 6.0)]
        return [Played(steps)] * run.mesh.world_size

    @contextmanager
    def planted(asked: Asked) -> Iterator[tuple[Play, Sequence[str], str]]:
        yield play_planted, MMDIT_AXES, "planted"

    monkeypatch.setattr(predict, "player", planted)
    rows = predict.run_predict(asked(gpus=[1, 2]), "loopback")
    assert [(row.name, row.step) for row in rows] == [
        ("one rank", 4.0),
        *((f"{a}=2", 2.0) for a in ("cfg", "pp", "ring", "ulysses")),
    ]
    assert "tp=2 is left out: tp is too much." in capsys.readouterr().out
    predict.run_predict(asked(gpus=[1, 2]), "loopback", defaults=tmp_path / "tables.json")
    (written,) = read(tmp_path / "tables.json")
    assert [(row.degrees, row.step) for row in written.rows] == [({}, 4.0), ({"cfg": 2}, 2.0)]
    with pytest.raises(ConfigError, match="tp is too much"):
        predict.run_predict(asked(meshes=[MeshSpec(tp=2)]), "loopback")


def test_the_command_prints_a_row_for_each_mesh(
    models: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, file = models / "diffusion_models" / "sd3-medium.safetensors", tmp_path / "tables.json"
    command = ["bench", "predict", "--model", str(path), "--size", "64", "--link"]
    asked = [*command, "100gbe", "--mesh", "ring=2", "--displaced", "--rounds", "1", "--write-defaults", str(file)]
    assert main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    meshes = [
        line.split("|")[2].replace("**fastest**", "").strip() for line in lines if line.startswith(("| 1", "| 2"))
    ]
    assert meshes == ["one rank", "ring=2", "ring=2, displaced"]
    assert lines[-1].startswith("fastest of 2: ring=2")
    (written,) = read(file)
    assert (written.device, written.kind, written.size) == ("cpu", "mmdit", 64)
    assert [row.degrees for row in written.rows] == [{}]  # a ring is nobody's default
    assert main([*command, "token ring"]) == 1
    assert main([*command, LOOPBACK, "--mesh", "ulysses=8"]) == 1
    said = capsys.readouterr().err
    assert "Link 'token ring' is not known" in said and "ulysses=8 spreads 4 heads too thin" in said
