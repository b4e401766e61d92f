#!/usr/bin/env python3
"""What a request costs beyond the computing: the client's time less rank 0's own, on two CPU ranks.

python benchmarks/wire.py --rounds 200
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import zmq
from interleaved import interleaved, machine

from parallel_backend import Backend, Conditioning, MeshSpec, RemoteModel
from parallel_backend.small_checkpoints.mmdit import small_config, write_mmdit
from parallel_backend.small_checkpoints.prompts import random_prompt

LATENT = torch.zeros(1, 16, 128, 128)  # 1 MB
SMALL = torch.randn(1, 16, 16, 16)
GUIDED = torch.randn(2, 16, 128, 128)  # cond and uncond of 1024 pixels, 2 MB
TOKENS = 336  # 5.5 MB of context


def beyond(model: RemoteModel, call: Callable[[], object]) -> Callable[[], float]:
    def case() -> float:
        start = time.perf_counter()
        call()
        passed = time.perf_counter() - start
        assert model.last is not None
        return passed - model.last.seconds

    return case


def echo(folder: str) -> Callable[[], float]:
    """What the socket alone takes, between two threads of this process."""
    address = f"ipc://{folder}/echo"
    context = zmq.Context()
    ours = context.socket(zmq.PAIR)
    ours.bind(address)
    back = LATENT.numpy()

    def serve() -> None:
        theirs = context.socket(zmq.PAIR)
        theirs.connect(address)
        while True:
            theirs.recv_multipart(copy=False)
            theirs.send(back, copy=False)

    threading.Thread(target=serve, daemon=True).start()
    frames = [LATENT.numpy(), random_prompt(1, TOKENS)[0].numpy()]

    def case() -> float:
        start = time.perf_counter()
        ours.send_multipart(frames, copy=False)
        ours.recv(copy=False)
        return time.perf_counter() - start

    return case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = small_config("sd3-medium", depth=1, heads=1, pos_embed_size=64)
        backend = Backend(2, "cpu", "benchmark")
        try:
            path = write_mmdit(Path(folder) / "mmdit.safetensors", config)
            model = backend.load_model(path, MeshSpec(cfg=2), "float32")
            context, pooled = random_prompt(1, TOKENS)
            brief = Conditioning(*random_prompt(2, 77))
            two = (brief.context.repeat(2, 2, 1), brief.pooled.repeat(2, 1))
            fresh = iter(range(10**9))

            def with_new_prompt() -> object:
                context[0, 0, 0] = float(next(fresh))
                return model.sample(LATENT, Conditioning(context, pooled), steps=1, cfg_scale=1.0)

            def one_call() -> object:
                return model.forward(SMALL, torch.ones(1), brief.context, brief.pooled)

            cases = {
                "the floor: the same bytes to an echo on a plain ZeroMQ socket, and 1 MB back": echo(folder),
                "Sample, 1 MB latent, 5.5 MB of new conditioning": beyond(model, with_new_prompt),
                "Sample, 1 MB latent, conditioning the backend has": beyond(
                    model, lambda: model.sample(LATENT, brief, steps=1, cfg_scale=1.0)
                ),
                "Forward, one model call of a stock sampler": beyond(model, one_call),
                "Forward of 1024 pixels with guidance, 2 MB latent": beyond(
                    model, lambda: model.forward(GUIDED, torch.ones(2), *two)
                ),
            }
            times = interleaved(cases, args.rounds, "wire")
        finally:
            backend.stop()
    print(f"{machine()}\nmilliseconds beyond rank 0's own time, {args.rounds} rounds\n")
    print("| | median | 90 % are below |\n|---|---|---|")
    for name, seconds in times.items():
        ms = sorted(1000 * s for s in seconds)
        print(f"| {name} | {statistics.median(ms):.2f} | {ms[int(0.9 * len(ms))]:.2f} |")


if __name__ == "__main__":
    main()
