"""What of a card is taken beside weights: by contexts and communicators, and by a VAE's decode, whole and in bands."""

from __future__ import annotations

from functools import partial

import torch
import torch.multiprocessing as mp
from rank_pool import RankPool

from parallel_backend.small_checkpoints.kl_vae import write_kl_vae

from ..one_card import ANSWER_SECONDS, join_nccl, last_line, ranks_on_one_card
from ..options import Options
from ..rank_jobs import communicator_costs, decoding_cost
from ..report import NO_GPU, Report
from ..sizes import CELL, Sizes, dtype_name, sizes_of

RANKS = 2
MIB = 2**20


def run(report: Report, options: Options) -> None:
    sizes = sizes_of(options)
    nccl = _communicators(report, options)
    _decodes(report, options, sizes, nccl)


def _communicators(report: Report, options: Options) -> bool:
    """Whether NCCL takes two ranks on this card."""
    report.table(f"Memory of {RANKS} ranks on one card, before any weights", "what", "MiB each rank")
    if options.device != "cuda":
        report.row("communicators", NO_GPU)
        return False
    before = torch.cuda.mem_get_info()[0]
    pool = RankPool(partial(join_nccl, prove=False), mp.get_context("spawn"), ANSWER_SECONDS)
    try:
        pool(RANKS, _context)
        report.row("the CUDA context", (before - torch.cuda.mem_get_info()[0]) / MIB / RANKS)
        for name, taken in pool(RANKS, communicator_costs)[0]:
            report.row(name, taken / MIB / RANKS)
    except AssertionError as refused:
        report.row("communicators", f"NCCL refuses: {last_line(refused)}")
        return False
    finally:
        pool.close()
    return True


def _context() -> None:
    torch.ones(1, device="cuda:0") + 1
    torch.cuda.synchronize()


def _decodes(report: Report, options: Options, sizes: Sizes, nccl: bool) -> None:
    report.table(
        f"SD3's VAE decodes {sizes.vae_side} x {sizes.vae_side} pixels",
        "dtype",
        "bands",
        "MiB at the peak, each rank",
        "s",
    )
    path = write_kl_vae(options.scratch / "vae.safetensors", latent_channels=16, quant=False, width=sizes.vae_width)
    latent = torch.randn(1, 16, sizes.vae_side // CELL, sizes.vae_side // CELL)
    ranks = ranks_on_one_card(options.device, RANKS, try_nccl=nccl)
    for dtype in dict.fromkeys((*sizes.dtypes, torch.float32)):
        cost = partial(decoding_cost, options.device, path, latent, dtype_name(dtype))
        for world in (1, RANKS):
            costs = ranks.pool(world, cost)
            peak = " / ".join(f"{taken / MIB:.0f}" for taken, _ in costs) if options.device == "cuda" else NO_GPU
            report.row(dtype_name(dtype), world, peak, max(seconds for _, seconds in costs))
    report.note(f"bands talk over {ranks.over}; their seconds mean nothing on one card")
    ranks.pool.close()
