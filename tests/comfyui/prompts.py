"""Prompts in ComfyUI's API form, built node by node."""

from __future__ import annotations

from typing import Any

Link = list[Any]


class Prompt:
    """`add` gives the id of a node; `out(id, 0)` a link to its first output."""

    def __init__(self) -> None:
        self.nodes: dict[str, Any] = {}

    def add(self, class_type: str, **inputs: Any) -> str:
        node_id = str(len(self.nodes) + 1)
        self.nodes[node_id] = {"class_type": class_type, "inputs": inputs}
        return node_id


def out(node_id: str, index: int = 0) -> Link:
    return [node_id, index]


def mesh(prompt: Prompt, backend: str = "comfy", **settings: Any) -> Link:
    defaults = {
        "ranks": 2, "device": "cpu", "devices": "", "cfg": 0, "ulysses": 0, "ring": 1, "tp": 1, "dp": 1,
        "dtype": "float32", "attention": "auto", "backend": backend, "memory_budget_mib": 0, "idle_minutes": 30,
    }  # fmt: skip
    return out(prompt.add("MeshConfig", **defaults | settings))


def conditioning(prompt: Prompt, seed: int, tokens: int = 77, **more: Any) -> Link:
    return out(prompt.add("ProbeRandomConditioning", seed=seed, tokens=tokens, **more))


def sampler(
    prompt: Prompt, node: str, model: Link, positive: Link, negative: Link, latent: Link, **settings: Any
) -> Link:
    defaults = {"seed": 5, "steps": 3, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    links = {"model": model, "positive": positive, "negative": negative, "latent_image": latent}
    return out(prompt.add(node, **defaults | settings, **links))


def save_latent(prompt: Prompt, samples: Link, name: str) -> str:
    return prompt.add("SaveLatent", samples=samples, filename_prefix=name)
