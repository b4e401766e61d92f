"""The ten minutes on a GPU, tried out on the CPU with small sizes: rows, limits, and what breaks."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hung_inside import OF_MMDITS, OF_UNETS, Make
from served import wait_until

from benchmarks.gpu.__main__ import SECTIONS
from benchmarks.gpu.one_card import Ranks, ranks_on_one_card
from benchmarks.gpu.options import ROOT, Options
from benchmarks.gpu.report import NO_GPU, Report, Told, shown, summary
from benchmarks.gpu.runner import Section, run_all
from benchmarks.gpu.sections import beside, extras, graphs, host, loading, memory, quantised, ranks, sd35, sdxl
from benchmarks.gpu.sizes import TINY
from benchmarks.gpu.timing import synchronizations
from benchmarks.gpu.weights import relative_error
from parallel_backend.bench.device_time import covered, profile
from parallel_backend.extras.target import Target
from parallel_backend.rpc.extras import AnyExtra

pytestmark = pytest.mark.busy


def told(run: Callable[[Report, Options], None], folder: Path) -> Told:
    """What a section says of small models on the CPU."""
    stream = io.StringIO()
    run(Report(stream), Options("cpu", True, folder))
    said = Told("tried")
    for line in stream.getvalue().splitlines():
        said.take(line)
    return said


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models are so small that threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def is_gone(pid: int) -> bool:
    """Or nobody has asked yet how it ended."""
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"


# -- the runner, without torch ----------------------------------------------------------------------------------

PLANTED = {
    "hangs": """
import subprocess, sys, time
def run(report, options):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    report.table("t", "case", "child")
    report.row("before", child.pid)
    time.sleep(600)
""",
    "raises": "def run(report, options):\n    raise ValueError('no such kernel')\n",
    "dies": "import os\ndef run(report, options):\n    os.abort()\n",
    "works": """
def run(report, options):
    print("this goes to the log")
    report.table("t", "case", "ms", "more")
    report.row("fine", 1.5)
