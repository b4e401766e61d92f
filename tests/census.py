"""What ComfyUI's own nodes do on a parallel MODEL, tried: a table, which docs/core-nodes.md keeps.

`python tests/census.py` runs every case that is named after a node of ComfyUI's core, on a local MODEL and on its parallel twin, by
KSampler and by ParallelSampler, and prints the page; with --write it is kept.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

KEPT = Path(__file__).parents[1] / "docs" / "core-nodes.md"
COMMAND = "python tests/census.py --write"
FAMILIES = ("SDXL", "SD3.5")
# Each is run by a test as well, which looks whether the kept table holds.
MODULES = (
    "patch_cases",
    "node_cases",
    "inside_cases",
    "attention_cases",
    "cache_cases",
    "block_cases",
    "census_cases",
)
_NOTHING = "-"
# By node that is refused.
REASONS = {
    "ModelAttentionBackend": "Ranks have a kernel of their own; Mesh Config has it.",
    "TorchCompileModel": "ComfyUI would compile a network without weights; Mesh Config compiles on the ranks.",
}


@dataclass
class Row:
    """One node: by family what came of its cases, each once; the greatest distance of any."""

    verdicts: dict[str, list[str]] = field(default_factory=dict)
    distance: float = 0.0

    @property
    def is_refused(self) -> bool:
        return any(told.startswith("refused") for verdicts in self.verdicts.values() for told in verdicts)

    def add(self, family: str, outcome: Mapping[str, Any]) -> None:
        told = self.verdicts.setdefault(family, [])
        for verdict in (verdict_of(outcome), *_by_node(outcome)):
            if verdict not in told:
                told.append(verdict)
        self.distance = max(self.distance, outcome.get("far", 0.0))

    def cells(self, node: str) -> list[str]:
        told = ["; ".join(sorted(self.verdicts.get(family, [_NOTHING]))) for family in FAMILIES]
        return [
            node,
            *told,
            f"{self.distance:.0e}" if self.distance else _NOTHING,
            REASONS.get(node, "") * self.is_refused,
        ]


def verdict_of(outcome: Mapping[str, Any]) -> str:
    """What a case's outcome comes to, without figures."""
    if "error" in outcome:
        if outcome["refused"] and outcome["failed"] == "parallel":
            return f"refused: {_short(outcome['refused'])}"
        where = "ComfyUI itself" if outcome["failed"] == "local" else "the parallel MODEL alone"
        return f"fails in {where}: {outcome['error'].split(':')[0]}"
    if outcome["far"] > 1e-4:
        return "another latent"
    if outcome["effect"] < 1e-4:
        return "no effect (as in ComfyUI)"
    return "step by step" if outcome["said"].startswith("step by step") else "whole loop"


def _by_node(outcome: Mapping[str, Any]) -> Iterator[str]:
    """What ParallelSampler does otherwise than KSampler."""
    if "by_node" in outcome and (told := verdict_of(outcome["by_node"])) != verdict_of(outcome):
        yield f"by ParallelSampler {told}"


def _short(refused: str) -> str:
    """What is named, without where in the code it was written."""
    named = re.sub(r"^A parallel MODEL can't honour |\.$", "", refused)
    named = re.sub(r" \([^()]*\)| by \S+ of \w+", "", named)
    return re.sub(r"(^|; )the ", r"\1", named).replace("|", "/")


def rows_of(outcomes: Mapping[str, Mapping[str, Any]], nodes: set[str]) -> dict[str, Row]:
    """By node, of outcomes by "model, case"; a case that isn't named after nodes is none of them."""
    rows: dict[str, Row] = {}
    for name, outcome in outcomes.items():
        family = "SDXL" if name.startswith("sdxl") else "SD3.5"
        for node in filter(None, (node_of(part, nodes) for part in name.split(", "))):
            rows.setdefault(node, Row()).add(family, outcome)
    return rows


def node_of(case: str, nodes: set[str]) -> str | None:
    """The node that the words begin with."""
    begun = [node for node in nodes if case.startswith(node) and not re.match(r"\w", case[len(node) :])]
    return max(begun, key=len, default=None)


def core_nodes(comfy: Path) -> set[str]:
    """Names of the nodes in ComfyUI's own files."""
    texts = [path.read_text() for path in (comfy / "nodes.py", *(comfy / "comfy_extras").glob("*.py"))]
    patterns = (r'node_id\s*=\s*"([^"]+)"', r'^    "([^"]+)":\s*[A-Z]\w*,?\s*(?:#.*)?$')
    return {name for text in texts for pattern in patterns for name in re.findall(pattern, text, re.M)}


