"""InstantX's IP-Adapter for SD3.5, as its node hangs it: an object in the place of each joint block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...parallel_backend.errors import UnsupportedError
from ...parallel_backend.rpc.extras import AnyExtra, JointImagePrompt
from .pack_version import pack_and_version
from .patches import Call, Kind, Patch, origin
from .refusal import LOCALLY, MISFITS

_PARTS = ("norm_ip", "to_k_ip", "to_v_ip", "norm_q", "norm_k", "norm_ip_k")
_OPTIONS = {"hidden_states", "t_emb", "weight"}
_EPS = 1e-6


def _knows(patch: Patch) -> bool:
    wrapper = patch.function
    return (
        patch.kind == "dit"
        and origin(wrapper) == "jointblock:JointBlockIPWrapper"
        and set(getattr(wrapper, "ip_options", ())) == _OPTIONS
        and all(hasattr(wrapper.adapter, part) for part in _PARTS)
    )


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    """At this evaluation: the node's own function has computed the image's tokens for its timestep just before."""
    acting = [patch for patch in patches if patch.function.ip_options["hidden_states"] is not None]
    if not acting:
        return
    assert all(patch.place is not None for patch in acting)
    options = acting[0].function.ip_options
    if any(patch.function.ip_options is not options for patch in acting):
        raise UnsupportedError(
            "A parallel MODEL can't honour two SD3 IP-Adapters, each on some of the blocks.", f"Use one, or {LOCALLY}."
        )
    asked = [_ask(patch, call) for patch in acting]
    # (rows, blocks, T, 2, N, H)
    kv = torch.stack([torch.stack([k, v], dim=2) for k, v, _ in asked], dim=1)
    of_branches = dict(zip(call.branches, kv.chunk(len(call.branches)), strict=True))
    yield JointImagePrompt(
        blocks=[patch.place[1] for patch in acting if patch.place is not None],
        norms=torch.stack([norms for _, _, norms in asked]),
        keys_values=of_branches,
        weight=float(options["weight"]),
    )


def _ask(patch: Patch, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (rows, T, N, H) of a block's adapter, and the weights (2, H) of its norms of the image's queries and keys.

    The adapter's own forward tells them, run with one random image token; what it would attend with is noted.
    Raises: UnsupportedError: it treats that token otherwise than is known.
    """
    adapter, options = patch.function.adapter, patch.function.ip_options
    attention = patch.function.original_block.x_block.attn
    heads = attention.num_heads
    hidden, rows = options["hidden_states"], options["hidden_states"].shape[0]
    width, own = adapter.to_k_ip.weight.shape[0], attention.qkv.weight.shape[1]
    if width != own:
        raise UnsupportedError(
            f"An image prompt ({pack_and_version(type(adapter))}) for blocks {width} wide came to a model whose blocks are {own} wide.",
            "Choose an adapter for this model: InstantX's is for SD3.5-Large.",
        )
    generator = torch.Generator().manual_seed(0)
    token = torch.randn(rows, 1, width, generator=generator).to(hidden)
    noted: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        noted.extend((q, k, v))
        return q

    forward = type(adapter).forward
    known = {**forward.__globals__, "F": SimpleNamespace(scaled_dot_product_attention=attend)}
    asking = FunctionType(forward.__code__, known, forward.__name__, forward.__defaults__, forward.__closure__)
    try:
        asking(adapter, hidden, token, token, token.unflatten(-1, (heads, -1)), options["t_emb"], heads)
    except MISFITS as error:
        raise UnsupportedError(
            f"The image prompt of {pack_and_version(type(adapter))} can't be computed: {type(error).__name__}: {str(error)[:200]}.",
            f"Use another version of that pack, or {LOCALLY}.",
        ) from error
    norms = [norm.weight.detach().to(hidden) for norm in (adapter.norm_q, adapter.norm_k)]
    image = token.unflatten(-1, (heads, -1)).transpose(1, 2)
    wanted = [F.rms_norm(image, image.shape[-1:], norm, _EPS) for norm in norms] + [image]
    as_known = len(noted) == 3 and all(
        torch.allclose(tensor[:, :, :1], expected, rtol=1e-2, atol=1e-3)
        for tensor, expected in zip(noted, wanted, strict=True)
    )
    if not as_known:
        raise UnsupportedError(
            f"A parallel MODEL can't honour the image prompt of {pack_and_version(type(adapter))}: it attends otherwise than is known.",
            f"Use another version of that pack, or {LOCALLY}.",
        )
    k, v = (tensor[:, :, 1:].transpose(1, 2) for tensor in noted[1:])
    return k, v, torch.stack(norms)


KIND = Kind(_knows, _extras)