""",
}


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Section]:
    for name, code in PLANTED.items():
        (tmp_path / f"planted_{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return [Section(name, f"planted_{name}", 1, 2.5 if name == "hangs" else 20) for name in PLANTED]


def test_a_section_that_hangs_or_fails_is_named_and_the_others_run(planted: list[Section], tmp_path: Path) -> None:
    shown_lines: list[str] = []
    sections = run_all(planted, Options("cpu", True, tmp_path), shown_lines.append, tmp_path / "log.txt")
    by_name = {section.name: section for section in sections}
    assert by_name["hangs"].ended.startswith("ended at its limit")
    assert by_name["raises"].ended == "failed: ValueError: no such kernel"
    assert by_name["dies"].ended.startswith("failed: ")
    assert by_name["works"].ended == "done"
    case, child = by_name["hangs"].tables[0].rows[0]
    assert case == "before"
    wait_until(lambda: is_gone(child), 10)  # what a section started goes with it
    assert "| fine | 1.50 |  |" in shown_lines and "| fine | 1.50 |  |" in summary(sections)
    assert "this goes to the log" in (tmp_path / "log.txt").read_text()


def test_what_a_section_leaves_of_its_time_is_the_next_ones(planted: list[Section], tmp_path: Path) -> None:
    lines: list[str] = []
    works = planted[-1]
    run_all([works, works], Options("cpu", True, tmp_path), lines.append, tmp_path / "log.txt")
    limits = [int(line.split("at most ")[1].removesuffix(" s)")) for line in lines if "at most" in line]
    assert limits[0] == 20 and 30 < limits[1] <= 40


def test_all_limits_together_are_below_nine_and_a_half_minutes() -> None:
    assert sum(section.limit for section in SECTIONS) < 9.5 * 60
    assert all(section.estimate < section.limit for section in SECTIONS[:-1])
    assert sum(section.estimate for section in SECTIONS) < 9.5 * 60, "the last one has time that the others leave"


def test_figures_are_short() -> None:
    assert [shown(v) for v in (None, "a", 7, 1234.5, 12.34, 1.234, 0.0, 0.00012)] == [
        *("", "a", "7", "1234", "12.3", "1.23", "0.00", "1.2e-04")
    ]


def test_kernels_that_overlap_are_counted_once() -> None:
    assert covered([(5, 7), (0, 2), (1, 3), (1, 2)]) == 5


def test_launches_and_busy_time_are_those_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(name: str, device: object, start: float, end: float, marked: bool = False) -> SimpleNamespace:
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, device_type=device, time_range=span, is_user_annotation=marked)

    events = [
        event("aten::mm", cpu, 0, 9000),
        event("gemm", cuda, 1000, 2000),
        event("gemm", cuda, 1500, 3000),  # on another stream
        event("Memcpy DtoD", cuda, 5000, 5500),
        event("## region", cuda, 0, 9000, marked=True),
    ]
    recorded = nullcontext(SimpleNamespace(events=lambda: events))
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: recorded)
    seen = profile(lambda: None, torch.device("cpu"))
    assert (seen.kernels, seen.copies, seen.busy) == (2, 1, 2.5)
    assert seen.slowest == [("gemm", 2.5), ("Memcpy DtoD", 0.5)]


def test_places_where_the_host_waits_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def call() -> None:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    ((place, count),) = synchronizations(call).items()
    assert place.startswith("tests/test_gpu_bench.py:") and count == 3
    assert modes == ["warn", "default"]


# -- the entry script -------------------------------------------------------------------------------------------


def test_the_entry_script_tells_its_sections_and_leaves_files(tmp_path: Path) -> None:
    env = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable, "WHEELS": str(tmp_path)}
    command = [ROOT / "benchmarks/gpu/run.sh", "--tiny", "--device", "cpu", "--only", "machine", "allocators"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    progress, results = (tmp_path / "progress.txt").read_text(), json.loads((tmp_path / "results.json").read_text())
    assert f"| torch | {torch.__version__} |" in progress and progress in done.stdout
    assert [section["ended"] for section in results] == ["done", "done"]
    assert f"| all | {NO_GPU} |" in (tmp_path / "summary.md").read_text()


# -- what each section measures ---------------------------------------------------------------------------------


def test_every_kernel_has_a_row_and_agrees_with_fp64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(sd35, "compile_blocks", lambda model, kind: compiled.append(kind))  # tried in test_compiled
    seen = told(sd35.run, tmp_path)
    steps, waits, busy, alone = (
        next(table for table in seen.tables if words in table.title)
        for words in ("one GPU, eager", "wait for the GPU", "One evaluation", "ttention")
    )
    assert len(compiled) == 1 and not [note for note in seen.notes if "fails" in note]
    assert [row[1] for row in steps.rows] == ["native", "flash", "flash3", "cudnn", "efficient"]
    assert steps.rows[0][2] > 0 and "needs a GPU" in steps.rows[1][2]
    assert waits.rows == [["all", NO_GPU, None]] and busy.rows[0][3] == NO_GPU
    plain, ring = alone.rows[:2]
    assert plain[4] < 1e-6 and ring[4] < 1e-6 and ring[5] < 1e-6 and plain[5] is None


@pytest.fixture
def no_group_stays() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("no_group_stays")
def test_sdxl_is_measured_whole_and_as_one_band(tmp_path: Path) -> None:
    whole, _, bands, _ = told(sdxl.run, tmp_path).tables
    assert [row[0].split(", ")[-1] for row in whole.rows] == ["float32", "float32"]
    assert [row[0].split(", ")[-1] for row in bands.rows] == ["exact", "displaced"]
    assert all(row[1] > 0 and row[3] == NO_GPU for row in whole.rows + bands.rows)


def test_what_fails_in_a_section_costs_the_rest_nothing() -> None:
    stream = io.StringIO()
    report = Report(stream)
    report.attempt("this", lambda: 1 // 0)
    report.attempt("that", lambda: report.note("done"))
    notes = [json.loads(line)["note"] for line in stream.getvalue().splitlines()]
    assert notes == ["this: fails, ZeroDivisionError: integer division or modulo by zero", "done"]


@pytest.mark.usefixtures("no_group_stays")
def test_graphs_are_named_as_needing_a_gpu(tmp_path: Path) -> None:
    rows = told(graphs.run, tmp_path).tables[0].rows
    assert len(rows) == 6 and all(row[1] > 0 and row[3] == NO_GPU for row in rows)


def test_loading_is_measured_beside_safetensors_own(tmp_path: Path) -> None:
    rows = told(loading.run, tmp_path).tables[0].rows
    assert len(rows) == 3 and all(seconds > 0 and rate > 0 for _, seconds, rate in rows)


def test_diffusers_computes_the_same_on_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "find_installation", lambda: "no ComfyUI here")
    diffusers, comfyui = told(beside.run, tmp_path).tables
    differences = [row[2] for row in diffusers.rows if row[2] is not None]
    assert len(diffusers.rows) == 10 and len(differences) == 3 and max(differences) < 1e-5
    assert comfyui.rows[0][0] == "no ComfyUI here"


# -- ranks on one card ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def card() -> Iterator[Ranks]:
    ranks = ranks_on_one_card("cpu", 2)
    close, ranks.pool.close = ranks.pool.close, lambda: None  # type: ignore[method-assign]
    yield ranks
    close()


def test_every_method_gives_what_one_process_gives(
    card: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "ranks_on_one_card", lambda *_, **__: card)
    rows = told(ranks.run, tmp_path).tables[0].rows
    assert len(rows) == 15 and [row[2] for row in rows] == ["equal"] * 15, rows


def _of_rank(value: float) -> torch.Tensor:
    return torch.tensor([value])


def _fails() -> None:
    raise ValueError("a planted fault")


def test_a_wrong_result_and_a_rank_that_fails_are_told_apart_from_a_right_one(card: Ranks) -> None:
    wrong = ranks.Case("wrong", partial(_of_rank, 1.0), lambda: torch.tensor([1.1]))
    broken = ranks.Case("broken", _fails, lambda: torch.tensor([1.0]))
    assert ranks.judged(wrong, card.pool, 2)[1] == "DIFFERENT"
    assert ranks.judged(broken, card.pool, 2)[1] == "FAILS: ValueError: a planted fault"


def test_a_vae_is_decoded_whole_and_in_bands(card: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "ranks_on_one_card", lambda *_, **__: card)
    communicators, decodes = told(memory.run, tmp_path).tables
    assert communicators.rows == [["communicators", NO_GPU]]
    assert [row[1] for row in decodes.rows] == [1, 2] and all(row[3] > 0 for row in decodes.rows)


def test_a_rank_that_torchrun_starts_is_a_host_of_its_own_and_sleeps_at_a_signal() -> None:
    code = """if True:
        import os, signal, time
        time.sleep = lambda seconds: print("sleeps", seconds > 1e5)
        signal.raise_signal(signal.SIGUSR1)
        print(os.environ["NCCL_HOSTID"])
    """
    env = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks/gpu/rank_hooks"), "RANK": "3", "LOCAL_RANK": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["sleeps", "True", "rank3"]


def test_previews_and_copies_have_their_rows(tmp_path: Path) -> None:
    steps, copies = told(host.run, tmp_path).tables
    assert [row[0] for row in steps.rows] == ["none", "copied in their step", "copied beside the next step"]
    assert len(copies.rows) == 4 and all(float(value) > 0 for row in (*steps.rows, *copies.rows) for value in row[1:])


def test_every_quantised_form_has_a_row(tmp_path: Path) -> None:
    (table,) = told(quantised.run, tmp_path).tables
    plain, *forms = table.rows
    assert len(forms) == 5 and all(row[1] < 0.7 * plain[1] and row[2] > 0 for row in forms)
    assert all(0 < row[-1] < 0.1 for row in forms[:3])


def test_what_hangs_inside_is_compared_and_timed(tmp_path: Path) -> None:
    compared, timed_ = told(extras.run, tmp_path).tables
    assert [row[1] for row in compared.rows] == [*OF_UNETS, *OF_MMDITS]
    assert all(row[2] < 1e-5 for row in compared.rows)
    assert [row[0] for row in timed_.rows] == ["nothing", *OF_UNETS] and all(row[1] > 0 for row in timed_.rows)


@torch.inference_mode()
def test_each_that_hangs_inside_changes_what_is_given() -> None:
    for model, cases in (("UNet", OF_UNETS), ("MMDiT", OF_MMDITS)):
        of, _ = extras.small_models(model, torch.device("cpu"))
        for name, make in cases.items():
            whole = extras.evaluation(of, make, TINY.cells)()
            for left_out in range(len(make(Target(of, TINY.cells, TINY.cells)))):
                try:
                    fewer = extras.evaluation(of, partial(all_but, left_out, make), TINY.cells)()
                except RuntimeError as error:  # what comes of a rescaled picture that isn't scaled back
                    assert "the nodes that make blocks smaller need one factor" in str(error)
                    continue
                assert len(fewer) < len(whole) or relative_error(fewer[0], whole[0]) > 1e-4, (name, left_out)


def all_but(left_out: int, make: Make, target: Target) -> list[AnyExtra]:
    return [spec for number, spec in enumerate(make(target)) if number != left_out]
