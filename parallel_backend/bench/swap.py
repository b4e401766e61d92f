"""What it takes to lay a LoRA on a loaded model, to change its strength, to take it off: seconds, and bytes read of the file."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from ..checkpoint_files.diffusion_part import diffusion_entries
from ..checkpoint_files.patch_file import LowRank
from ..client.backend import Backend
from ..client.remote import RemoteModel
from ..client.weight_patches import WeightPatches
from ..config import MeshSpec
from ..rpc.conditioning import Conditioning
from ..rpc.state import Swap
from ..small_checkpoints.mmdit import small_config, write_mmdit
from ..small_checkpoints.prompts import random_prompt

# What LoRAs are trained for: the layers of attention and of the MLP.
_PATCHED = (".attn", ".mlp.", ".ff.", ".proj_")


def run_swap(model: Path | None, tps: Sequence[int], rank: int, rounds: int, depth: int) -> None:
    """Prints a line for each tp degree and change, medians of `rounds`.

    Args:
        model: an SD3 or SD3.5 file; a small one of `depth` blocks with random weights where None.
        rank: of the LoRA, which has a product for each layer of attention and MLP.
    """
    with tempfile.TemporaryDirectory(prefix="parallel-mmdit-swap-") as folder:
        path = model or write_mmdit(Path(folder) / "small.safetensors", small_config("sd3.5-large", depth))
        patches = _lora(path, rank)
        held = sum(p.up.nbytes + p.down.nbytes for p in patches)
        print(f"{path.name}: a LoRA of rank {rank} on {len(patches)} weights, {held / 2**20:.1f} MiB")
        for tp in tps:
            for name, swaps in _changes(path, tp, patches, rounds).items():
                seconds, first = statistics.median(swap.seconds for swap in swaps), swaps[0]
                read = f"{first.bytes_read / 2**20:7.1f} MiB read of the file by rank 0"
                print(f"tp={tp} {name:10s} {seconds:7.3f} s, {first.weights} weights, {read}")


def _changes(path: Path, tp: int, patches: Sequence[LowRank], rounds: int) -> dict[str, list[Swap]]:
    backend = Backend(tp, "cpu", f"swap-{tp}")
    try:
        model = backend.load_model(path, MeshSpec(tp=tp), "float32")
        found: dict[str, list[Swap]] = {"on": [], "changed": [], "off": []}
        for _ in range(rounds):
            for name, strength in (("on", 0.8), ("changed", 0.6), ("off", 0.0)):
                on = WeightPatches([(patch, strength) for patch in patches]) if strength else None
                found[name].append(_sampled(model, on))
        return found
    finally:
        backend.stop()


def _sampled(model: RemoteModel, patches: WeightPatches | None) -> Swap:
    latent, prompt = torch.zeros(1, 16, 16, 16), Conditioning(*random_prompt(1, 77))
    model.sample(latent, prompt, seed=1, steps=1, cfg_scale=1.0, patches=patches)
    assert model.last is not None
    return model.last.swap


def _lora(path: Path, rank: int) -> list[LowRank]:
    shapes = {name: entry["shape"] for name, entry in diffusion_entries(path).items()}
    chosen = [n for n, s in shapes.items() if len(s) == 2 and any(part in n for part in _PATCHED)]
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.01).half()

    return [LowRank(name, noise(shapes[name][0], rank), noise(rank, shapes[name][1])) for name in chosen]
