"""The dtype `auto`: what ComfyUI computes in on the same cards, of which the weakest decides."""

from __future__ import annotations

from collections.abc import Sequence

from ..rpc.state import RankState

# Turing without tensor cores: fp16 gives wrong numbers there. Source: ComfyUI, model_management.should_use_fp16.
_BROKEN_FP16 = ("1660", "1650", "1630", "T500", "T550", "T600", "MX550", "MX450", "CMP 30HX", "T2000", "T1000", "T1200")


def model_dtype(ranks: Sequence[RankState], *, from_scratch: bool = False) -> str:
    """What a diffusion model is held and computed in.

    float16 for SD3 and SDXL, whose files and ranges it suits; bfloat16 for models from scratch, of which that isn't known.
    ComfyUI keeps weights in half on cards that compute in float32; ranks hold what they compute in.
    """
    if from_scratch:
        return "bfloat16" if _all_bfloat16(ranks) else "float32"
    return "float16" if all(map(_float16, ranks)) else "float32"


def vae_dtype(ranks: Sequence[RankState]) -> str:
    """What a VAE is held and computed in: half precision only with bfloat16's range."""
    return "bfloat16" if _all_bfloat16(ranks) else "float32"


def _float16(rank: RankState) -> bool:
    return rank.capability >= (7, 0) and not (
        rank.capability < (8, 0) and any(name in rank.device_name for name in _BROKEN_FP16)
    )


def _all_bfloat16(ranks: Sequence[RankState]) -> bool:
    return all(rank.capability >= (8, 0) and rank.bfloat16 for rank in ranks)
