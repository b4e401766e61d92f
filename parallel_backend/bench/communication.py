"""The published table of what parallel methods send and hold, counted: bytes beside the formulas, term by term.

Symbols: N ranks, L blocks, L2 of them with a second attention of the image alone, T image and text tokens, I image
tokens, C text tokens, D hidden width, P output values of a token, B rows of a batch with both branches of guidance.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..client.backend import Backend
from ..config import MeshSpec
from ..rpc.conditioning import Conditioning
from ..rpc.messages import Result
from ..small_checkpoints.mmdit import small_config, write_mmdit
from ..small_checkpoints.prompts import random_prompt

ITEM = 4  # bytes of fp32
TEXT = 80


@dataclass(frozen=True)
class Method:
    """A row of the table. `published`: bytes of a step in units of B T D, as the table has them."""

    name: str
    axis: str
    published: str
    displaced: bool = False

    def mesh(self, ranks: int) -> MeshSpec:
        return MeshSpec(**{self.axis: ranks})  # type: ignore[arg-type]

    def published_bytes(self, s: Sizes, ranks: int) -> float:
        units = {"4 L": 4 * s.depth, "2 L": 2 * s.depth, "4 L / N": 4 * s.depth / ranks, "2": 2}
        return units[self.published] * s.rows * s.tokens * s.hidden * ITEM


METHODS = (
    Method("tensor parallel", "tp", "4 L"),
    Method("ring", "ring", "2 L"),
    Method("ulysses", "ulysses", "4 L / N"),
    Method("displaced ring (DistriFusion's idea)", "ring", "2 L", displaced=True),
    Method("stages, exact", "pp", "2"),
    Method("PipeFusion", "pp", "2", displaced=True),
)


@dataclass(frozen=True)
class Sizes:
    depth: int
    dual: int
    hidden: int
    image: int
    text: int
    rows: int
    output: int

    @property
    def tokens(self) -> int:
        return self.image + self.text

    def terms(self, method: Method, ranks: int) -> dict[str, float]:
        """Elements that all ranks together send in a step."""
        L, L2, D, I, C, T = self.depth, self.dual, self.hidden, self.image, self.text, self.tokens  # noqa: E741
        N, others = ranks, ranks - 1
        # Each rank's share of the output goes to all others.
        gathered = {"output, (N-1) I P": others * I * self.output}
        if method.axis == "tp":
            vectors = D * (6 * L + 6 * L - 4 + 3 * L2 + 2)  # the last block's text has 2 of 6
            return {
                "image's sums, 2 (N-1) (2 L + L2) I D": 2 * others * (2 * L + L2) * I * D,
                "text's sums, 2 (N-1) (2 L - 2) C D": 2 * others * (2 * L - 2) * C * D,
                "modulations, (N-1) (12 L + 3 L2 - 2) D": others * vectors,
            }
        if method.axis == "ulysses":
            return {
                "q k v out, 4 (N-1)/N L T D": 4 * others / N * L * T * D,
                "second attention, 4 (N-1)/N L2 I D": 4 * others / N * L2 * I * D,
                **gathered,
            }
        if method.axis == "ring":
            return {
                "keys and values, 2 (N-1) L T D": 2 * others * L * T * D,
                "second attention, 2 (N-1) L2 I D": 2 * others * L2 * I * D,
                **gathered,
            }
        if method.displaced:
            return {"from stage to stage, (N-1) T D": others * T * D, "back to the first, I P": I * self.output}
        return {"from stage to stage, (N-1) T D": others * T * D, "output to all, (N-1) I P": others * I * self.output}


def run_communication(ranks: Sequence[int], size: int, depth: int) -> None:
    """Prints the table for each number of ranks.

    Raises: BackendError: a size that the ranks can't share.
    """
    config = small_config("sd3.5-medium", depth=depth, heads=8, pos_embed_size=size // 16)
    sizes = Sizes(
        config.depth, len(config.dual_blocks), config.hidden, (size // 16) ** 2, TEXT, 2, config.patch_size**2 * 16
    )
    print(f"SD3.5-medium's layout: L={sizes.depth}, L2={sizes.dual}, D={sizes.hidden}, I={sizes.image}, C={sizes.text}")
    print(f"T={sizes.tokens}, P={sizes.output}, B={sizes.rows}; bytes of one step, the mean of the ranks, fp32\n")
    print(
        "| method | N | published, T tokens | published, bytes | terms of ours | ours, bytes | counted | counted / ours |"
    )
    print("|---|---|---|---|---|---|---|---|")
    held = []
    with tempfile.TemporaryDirectory() as folder:
        path = write_mmdit(Path(folder) / "mmdit.safetensors", config)
        for world_size in ranks:
            backend = Backend(world_size, "cpu", f"communication{world_size}")
            try:
                held += [_row(backend, path, sizes, method, size) for method in METHODS]
            finally:
                backend.stop()
    print(
        "\n| method | N | parameters of a rank / all | kept from step to step, MiB a rank | peak beyond weights, MiB |"
    )
    print("|---|---|---|---|---|")
    print("\n".join(held))


def _row(backend: Backend, path: Path, sizes: Sizes, method: Method, size: int) -> str:
    """Prints a method's bytes; returns its line about memory."""
    counted, result, shares = count(backend, path, method, size)
    ranks = backend.world_size
    terms = {name: sizes.rows * ITEM * value / ranks for name, value in sizes.terms(method, ranks).items()}
    ours = sum(terms.values())
    named = "; ".join(f"{name}: {value:,.0f}" for name, value in terms.items())
    print(
        f"| {method.name} | {ranks} | {method.published} O(T D) | {method.published_bytes(sizes, ranks):,.0f} | {named} | "
        f"{ours:,.0f} | {counted:,.0f} | {counted / ours:.4f} |"
    )
    kept = " / ".join(f"{rank.kept_bytes / 2**20:.1f}" for rank in result.ranks)
    peaks = [rank.peak_bytes for rank in result.ranks]
    peak = " / ".join("not known on a CPU" if p is None else f"{p / 2**20:.0f}" for p in dict.fromkeys(peaks))
    return f"| {method.name} | {ranks} | {' / '.join(f'{share:.2f}' for share in shares)} | {kept} | {peak} |"


def count(backend: Backend, path: Path, method: Method, size: int) -> tuple[float, Result, list[float]]:
    """Bytes that a rank sends in a step, the mean of all; the run's result; each rank's share of the parameters.

    Two runs that differ by two steps: what the first and the last step have of their own falls out.
    """
    model = backend.load_model(path, method.mesh(backend.world_size), "float32")
    whole = backend.load_model(path, MeshSpec(dp=backend.world_size), "float32").loaded.resident_bytes[0]
    settings: dict[str, Any] = {"warmup_steps": 1} if method.displaced else {}
    sent, last = [], Result(0.0)
    for steps in (3, 5):
        model.sample(
            torch.zeros(1, 16, size // 8, size // 8),
            Conditioning(*random_prompt(1, TEXT)),
            Conditioning(*random_prompt(2, TEXT)),
            steps=steps,
            **settings,
        )
        last = model.last or last
        sent.append(sum(cost.sent_bytes for rank in last.ranks for cost in rank.costs))
    shares = [held / whole for held in model.loaded.resident_bytes]
    return (sent[1] - sent[0]) / 2 / backend.world_size, last, shares
