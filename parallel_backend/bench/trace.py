"""A job seen rank by rank: a picture (ranks down, time across), a Chrome trace, and a table of computing and waiting."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..client.backend import Backend
from ..config import AXES, MeshSpec
from ..distributed.traffic import COMPUTE
from ..errors import ConfigError
from ..rpc.conditioning import Conditioning
from ..small_checkpoints.mmdit import small_config, write_mmdit
from ..small_checkpoints.prompts import random_prompt

WIDTH, LANE, BOX, MARGIN = 1600, 46, 30, 60
HUES = 47  # degrees between the colours of neighbouring patches
RANK, KIND, STEP, PATCH, START, END, BYTES = range(7)


def run_trace(mesh: MeshSpec, settings: dict[str, Any], size: int, depth: int, path: Path | None, output: Path) -> None:
    """Writes trace.svg and trace.json, and prints the table.

    Args:
        settings: of `RemoteModel.sample`.
        path: an MMDiT; a small one with random weights where left out.
    Raises: BackendError: a mesh, size or sampler that can't be had.
    """
    output.mkdir(parents=True, exist_ok=True)
    prompts = Conditioning(*random_prompt(1, 80)), Conditioning(*random_prompt(2, 80))
    backend = Backend(mesh.world_size, "cpu", f"trace{mesh.world_size}")
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = small_config("sd3.5-medium", depth=depth, heads=8, pos_embed_size=max(64, size // 16))
            model = backend.load_model(
                path or write_mmdit(Path(folder) / "mmdit.safetensors", config), mesh, "float32", kind="mmdit"
            )
            for _ in range(2):  # the first time, memory is new
                model.sample(torch.zeros(1, 16, size // 8, size // 8), *prompts, trace=True, **settings)
        assert model.timeline is not None
        rows = model.timeline
    finally:
        backend.stop()
    said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items() if value is not None)
    (output / "trace.svg").write_text(picture(rows, f"{mesh.describe()}, {size} x {size} pixels, {said}"))
    (output / "trace.json").write_text(json.dumps(chrome_trace(rows)))
    print(table(rows))
    print(f"\n{output / 'trace.svg'}, {output / 'trace.json'} (chrome://tracing or Perfetto opens the second)")


def table(rows: Tensor) -> str:
    """Milliseconds of computing and waiting, and bytes, by step, rank and axis."""
    lines = ["| step | rank | computing, ms | waiting, ms | bytes sent |", "|---|---|---|---|---|"]
    for step in rows[:, STEP].unique().tolist():
        for rank in rows[:, RANK].unique().tolist():
            own = rows[(rows[:, STEP] == step) & (rows[:, RANK] == rank)]
            spent = (own[:, END] - own[:, START]) * 1000
            waits = {a: float(spent[own[:, KIND] == n].sum()) for n, a in enumerate(AXES, start=1)}
            # Waits lie inside the spans of computing, but for those of a pipeline's ends.
            computing = float(spent[own[:, KIND] == COMPUTE].sum()) - _inside(own) * 1000
            sent = {a: int(own[own[:, KIND] == -n][:, BYTES].sum()) for n, a in enumerate(AXES, start=1)}
            waited = ", ".join(f"{axis} {ms:.1f}" for axis, ms in waits.items() if ms) or "-"
            moved = ", ".join(f"{axis} {count:,}" for axis, count in sent.items() if count) or "-"
            lines.append(f"| {step:.0f} | {rank:.0f} | {computing:.1f} | {waited} | {moved} |")
    return "\n".join(lines)


def _inside(own: Tensor) -> float:
    """Seconds of waiting that lie inside spans of computing."""
    spans = own[own[:, KIND] == COMPUTE][:, [START, END]].tolist()
    waits = own[own[:, KIND] > COMPUTE][:, [START, END]].tolist()
    return sum(b - a for a, b in waits if any(start <= a and b <= end for start, end in spans))


def picture(rows: Tensor, title: str) -> str:
    """An SVG: a lane for each rank, a box for each patch and step, waits in grey upon them."""
    timed = rows[rows[:, KIND] >= COMPUTE]
    ranks, first, last = int(timed[:, RANK].max()) + 1, float(timed[:, START].min()), float(timed[:, END].max())
    scale = (WIDTH - 2 * MARGIN) / max(last - first, 1e-9)
    boxes = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{ranks * LANE + 2 * MARGIN}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{MARGIN}" y="24" font-size="14">{_escaped(title)}</text>',
        f'<text x="{MARGIN}" y="42">{(last - first) * 1000:.0f} ms; the number is the step, the colour the patch, '
        "grey is waiting</text>",
    ]
    for rank in range(ranks):
        boxes.append(f'<text x="8" y="{MARGIN + rank * LANE + BOX / 2 + 4}">rank {rank}</text>')
    for rank, kind, step, patch, start, end, _ in sorted(timed.tolist(), key=lambda row: row[KIND] != COMPUTE):
        x, y = MARGIN + (start - first) * scale, MARGIN + rank * LANE
        width = max((end - start) * scale, 0.3)
        if kind == COMPUTE:
            fill = "#d8d8f0" if patch < 0 else f"hsl({int(patch) * HUES % 360} 70% 72%)"
            boxes.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BOX}" fill="{fill}" stroke="#555"/>')
            if width > 12:
                boxes.append(f'<text x="{x + 3:.1f}" y="{y + 13}">{step:.0f}</text>')
        else:
            boxes.append(f'<rect x="{x:.1f}" y="{y + 18}" width="{width:.1f}" height="{BOX - 18}" fill="#999"/>')
    return "\n".join([*boxes, "</svg>"])


def chrome_trace(rows: Tensor) -> list[dict[str, Any]]:
    """Events as Chrome's tracing has them: microseconds, a thread for each rank."""
    events = []
    origin = float(rows[rows[:, KIND] >= COMPUTE][:, START].min())
    for rank, kind, step, patch, start, end, _ in rows.tolist():
        if kind >= COMPUTE:
            name = f"step {step:.0f}" + (f" patch {patch:.0f}" if patch >= 0 else "")
            name = name if kind == COMPUTE else f"waits for {AXES[int(kind) - 1]}"
            times = {"ts": (start - origin) * 1e6, "dur": (end - start) * 1e6}
            events.append({"name": name, "ph": "X", "pid": 0, "tid": int(rank), **times})
    return events


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def mesh_of(words: Sequence[str]) -> MeshSpec:
    """From words such as pp=2 ulysses=2.

    Raises: ConfigError: an axis or a degree that is none.
    """
    degrees: dict[str, Any] = {}
    for word in words:
        axis, _, degree = word.partition("=")
        if axis not in AXES or not degree.isdigit():
            raise ConfigError(f"{word!r} is no axis and degree.", f"Write them like pp=2; axes are {', '.join(AXES)}.")
        degrees[axis] = int(degree)
    return MeshSpec(**degrees)
