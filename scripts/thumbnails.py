#!/usr/bin/env python3
"""Makes the picture of each workflow that ComfyUI's template browser shows: a JPEG beside it, of the same name.

python scripts/thumbnails.py http://127.0.0.1:8188     # a running ComfyUI with this pack

The demo's show what they draw: they are run, with the seeds that stand in them, and so give the same pictures each time. The others,
whose models are large, show their nodes and links, as scripts/ui_workflow.py has laid them out; run that first.
"""

from __future__ import annotations

import io
import json
import sys
import time
import urllib.parse
import urllib.request
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from ui_workflow import NOTE, Template, templates

SIDE, TEXT_TOP, MARGIN = 400, 290, 14
QUALITY = 88
RUN_SECONDS = 600
BACKGROUND, PLATE, INK, FAINT = "#1d1f24", "#15161a", "#f2f2f2", "#a9adb8"
# Of what goes through a link, and of the node that it comes from.
COLORS = {
    "MODEL": "#b39ddb",
    "CLIP": "#e6c84f",
    "VAE": "#ff6e6e",
    "CONDITIONING": "#ffa931",
    "LATENT": "#ff9cf9",
    "IMAGE": "#64b5f6",
    "MASK": "#81c784",
    "CONTROL_NET": "#6ee7b7",
}
OTHER, BOX = "#2dd4bf", "#3a3d46"  # a mesh, and a node's body


def thumbnail(template: Template, server: str) -> Image.Image:
    """SIDE x SIDE: the pictures or the graph above, the title below. The browser lays a badge on the upper left."""
    picture = Image.new("RGB", (SIDE, SIDE), BACKGROUND)
    if template.name.startswith("demo"):
        _place(picture, drawn(template, server))
    else:
        _draw_graph(picture, json.loads(template.path.read_text()))
    _write_title(picture, template.title)
    return picture


def drawn(template: Template, server: str) -> list[Image.Image]:
    """All pictures that the workflow shows or saves, in the order of its nodes."""
    answer = _ask(f"{server}/prompt", {"prompt": template.prompt})
    started = time.monotonic()
    while not (history := _ask(f"{server}/history/{answer['prompt_id']}")):
        if time.monotonic() - started > RUN_SECONDS:
            raise TimeoutError(f"{template.title} has not ended in {RUN_SECONDS} s")
        time.sleep(0.5)
    run = history[answer["prompt_id"]]
    if run["status"]["status_str"] != "success":
        raise RuntimeError(f"{template.title} did not run: {run['status']['messages'][-1]}")
    kept = sorted(run["outputs"].items(), key=lambda output: int(output[0]))
    found = [image for _, output in kept for image in output.get("images", [])]
    return [Image.open(io.BytesIO(_get(f"{server}/view?{urllib.parse.urlencode(image)}"))) for image in found]


def _ask(url: str, body: dict[str, Any] | None = None) -> Any:
    return json.loads(_get(url, None if body is None else json.dumps(body).encode()))


def _get(url: str, data: bytes | None = None) -> bytes:
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        body: bytes = answer.read()
    return body


def _place(picture: Image.Image, shown: list[Image.Image]) -> None:
    """Side by side, as large as they fit."""
    side = min((SIDE - MARGIN * (len(shown) + 1)) // len(shown), TEXT_TOP - 2 * MARGIN)
    left = (SIDE - len(shown) * side - (len(shown) - 1) * MARGIN) // 2
    for index, image in enumerate(shown):
        resized = image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        picture.paste(resized, (left + index * (side + MARGIN), (TEXT_TOP - side) // 2))


def _draw_graph(picture: Image.Image, workflow: dict[str, Any]) -> None:
    nodes = {node["id"]: node for node in workflow["nodes"] if node["type"] != NOTE}
    right = max(node["pos"][0] + node["size"][0] for node in nodes.values())
    bottom = max(node["pos"][1] + node["size"][1] for node in nodes.values())
    top = 50  # below the browser's badge
    scale = min((SIDE - 2 * MARGIN) / right, (TEXT_TOP - MARGIN - top) / bottom)
    left, down = (SIDE - right * scale) / 2, top + (TEXT_TOP - MARGIN - top - bottom * scale) / 2
    # Four times as large, for smooth edges.
    canvas = Image.new("RGB", (4 * SIDE, 4 * SIDE), BACKGROUND)
    draw = ImageDraw.Draw(canvas)

    def place(x: float, y: float) -> tuple[float, float]:
        return 4 * (left + x * scale), 4 * (down + y * scale)

    for node in nodes.values():
        x, y = node["pos"]
        box = (*place(x, y), *place(x + node["size"][0], y + node["size"][1]))
        draw.rounded_rectangle(box, 12, BOX)
        kinds = [output["type"] for output in node["outputs"]]
        color = COLORS.get(kinds[0], OTHER) if kinds else COLORS["IMAGE"]
        draw.rounded_rectangle((box[0], box[1], box[2], min(box[1] + 26, box[3])), 12, color)
    for _, origin, slot, target, entry, kind in workflow["links"]:
        (x0, y0), (x1, y1) = nodes[origin]["pos"], nodes[target]["pos"]
        start = place(x0 + nodes[origin]["size"][0], y0 + 70 + 50 * slot)
        end = place(x1, y1 + 70 + 50 * entry)
        draw.line(_curve(start, end), COLORS.get(kind, OTHER), 9, "curve")
    picture.paste(canvas.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def _curve(start: tuple[float, float], end: tuple[float, float]) -> list[tuple[float, float]]:
    """From left to right, level at both ends."""
    steps = [i / 24 for i in range(25)]
    rise = [t * t * (3 - 2 * t) for t in steps]
    return [
        (start[0] + (end[0] - start[0]) * t, start[1] + (end[1] - start[1]) * r)
        for t, r in zip(steps, rise, strict=True)
    ]


def _write_title(picture: Image.Image, title: str) -> None:
    """What the model is, large, and what is done with it."""
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, TEXT_TOP, SIDE, SIDE), PLATE)
    model, _, what = title.partition(" ")[2].partition(" - ")
    draw.text((MARGIN + 2, TEXT_TOP + 6), model, INK, ImageFont.load_default(38))
    size = 30
    while (font := ImageFont.load_default(size)) and draw.textlength(what, font) > SIDE - 2 * MARGIN - 4:
        size -= 1
    draw.text((MARGIN + 2, TEXT_TOP + 60), what, FAINT, font)


def main() -> None:
    for template in templates():
        thumbnail(template, sys.argv[1]).save(template.thumbnail, quality=QUALITY, optimize=True)
        print(template.thumbnail, template.thumbnail.stat().st_size)


if __name__ == "__main__":
    main()
