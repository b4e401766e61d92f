"""Modules that wait much, or have work for one core: in a pytest of their own beside the others', whose reports this one shows."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

# So many modules are a run of nearly all tests, in which there is always something to do meanwhile.
MOST = 30
Reports = dict[str, list[dict[str, Any]]]
# In this order: those that hold much memory while the others' backends are few; then those without a backend.
MODULES = (
    *(
        "test_training",
        "test_quantised_comfyui",
        "test_twins",
        "test_inpaint_comfyui",
        "test_control_comfyui",
        "test_odd_values",
        "test_samplers_comfyui",
        "test_image_prompt_packs",
        "test_inside_other_ranks",
        "test_persistence",
        "test_restarts",
    ),
    *("test_room", "test_remote_network", "test_links"),
    *("test_budgets", "test_fake_cuda", "test_fake_cuda_extras", "test_nccl_order", "test_quantised"),
)


def apart(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Those of these tests that run apart: none where few run."""
    whole = len({item.path for item in items}) > MOST
    return [item for item in items if whole and item.path.stem in MODULES]


def as_listed(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    return sorted(items, key=lambda item: MODULES.index(item.path.stem))


def run_apart(nodes: Sequence[str]) -> Reports:
    """The reports of these tests by node id."""
    with tempfile.TemporaryDirectory(prefix="pmr-") as folder:
        file = Path(folder, "reports")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--reports={file}", *nodes]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = file.read_text().splitlines() if file.exists() else []
    reports: Reports = defaultdict(list)
    for report in map(json.loads, lines):
        reports[report["nodeid"]].append(report)
    return {node: reports[node] or [_missing(node, done.stdout[-3000:] + done.stderr[-3000:])] for node in nodes}


def _missing(node: str, said: str) -> dict[str, Any]:
    report = pytest.TestReport(node, (node, None, node), {}, "failed", f"no report came of it:\n{said}", "call")
    return {"$report_type": "TestReport", **report._to_json()}


class Writer:
    """Writes each report as a line of a file."""

    def __init__(self, file: Path, config: pytest.Config) -> None:
        self._file, self._config = file, config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        with self._file.open("a") as file:
            file.write(json.dumps(data) + "\n")


def show(item: pytest.Item, reports: Sequence[dict[str, Any]]) -> None:
    """As if the test had run here."""
    hook = item.ihook
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for data in reports:
        report = hook.pytest_report_from_serializable(config=item.config, data=data)
        hook.pytest_runtest_logreport(report=report)
    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
