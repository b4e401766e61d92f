#!/usr/bin/env python3
"""Our MMDiT beside the public xDiT, on the same two ranks and weights: seconds of a step's model call, with guidance.

    pip install --no-deps --target DIR xfuser==0.7.0
    pip install --no-deps --target DIR yunchang
    python benchmarks/xdit.py cfg --packages DIR --side 512 --rounds 5
    python benchmarks/xdit.py ulysses --packages DIR --side 512 --rounds 5

xfuser asks for an accelerator and triton, so this script gives it what it looks for; its layers, groups and processors
run as they are. SD3's layout, 12 blocks, hidden 768, 154 text tokens, random weights, fp32, one thread a rank. What is
timed is what its pipeline does in a step up to the guidance, and `Predictor.outputs` of ours.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from interleaved import interleaved, machine, print_table, ratio, timed_together
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from local_network import local_network
from rank_pool import RankPool, groups
from reference_models import diffusers_mmdit

from parallel_backend.config import AXES, MeshSpec
from parallel_backend.distributed.mesh import Mesh, MeshAxis, build_mesh
from parallel_backend.distributed.stale import EXACT
from parallel_backend.models.families import SD3
from parallel_backend.models.prediction import Predictor
from parallel_backend.models.rows import Prompt
from parallel_backend.small_checkpoints.mmdit import small_config, write_mmdit
from parallel_backend.small_checkpoints.prompts import random_prompt

CONFIG = small_config("sd3-medium", depth=12, heads=12, pos_embed_size=96)
CPU = torch.device("cpu")
TEXT = 154


def prepare_xfuser(packages: Path) -> None:
    """Makes it importable where there is no accelerator."""
    sys.path[:0] = [str(packages)]
    package = types.ModuleType("xfuser")  # its own __init__ imports every pipeline
    package.__path__ = [str(packages / "xfuser")]
    sys.modules["xfuser"] = package
    from xfuser import envs

    envs.get_device_version = lambda: None
    envs.get_torch_distributed_backend = lambda: "gloo"
    envs.PACKAGES_CHECKER.packages_info["has_long_ctx_attn"] = True
    mask: Any = types.ModuleType("xfuser.core.sparge_attention.block_mask")  # needs triton; not used here
    mask.get_block_map_meansim = None
    sys.modules[mask.__name__] = mask
    import xfuser.core.distributed
    import xfuser.core.fast_attention
    import xfuser.model_executor.models.transformers.transformer_sd3  # noqa: F401
    from yunchang.globals import PROCESS_GROUP

    for name in ("layers.usp", "core.sparge_attention.head_balance", "core.distributed.fp8_comms"):
        module: Any = sys.modules.get(f"xfuser.model_executor.{name}") or sys.modules.get(f"xfuser.{name}")
        if module is not None:
            module.PROCESS_GROUP = PROCESS_GROUP


def theirs(method: str, path: Path, x: Tensor, prompts: tuple[Prompt, Prompt]) -> Callable[[], Tensor]:
    """xDiT's step: both branches' outputs on every rank (cfg), or this rank's rows of both (ulysses)."""
    from xfuser.config import xFuserArgs
    from xfuser.core.distributed import (
        get_cfg_group,
        get_runtime_state,
        init_distributed_environment,
        initialize_runtime_state,
    )
    from xfuser.model_executor.models.transformers.transformer_sd3 import xFuserSD3Transformer2DWrapper

    rank = dist.get_rank()
    model = diffusers_mmdit(CONFIG, load_file(path))
    init_distributed_environment(world_size=2, rank=rank, backend="gloo")
    degrees: dict[str, Any] = {"use_cfg_parallel": True} if method == "cfg" else {"ulysses_degree": 2}
    engine, _ = xFuserArgs(model="none", attention_backend="SDPA", **degrees).create_config()
    engine.runtime_config.dtype = torch.float32
    pipeline = type("StableDiffusion3Pipeline", (), {"transformer": model, "vae_scale_factor": 8})()
    initialize_runtime_state(pipeline, engine)
    state = get_runtime_state()
    state.set_input_parameters(
        height=8 * x.shape[2],
        width=8 * x.shape[3],
        batch_size=1,
        num_inference_steps=1,
        split_text_embed_in_sp=True,
    )
    state.set_patched_mode(patch_mode=False)
    wrapped = xFuserSD3Transformer2DWrapper(model)
    context, pooled = (torch.cat([getattr(p, name) for p in prompts]) for name in ("context", "pooled"))
    if method == "cfg":
        given = x, context[rank : rank + 1], pooled[rank : rank + 1]
    else:
        own = torch.cat([x[:, :, a:b] for a, b in state.pp_patches_start_end_idx_global], dim=2)
        given = torch.cat([own, own]), context.chunk(2, dim=1)[rank], pooled

    def step() -> Tensor:
        hidden, text, vector = given
        times = torch.full((hidden.shape[0],), 500.0)
        out, _ = wrapped(
            hidden_states=hidden,
            timestep=times,
            encoder_hidden_states=text,
            pooled_projections=vector,
            return_dict=False,
        )[0]
        return torch.cat(get_cfg_group().all_gather(out, separate_tensors=True)) if method == "cfg" else out

    return step


