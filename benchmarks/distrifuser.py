#!/usr/bin/env python3
"""Our banded UNet beside the public DistriFusion, on the same two ranks and weights: seconds of an evaluation.

    python benchmarks/distrifuser.py --clone ~/distrifuser --side 512 --rounds 5

The clone is of github.com/mit-han-lab/distrifuser. It asks for CUDA and an old diffusers, so this script gives it the
import paths and the settings object that it looks for; its layers run as they are. One picture and its uncond, as one
batch of two; SDXL's layout, 157 million parameters, random weights, fp32, one thread a rank.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from interleaved import interleaved, machine, print_table, ratio, timed_together
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from local_network import local_network
from rank_pool import RankPool, groups

from parallel_backend.config import AXES, MeshSpec
from parallel_backend.distributed.mesh import Mesh, MeshAxis, build_mesh
from parallel_backend.distributed.stale import Kept, Step
from parallel_backend.small_checkpoints.prompts import random_sdxl_prompt
from parallel_backend.small_checkpoints.unet import small_unet_config, write_unet

CONFIG = small_unet_config((160, 320, 640), (0, 1, 2))
CPU = torch.device("cpu")
Given = tuple[Tensor, Tensor, Tensor, Tensor]
OURS, THEIRS = "two ranks, patch=2, displaced", "two ranks, distrifuser, displaced"


def theirs(path: Path, clone: Path, given: Given) -> Callable[[], Tensor]:
    """DistriFusion's model in its default mode, past its warm-up."""
    import diffusers
    from diffusers.models import attention_processor
    from diffusers.models.unets import unet_2d_condition

    sys.path.insert(0, str(clone))
    sys.modules["diffusers.models.unet_2d_condition"] = unet_2d_condition
    diffusers.models.attention.Attention = attention_processor.Attention
    with_peft, diffusers.utils.USE_PEFT_BACKEND = diffusers.utils.USE_PEFT_BACKEND, True  # today's layers take no scale
    # The package's own __init__ imports its CUDA pipelines.
    package = types.ModuleType("distrifuser")
    package.__path__ = [str(clone / "distrifuser")]
    sys.modules["distrifuser"] = package
    from distrifuser.models.distri_sdxl_unet_pp import DistriUNetPP
    from distrifuser.utils import PatchParallelismCommManager

    diffusers.utils.USE_PEFT_BACKEND = with_peft
    config = types.SimpleNamespace(
        world_size=2,
        rank=dist.get_rank(),
        n_device_per_batch=2,
        do_classifier_free_guidance=False,
        split_batch=False,
        warmup_steps=1,
        comm_checkpoint=60,
        mode="corrected_async_gn",
        use_cuda_graph=False,
        batch_group=dist.group.WORLD,
        device=CPU,
        verbose=False,
        split_idx=dist.get_rank,
        batch_idx=lambda: 0,
    )
    unet = diffusers.UNet2DConditionModel(**CONFIG.diffusers())
    unet.load_state_dict(load_file(path))
    # Its forward takes micro-conditioning in no form; for timing, the embedding's small product may be left out.
    unet.class_embedding, unet.config["class_embed_type"] = None, None
    model = DistriUNetPP(unet.requires_grad_(False).eval(), config)
    manager = PatchParallelismCommManager(config)
    model.set_comm_manager(manager)
    x, timesteps, context, _ = given

    def evaluate() -> Tensor:
        return model(x, timesteps, context, return_dict=False)[0]

    model.set_counter(0)
    evaluate()
    manager.create_buffer()
    model.set_counter(0)
    for _ in range(3):
        evaluate()
    return evaluate


@torch.inference_mode()
def timed(path: Path, clone: Path | None, given: Given, rounds: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of an evaluation of each case in each round, as this rank sees them; the ranks take turns together."""
    network, kept = local_network(path, build_mesh(MeshSpec(patch=2), groups())), Kept()
    displaced = network.new_job(displaced=True)
    x, timesteps, context, pooled = given
    ours = x, timesteps, network.prepare(context, pooled)
    network(*ours, Step(0, "sync", kept=displaced))
    first = dist.get_rank() == 0
    single = local_network(path, Mesh(MeshSpec(), **{axis: MeshAxis(axis) for axis in AXES})) if first else None

    def alone(threads: int) -> None:
        if single is not None:
            torch.set_num_threads(threads)
            single(*ours, Step())
            torch.set_num_threads(1)

    cases: dict[str, Callable[[], object]] = {
        "one process, 1 thread": lambda: alone(1),
        "one process, 2 threads": lambda: alone(2),
        "two ranks, patch=2, sync": lambda: network(*ours, Step(kept=kept)),
        OURS: lambda: network(*ours, Step(1, "displaced", kept=displaced)),
    }
    if clone is not None:
        cases[THEIRS] = theirs(path, clone, given)

    bound = {name: partial(timed_together, evaluate, repeats) for name, evaluate in cases.items()}
    return interleaved(bound, rounds, "UNet" if first else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clone", type=Path, help="of distrifuser; without it, ours alone is timed")
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--times", type=int, default=3, help="evaluations in each turn")
    args = parser.parse_args()
    context, y = random_sdxl_prompt(1)
    x = torch.randn(2, 4, args.side // 8, args.side // 8, generator=torch.Generator().manual_seed(0))
    given = (x, torch.tensor([500.0, 500.0]), context.repeat(2, 1, 1), y.repeat(2, 1))
    pool = RankPool()
    with tempfile.TemporaryDirectory() as folder:
        path = write_unet(Path(folder) / "unet.safetensors", CONFIG)
        clone = args.clone.expanduser() if args.clone else None
        times = pool(2, timed, path, clone, given, args.rounds, args.times)[0]
    pool.close()
    print(f"{machine()}\n{args.side} x {args.side} pixels, a batch of 2; medians of {args.rounds} rounds\n")
    print_table(times, "evaluation")
    if args.clone:
        print(f"\nours displaced is {ratio(times[THEIRS], times[OURS]):.2f} times as fast as distrifuser's")


if __name__ == "__main__":
    main()
