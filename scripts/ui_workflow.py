#!/usr/bin/env python3
"""Makes the workflow that the editor opens out of its API-format twin, which is the one written by hand.

python scripts/ui_workflow.py http://127.0.0.1:8188     # every file of workflows/api, from a running ComfyUI

The editor's form also has a note, of workflows/notes beside it, and on nodes that load files where these are had. Its file name is
the title that the template browser shows: the first line of the note.
"""

from __future__ import annotations

import json
import re
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKFLOWS = Path(__file__).parents[1] / "workflows"
NOTES = WORKFLOWS / "notes"
COLUMN, GAP, TITLE, ROW = 420, 40, 60, 26
NOTE = "MarkdownNote"
NOTE_WIDTH, LETTERS, LINE = 520, 80, 20  # pixels, letters in that width, pixels
CORE, OWN = "comfy-core", "parallel-mmdit"  # packs, as the editor names them where one is missing
PREVIEW_ROWS = {
    "SaveImage": 12,
    "LoadImage": 12,
    "MeshConfig": 9,
    "LoadParallelMMDiT": 3,
    "LoadParallelUNet": 3,
    "LoadParallelControlNet": 3,
    "PatchParallelVAE": 3,
    "ParallelSampler": 1,
    "PreviewImage": 12,
    "DualCLIPLoader": 1,
    "EmptySD3LatentImage": 1,
    "EmptyLatentImage": 1,
}
TALL_TEXT_ROWS = 5
# For inputs that the editor shows on demand.
ROWS_BELOW = {"MeshConfig": 14}


@dataclass(frozen=True)
class Template:
    """What one file of workflows/api becomes: `title` is the name in the template browser, `text` the note's."""

    name: str
    title: str
    text: str

    @property
    def path(self) -> Path:
        return WORKFLOWS / f"{self.title}.json"

    @property
    def thumbnail(self) -> Path:
        """ComfyUI's browser looks for it beside the workflow."""
        return WORKFLOWS / f"{self.title}.jpg"

    @property
    def prompt(self) -> dict[str, Any]:
        prompt: dict[str, Any] = json.loads((WORKFLOWS / "api" / f"{self.name}.json").read_text())
        return prompt

    def workflow(self, object_info: dict[str, Any]) -> dict[str, Any]:
        """The editor's form, with the note and where the files are had."""
        models = json.loads((NOTES / "models.json").read_text())
        workflow, wanted = ui_workflow(self.prompt, object_info), dict[str, Any]()
        for node in workflow["nodes"]:
            own = object_info[node["type"]]["python_module"].startswith("custom_nodes")
            node["properties"]["cnr_id"] = OWN if own else CORE
            files = [value for value in node["widgets_values"] if _file_name(value) in models]
            if files:
                node["properties"]["models"] = [_download(value, models[_file_name(value)]) for value in files]
            wanted |= {_file_name(value): models[_file_name(value)] for value in files}
        _add_note(workflow, f"{self.text}\n\n{_files_text(wanted)}")
        return workflow


def templates() -> list[Template]:
    """Of all workflows, in the order of their titles."""
    found = []
    for path in (WORKFLOWS / "api").glob("*.json"):
        first, _, text = (NOTES / f"{path.stem}.md").read_text().partition("\n")
        found.append(Template(path.stem, first.removeprefix("# "), text.strip()))
    return sorted(found, key=lambda template: template.title)


def template(name: str) -> Template:
    """That of workflows/api/NAME.json."""
    return next(found for found in templates() if found.name == name)


def _file_name(value: Any) -> str:
    return value.rpartition("/")[2] if isinstance(value, str) else ""


def _download(value: str, model: dict[str, Any]) -> dict[str, str]:
    """For the editor's list of missing models, which knows a file by the name that the node's widget has."""
    return {"name": value, "url": model["url"], "directory": model["directory"]}


def _files_text(wanted: dict[str, Any]) -> str:
    if not wanted:
        return "**Files**: none. The demo's models come with this pack, or are fetched when they are first used."
    lines = ["**Files**, in ComfyUI's models folder:", ""]
    for name, model in wanted.items():
        repository = model["url"].partition("/resolve/")[0]
        licence = f": first accept the licence on [its page]({repository})" if model.get("gated") else ""
        lines.append(f"- [{model['directory']}/{name}]({model['url']}){licence}")
    return "\n".join(lines)