@torch.inference_mode()
def timed(
    method: str, path: Path, packages: Path, x: Tensor, rounds: int, repeats: int
) -> tuple[dict[str, list[float]], float]:
    """Seconds of a step in each case and round, and how far theirs is from ours."""
    prepare_xfuser(packages)
    prompts = tuple(Prompt(*random_prompt(seed, TEXT)) for seed in (1, 2))
    mesh = build_mesh(MeshSpec(**{method: 2}), groups())  # type: ignore[arg-type]
    ours = Predictor(local_network(path, mesh), mesh, torch.float32, CPU, SD3)
    first = dist.get_rank() == 0
    alone_mesh = Mesh(MeshSpec(), **{axis: MeshAxis(axis) for axis in AXES})
    single = Predictor(local_network(path, alone_mesh), alone_mesh, torch.float32, CPU, SD3) if first else None
    step, timestep = theirs(method, path, x, prompts), torch.tensor(500.0)  # type: ignore[arg-type]

    share, single_share = ours.share(1, prompts), single.share(1, prompts) if single is not None else None

    def alone() -> None:
        if single is not None and single_share is not None:
            single.outputs(x, timestep, single_share, EXACT)

    out, expected = step(), torch.cat(ours.outputs(x, timestep, share, EXACT))
    if method == "ulysses":
        expected = expected.chunk(2, dim=2)[dist.get_rank()]
    difference = float((out - expected).abs().max() / expected.abs().max())
    cases: dict[str, Callable[[], object]] = {
        "one process, 1 thread": alone,
        f"two ranks, {method}=2": lambda: ours.outputs(x, timestep, share, EXACT),
        f"two ranks, xfuser, {method} 2": step,
    }

    bound = {name: partial(timed_together, evaluate, repeats) for name, evaluate in cases.items()}
    return interleaved(bound, rounds, method if first else ""), difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=("cfg", "ulysses"))
    parser.add_argument("--packages", type=Path, required=True, help="the folder that xfuser was installed into")
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--times", type=int, default=1, help="steps in each turn")
    args = parser.parse_args()
    x = torch.randn(1, 16, args.side // 8, args.side // 8, generator=torch.Generator().manual_seed(0))
    pool = RankPool()
    with tempfile.TemporaryDirectory() as folder:
        path = write_mmdit(Path(folder) / "mmdit.safetensors", CONFIG)
        times, difference = pool(2, timed, args.method, path, args.packages.expanduser(), x, args.rounds, args.times)[0]
    pool.close()
    _, ours, other = times.values()
    print(f"{machine()}\n{args.side} x {args.side} pixels, guidance on; medians of {args.rounds} rounds\n")
    print_table(times, "step")
    print(f"\nours is {ratio(other, ours):.2f} times as fast as xfuser's; theirs is within {difference:.0e} of ours")


if __name__ == "__main__":
    main()