def version_of(comfy: Path) -> str:
    """As ComfyUI says it."""
    return re.findall(r'__version__ = "([^"]+)"', (comfy / "comfyui_version.py").read_text())[0]


def page(rows: Mapping[str, Row], version: str) -> str:
    """As it is kept."""
    table = [["node", *FAMILIES, "distance", "why"], ["---"] * (len(FAMILIES) + 3)]
    table += [rows[node].cells(node) for node in sorted(rows, key=str.lower)]
    return _HEAD.format(version=version) + "\n".join(f"| {' | '.join(cells)} |" for cells in table) + "\n"


def kept_verdicts(text: str) -> dict[tuple[str, str], set[str]]:
    """Of a page, by node and family."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    of = {(row[0], family): set(row[1 + i].split("; ")) for row in rows[2:] for i, family in enumerate(FAMILIES)}
    return {key: told for key, told in of.items() if told != {_NOTHING}}


def assert_kept(outcomes: Mapping[str, Mapping[str, Any]], comfy: Path) -> None:
    """The page says what came of these cases; skips the test on a ComfyUI of another version than the page's."""
    text, version = KEPT.read_text(), version_of(comfy)
    if f"Of ComfyUI {version}:" not in text:
        pytest.skip(f"{KEPT.name} is of another ComfyUI than {version}")
    rows = rows_of(outcomes, core_nodes(comfy))
    assert rows and not not_kept(rows, text), f"{not_kept(rows, text)}; {COMMAND} makes the page anew"


def not_kept(rows: Mapping[str, Row], text: str) -> list[str]:
    """What of these rows the page doesn't say."""
    kept = kept_verdicts(text)
    return [
        f"{node} on {family}: {told}"
        for node, row in rows.items()
        for family, verdicts in row.verdicts.items()
        for told in verdicts
        if not set(told.split("; ")) <= kept.get((node, family), set())
    ]


_HEAD = f"""# ComfyUI's own nodes on a parallel MODEL

Of ComfyUI {{version}}: each node's own code, on a local MODEL and on a parallel one of two ranks, by KSampler and by Parallel Sampler, which are one way into
the backend: where they differ, the cell says so. `{COMMAND}` makes this page; tests look whether it holds.

- whole loop: one request a picture, all steps in the backend.
- step by step: ComfyUI's own loop, one request an evaluation.
- no effect: none on that family, here as in ComfyUI.
- refused: before the first step, by that name. The last column says why.
- distance: the greatest difference from the local MODEL's latent, as a share of its greatest value, in fp32.

A node with two entries in a cell does one or the other by its settings.

"""


def run() -> str:
    """The page, from small models of both families in a folder of their own."""
    with tempfile.TemporaryDirectory(prefix="pm-") as folder:
        os.environ["PARALLEL_MMDIT_RUNTIME_DIR"] = folder
        from comfyui.installation import find_installation
        from comfyui.twin_run import run_twins

        from parallel_backend import Backend
        from parallel_backend.small_checkpoints.mmdit import FAMILIES as MMDITS
        from parallel_backend.small_checkpoints.mmdit import small_config, write_mmdit
        from parallel_backend.small_checkpoints.unet import CONFIGS, write_unet

        comfy = find_installation()
        if isinstance(comfy, str):
            raise SystemExit(comfy)
        models = Path(folder) / "models"
        for family in MMDITS:
            write_mmdit(models / f"{family}.safetensors", small_config(family))
        write_unet(models / "unet-tiny.safetensors", CONFIGS["tiny"], "single file")
        backend = Backend(2, "cpu", "census", idle_seconds=300)
        try:
            environment = {"TWINS_WORLD": "2", "TWINS_BY_NODE": "1"}
            outcomes = run_twins(comfy, backend, models, *MODULES, seconds=1800, **environment)
        finally:
            backend.stop()
        named = {f"{model}, {case}": outcome for model, cases in outcomes.items() for case, outcome in cases.items()}
        return page(rows_of(named, core_nodes(comfy.folder)), version_of(comfy.folder))


if __name__ == "__main__":
    made = run()
    if "--write" in sys.argv[1:]:
        KEPT.write_text(made)
    print(made, end="")