def _add_note(workflow: dict[str, Any], text: str) -> None:
    """Left of all nodes."""
    shown = re.sub(r"\]\([^)]*\)", "", text)
    lines = sum(1 + len(line) // LETTERS for line in shown.splitlines())
    workflow["last_node_id"] += 1
    workflow["nodes"].append(
        {
            "id": workflow["last_node_id"],
            "type": NOTE,
            "title": "Note: what to load, what to change",
            "pos": [-NOTE_WIDTH - GAP, 0],
            "size": [NOTE_WIDTH, (lines + 2) * LINE],
            "flags": {},
            "order": len(workflow["nodes"]),
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "properties": {},
            "widgets_values": [text],
            "color": "#222",
            "bgcolor": "#000",
        }
    )


def ui_workflow(prompt: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """The editor's form of an API-format prompt: nodes in columns, each right of those it needs."""
    links: list[list[Any]] = []
    nodes: dict[str, dict[str, Any]] = {}
    for order, node_id in enumerate(_in_order(prompt)):
        node = prompt[node_id]
        nodes[node_id] = made = _node(int(node_id), node, object_info[node["class_type"]], order)
        for slot, entry in enumerate(made["inputs"]):
            value = node["inputs"].get(entry["name"])
            if isinstance(value, list):
                link = len(links) + 1
                source = nodes[value[0]]["outputs"][value[1]]
                links.append([link, int(value[0]), value[1], int(node_id), slot, source["type"]])
                source["links"] = [*(source["links"] or []), link]
                entry["link"] = link
    _lay_out(nodes, prompt)
    return {
        "last_node_id": max(int(node_id) for node_id in prompt),
        "last_link_id": len(links),
        "nodes": list(nodes.values()),
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _lay_out(nodes: dict[str, dict[str, Any]], prompt: dict[str, Any]) -> None:
    """Beside the node that a node's first link comes from, so that links run straight and cross little."""
    for column in range(max(_column(prompt, i) for i in prompt) + 1):
        members = [i for i in nodes if _column(prompt, i) == column]
        wished = {
            i: max((nodes[n]["pos"][1] for n in _needed(prompt[i])[:1] if "pos" in nodes[n]), default=0)
            for i in members
        }
        bottom = 0
        for node_id in sorted(members, key=lambda i: (wished[i], -_consumers(prompt, i), int(i))):
            made = nodes[node_id]
            made["pos"] = [column * (COLUMN + GAP), max(bottom, wished[node_id])]
            bottom = made["pos"][1] + made["size"][1] + TITLE + ROWS_BELOW.get(made["type"], 0) * ROW


def api_prompt(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """What the editor would queue for such a workflow: the way back, for the test that twins are equal."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] == NOTE:
            continue
        inputs: dict[str, Any] = {}
        values = iter(node["widgets_values"])
        for name, kind, options in inputs_of(object_info[node["type"]]):
            if is_widget(kind, options):
                inputs[name] = next(values)
                for _ in range(widgets_beside(name, options)):
                    next(values)
        for entry in node["inputs"]:
            if entry["link"] is not None:
                inputs[entry["name"]] = sources[entry["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": node["title"]}}
    return prompt


def _node(node_id: int, node: dict[str, Any], info: dict[str, Any], order: int) -> dict[str, Any]:
    given = dict(node["inputs"])
    sockets, values, rows = [], [], max(1, len(info["output"]))
    for name, kind, options in inputs_of(info):
        if is_widget(kind, options) and name not in given:
            raise ValueError(f"{node['class_type']} has no value for {name!r}: the editor would queue one")
        value = given.pop(name, None)
        if is_widget(kind, options):
            values += [value, *(["fixed"] if _has_seed_control(name, options) else [])]
            values += ["image"] if options.get("image_upload") else []
            shown = 1 + widgets_beside(name, options) + (TALL_TEXT_ROWS if options.get("multiline") else 0)
            rows += 0 if options.get("advanced") else shown
        elif value is not None:
            sockets.append({"name": name, "type": kind, "link": None})
            rows += 1
    if given:
        raise ValueError(f"{node['class_type']} has no inputs {sorted(given)}; its own are {sorted(_names(info))}")
    outputs = zip(info["output_name"], info["output"], strict=True)
    return {
        "id": node_id,
        "type": node["class_type"],
        "title": node["_meta"]["title"],
        "size": [COLUMN, (rows + PREVIEW_ROWS.get(node["class_type"], 0)) * ROW],
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": sockets,
        "outputs": [{"name": name, "type": kind, "links": None} for name, kind in outputs],
        "properties": {"Node name for S&R": node["class_type"]},
        "widgets_values": values,
    }


def inputs_of(info: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, kind and options of each input of a class of nodes, in the order of the editor's widgets."""
    found = []
    for group in ("required", "optional"):
        for name in info["input_order"].get(group, []):
            kind, *options = info["input"][group][name]
            found.append((name, "COMBO" if isinstance(kind, list) else kind, options[0] if options else {}))
    return found


def _names(info: dict[str, Any]) -> set[str]:
    return {name for name, _, _ in inputs_of(info)}


def is_widget(kind: str, options: dict[str, Any]) -> bool:
    return kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO") and not options.get("forceInput")


def _has_seed_control(name: str, options: dict[str, Any]) -> bool:
    return bool(options.get("control_after_generate")) or name in ("seed", "noise_seed")


def widgets_beside(name: str, options: dict[str, Any]) -> int:
    """How many more values the editor keeps for a widget than the API takes."""
    return _has_seed_control(name, options) + bool(options.get("image_upload"))


def _depth(prompt: dict[str, Any], node_id: str) -> int:
    return max((_depth(prompt, other) + 1 for other in _needed(prompt[node_id])), default=0)


def _column(prompt: dict[str, Any], node_id: str) -> int:
    """The depth; a node that needs nothing stands just left of the first that needs it."""
    users = [i for i, node in prompt.items() if node_id in _needed(node)]
    depth = _depth(prompt, node_id)
    return depth if depth or not users else min(_depth(prompt, i) for i in users) - 1


def _consumers(prompt: dict[str, Any], node_id: str) -> int:
    return sum(_needed(node).count(node_id) for node in prompt.values())


def _needed(node: dict[str, Any]) -> list[str]:
    return [value[0] for value in node["inputs"].values() if isinstance(value, list)]


def _in_order(prompt: dict[str, Any]) -> list[str]:
    return sorted(prompt, key=lambda node_id: (_depth(prompt, node_id), int(node_id)))


def main() -> None:
    with urllib.request.urlopen(f"{sys.argv[1]}/object_info", timeout=30) as answer:
        object_info = json.load(answer)
    for template in templates():
        template.path.write_text(json.dumps(template.workflow(object_info), indent=2) + "\n")
        print(template.path)


if __name__ == "__main__":
    main()
