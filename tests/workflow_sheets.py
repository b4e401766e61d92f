"""Small workflows of both forms, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

JSON = dict[str, Any]
MODEL, CLIP, VAE, COND, LATENT = "MODEL", "CLIP", "VAE", "CONDITIONING", "LATENT"
CONTROL = "CONTROL_NET"


class Sheet:
    """A workflow of the editor's form, written node by node; the inputs of a node name a node and its output's number."""

    def __init__(self) -> None:
        self.nodes: list[JSON] = []
        self.links: list[list[Any]] = []

    def add(
        self, kind: str, outputs: Sequence[str] = (), widgets: Sequence[Any] = (), mode: int = 0, **inputs: Any
    ) -> int:
        node_id = len(self.nodes) + 1
        sockets = []
        for slot, (name, (origin, number, link_kind)) in enumerate(inputs.items()):
            self.links.append([len(self.links) + 1, origin, number, node_id, slot, link_kind])
            sockets.append({"name": name, "type": link_kind, "link": len(self.links)})
            source = self.nodes[origin - 1]["outputs"][number]
            source["links"] = [*(source["links"] or []), len(self.links)]
        self.nodes.append(
            {
                "id": node_id,
                "type": kind,
                "pos": [350 * len(self.nodes), 0],
                "size": [300, 100],
                "mode": mode,
                "inputs": sockets,
                "outputs": [{"name": output, "type": output, "links": None} for output in outputs],
                "widgets_values": list(widgets),
            }
        )
        return node_id

    def checkpoint(self, file: str) -> int:
        return self.add("CheckpointLoaderSimple", (MODEL, CLIP, VAE), [file])

    def sampler(self, model: int, clip: int, slot: int = 0, **others: Any) -> int:
        prompt = self.add("CLIPTextEncode", [COND], ["a fox"], clip=(clip, 1, CLIP))
        conditionings = dict.fromkeys(("positive", "negative"), (prompt, 0, COND))
        return self.add("KSampler", [LATENT], [1], model=(model, slot, MODEL), **(conditionings | others))

    def whole(self) -> JSON:
        return {
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "version": 0.4,
        }


def plain(file: str = "sd_xl_base_1.0.safetensors") -> JSON:
    sheet = Sheet()
    loader = sheet.checkpoint(file)
    sheet.sampler(loader, loader)
    return sheet.whole()


def prompt(file: str = "sd3.5_medium.safetensors") -> JSON:
    return {
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": file}},
        "5": {
            "class_type": "LoraLoader",
            "inputs": {"model": ["4", 0], "clip": ["4", 1], "lora_name": "a.safetensors"},
        },
        "6": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["5", 1], "text": "a fox"}},
        "3": {
            "class_type": "KSampler",
            "inputs": {"model": ["5", 0], "positive": ["6", 0], "negative": ["6", 0], "seed": 1},
        },
    }


def subgraph(file: str) -> JSON:
    """A loader and a sampler inside; the file's name and the latent come in, the latent goes out."""
    inner = Sheet()
    loader = inner.checkpoint("of-the-definition.safetensors")
    inner.sampler(loader, loader)
    for node in inner.nodes:
        node["id"] += 10
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [dict(zip(names, (i, o + 10, s, t + 10, n, k), strict=True)) for i, o, s, t, n, k in inner.links]
    links += [dict(zip(names, (8, -10, 0, 11, 0, "COMBO"), strict=True))]
    links += [dict(zip(names, (9, 13, 0, -20, 0, LATENT), strict=True))]
    inner.nodes[0]["inputs"] = [{"name": "ckpt_name", "type": "COMBO", "widget": {"name": "ckpt_name"}, "link": 8}]
    inner.nodes[2]["outputs"][0]["links"] = [9]
    definition = {
        "id": "11111111-2222",
        "name": "Draw",
        "state": {"lastNodeId": 13, "lastLinkId": 9},
        "inputs": [{"name": "ckpt_name", "type": "COMBO", "linkIds": [8]}],
        "outputs": [{"name": LATENT, "type": LATENT, "linkIds": [9]}],
        "nodes": inner.nodes,
        "links": links,
    }
    outer = Sheet()
    node = outer.add("11111111-2222", [LATENT], [file])
    outer.nodes[0]["inputs"] = [{"name": "ckpt_name", "type": "COMBO", "widget": {"name": "ckpt_name"}, "link": None}]
    outer.add("SaveLatent", samples=(node, 0, LATENT))
    outer.nodes[1]["id"] = outer.links[0][3] = 40
    return outer.whole() | {"last_node_id": 40, "definitions": {"subgraphs": [definition]}}
