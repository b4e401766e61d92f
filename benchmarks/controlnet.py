#!/usr/bin/env python3
"""An SDXL UNet with a ControlNet on two ranks: computed by them in its bands, or left in one process: seconds of an evaluation.

    python benchmarks/controlnet.py --side 512 --rounds 7

Random weights in fp32, guidance (two rows): SDXL's layout, 157 million parameters, and a ControlNet of its encoder. Left in one process, it
is computed there with both cores while the ranks wait, and its residuals go to them through memory, as with any ControlNet that ranks don't
know.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from interleaved import interleaved, machine, ratio
from torch import Tensor

from parallel_backend import Backend, Conditioning, ControlUse, MeshSpec, RemoteModel
from parallel_backend.distributed.mesh import build_mesh
from parallel_backend.distributed.stale import EXACT
from parallel_backend.small_checkpoints.prompts import random_sdxl_prompt
from parallel_backend.small_checkpoints.unet import small_unet_config, write_unet
from parallel_backend.small_checkpoints.unet_control import control_config, write_unet_control

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from local_network import local_control, local_network

MESHES = {"cfg=2": MeshSpec(cfg=2), "patch=2": MeshSpec(patch=2)}


class Alone:
    """Both in this process, and what the ranks are asked with."""

    def __init__(self, unet: Path, control: Path, side: int) -> None:
        mesh = build_mesh(MeshSpec())
        self.network = local_network(unet, mesh)
        self.control = local_control(control, self.network, mesh)
        self.hint = torch.rand(1, 3, 8 * side, 8 * side)
        self.prepared = self.control.prepare(self.hint)
        prompts = [Conditioning(*random_sdxl_prompt(seed)) for seed in (1, 2)]
        x, timesteps = torch.randn(2, 4, side, side), torch.full((2,), 500.0)
        self.given = (x, timesteps, *(torch.cat([getattr(p, name) for p in prompts]) for name in ("context", "pooled")))
        self.prompt, self.control_prompt = (
            self.network.prepare(*self.given[2:]),
            self.control.prepare_prompt(*self.given[2:]),
        )

    def residuals(self) -> Any:
        return self.control(*self.given[:2], self.control_prompt, self.prepared, EXACT, ())

    def evaluated(self, with_control: bool) -> Tensor:
        added = [self.residuals()] if with_control else []
        return self.network(*self.given[:2], self.prompt, EXACT, *added)


def timed(call: Callable[[], object], threads: int) -> Callable[[], float]:
    @torch.inference_mode()
    def case() -> float:
        torch.set_num_threads(threads)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return case


def left_here(alone: Alone, model: RemoteModel) -> Callable[[], object]:
    def evaluate() -> Tensor:
        residuals = alone.residuals()
        return model.forward(*alone.given, residuals={"middle": [residuals.middle], "output": residuals.output})

    return evaluate


def sent_a_step(model: RemoteModel, alone: Alone, controls: list[ControlUse]) -> float:
    """MiB that a rank sends the others in a step of a sampling."""
    x, _, context, pooled = alone.given
    prompts = [Conditioning(context[i : i + 1], pooled[i : i + 1]) for i in range(2)]
    model.sample(torch.zeros_like(x[:1]), *prompts, steps=2, seed=1, controls=controls)
    assert model.last is not None
    return sum(cost.sent_bytes for cost in model.last.costs) / model.last.steps / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = small_unet_config((160, 320, 640), (0, 1, 2))
        unet = write_unet(Path(folder) / "unet.safetensors", config)
        control = write_unet_control(Path(folder) / "control.safetensors", control_config(config), "single file")
        alone, backend = Alone(unet, control, args.side // 8), Backend(2, "cpu", "benchmark")
        cases = {
            "one thread": timed(lambda: alone.evaluated(False), 1),
            "one thread, ControlNet": timed(lambda: alone.evaluated(True), 1),
        }
        sent = {}
        try:
            for name, mesh in MESHES.items():
                model = backend.load_model(unet, mesh, "float32")
                use = ControlUse(backend.load_control(control, model), alone.hint)
                ask = model.forward
                cases[f"{name}"] = timed(lambda ask=ask: ask(*alone.given), 1)
                cases[f"{name}, ControlNet in the ranks"] = timed(
                    lambda ask=ask, use=use: ask(*alone.given, controls=[use]), 1
                )
                cases[f"{name}, ControlNet left in one process"] = timed(left_here(alone, model), 2)
                sent[name] = sent_a_step(model, alone, []), sent_a_step(model, alone, [use])
            times = interleaved(cases, args.rounds, f"{args.side} pixels")
        finally:
            backend.stop()
        residuals = sum(tensor.nbytes for tensor in alone.residuals().tensors()) / 2**20
    print(f"{machine()}\n{args.side} x {args.side} pixels, guidance on; medians of {args.rounds} rounds\n")
    print("| | s an evaluation | times faster than one thread with the same |\n|---|---|---|")
    for name, seconds in times.items():
        base = times["one thread, ControlNet" if "ControlNet" in name else "one thread"]
        print(f"| {name} | {statistics.median(seconds):.3f} | {ratio(base, seconds):.2f} |")
    for name, (without, with_control) in sent.items():
        print(f"\n{name}: {without:.1f} MiB a step from a rank to the other, with a ControlNet {with_control:.1f}.")
    print(f"\nLeft in one process, {residuals:.1f} MiB of residuals an evaluation go to the ranks (fp32).")


if __name__ == "__main__":
    main()
