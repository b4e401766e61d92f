"""InstantX's IP-Adapter for SD3.5, as its node hangs it: an object in the place of each joint block, a function around the network.

The function makes the image prompt's tokens at each timestep, and remains the one that does. What each block's adapter makes of
these is done in the ranks: it is compared with the adapter's own result once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...parallel_backend.errors import UnsupportedError
from ...parallel_backend.rpc.extras import AnyExtra, JointImagePrompt
from .asking import with_others
from .kept_extras import kept_extras
from .pack_version import pack_and_version
from .patches import Call, Kind, Patch, closed_over, origin, patches_in
from .refusal import LOCALLY, MISFITS

_PARTS = ("norm_ip", "to_k_ip", "to_v_ip", "norm_q", "norm_k", "norm_ip_k")
_OPTIONS = {"hidden_states", "t_emb", "weight"}
_AROUND, _CLOSED_OVER = "nodes:patch.<locals>.ddit_wrapper", {"clip_embeds", "ip_options", "resampler"}
_EPS = 1e-6
_OTHER = f"Use another version of that pack, or {LOCALLY}."


def _knows(patch: Patch) -> bool:
    wrapper = patch.function
    return (
        patch.kind == "dit"
        and origin(wrapper) == "jointblock:JointBlockIPWrapper"
        and set(getattr(wrapper, "ip_options", ())) == _OPTIONS
        and all(hasattr(wrapper.adapter, part) for part in _PARTS)
    )


def is_around(function: Any, options: Mapping[str, Any]) -> bool:
    """Whether a MODEL's function around its network is that of such patches in its transformer options."""
    if not isinstance(function, FunctionType) or origin(function) != _AROUND:
        return False
    made_with = closed_over(function)
    theirs = [patch.function.ip_options for patch in patches_in(options) if _knows(patch)]
    return made_with.keys() >= _CLOSED_OVER and any(own is made_with["ip_options"] for own in theirs)


@torch.inference_mode()
def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    """Of an evaluation, for whose timestep the node's function has made the tokens just before; or of all in a schedule.

    Raises: UnsupportedError: two adapters, one for other models, or a version that does something else.
    """
    options = patches[0].function.ip_options
    if any(patch.function.ip_options is not options for patch in patches):
        raise UnsupportedError(
            "A parallel MODEL can't honour two SD3 IP-Adapters, each on some of the blocks.", f"Use one, or {LOCALLY}."
        )
    made = list(_made_at(options, call))
    if not made:
        return
    adapters = [_adapter(patch, call, *made[0][1:]) for patch in patches]
    modulations = [_modulation([patch.function.adapter for patch in patches], t_emb) for _, _, t_emb in made]
    yield JointImagePrompt(
        blocks=[block for adapter in adapters for block in adapter.blocks],
        norms=[norms for adapter in adapters for norms in adapter.norms],
        matrices=[matrices for adapter in adapters for matrices in adapter.matrices],
        tokens=_by_branch([hidden for _, hidden, _ in made], call),
        modulation=_by_branch(modulations, call),
        sigmas=[sigma for sigma, *_ in made if sigma is not None],
        weight=float(options["weight"]),
    )


def _made_at(options: Mapping[str, Any], call: Call) -> Iterator[tuple[float | None, Tensor, Tensor]]:
    """Where it acts: sigma, the image prompt's tokens (rows, T, E) and the timestep's embedding (rows, A)."""
    if call.schedule is None:
        if options["hidden_states"] is not None:
            yield None, options["hidden_states"], options["t_emb"]
        return
    device, layout = closed_over(call.schedule.around)["clip_embeds"].device, call.layout
    for sigma in call.schedule.sigmas:
        timesteps = torch.full((len(layout),), sigma, device=device)
        given = {"input": timesteps[:, None], "timestep": timesteps, "cond_or_uncond": list(layout), "c": {}}
        try:
            call.schedule.around(lambda *_, **__: None, given)
        except MISFITS as error:
            what = f"{type(error).__name__}: {str(error)[:200]}"
            told = pack_and_version(call.schedule.around)
            raise UnsupportedError(f"The image prompt of {told} can't be computed: {what}.", _OTHER) from error
        if options["hidden_states"] is not None:
            yield sigma, options["hidden_states"], options["t_emb"]


def _modulation(adapters: Sequence[Any], t_emb: Tensor) -> Tensor:
    """(rows, blocks, 2, E), shift and scale."""
    norms = [adapter.norm_ip for adapter in adapters]
    return torch.stack([norm.linear(norm.silu(t_emb)).unflatten(1, (2, -1)) for norm in norms], dim=1)


def _by_branch(made: Sequence[Tensor], call: Call) -> dict[int, Tensor]:
    """(sigmas, rows, ...) of each branch, one row where a batch's are alike."""
    parts = torch.stack(list(made)).to(call.dtype).cpu().chunk(len(call.layout), dim=1)
    alike = [part[:, :1] if torch.equal(part, part[:, :1].expand_as(part)) else part for part in parts]
    return {branch: part.contiguous() for branch, part in zip(call.layout, alike, strict=True)}


def _adapter(patch: Patch, call: Call, hidden: Tensor, t_emb: Tensor) -> JointImagePrompt[Tensor]:
    """What of one block doesn't change from step to step, the same objects for the same adapter.

    Raises: UnsupportedError: as `_check` says.
    """
    adapter, place = patch.function.adapter, patch.place
    assert place is not None

    def make() -> list[JointImagePrompt[Tensor]]:
        _check(patch, hidden, t_emb)
        norms = [norm.weight for norm in (adapter.norm_q, adapter.norm_k, adapter.norm_ip_k)]
        both = _joined([adapter.to_k_ip.weight, adapter.to_v_ip.weight], call)
        return [
            JointImagePrompt(blocks=[place[1]], norms=[_joined(norms, call)], matrices=[both], tokens={}, modulation={})
        ]

    (made,) = kept_extras([Patch(patch.kind, place, adapter)], call, (place, call.dtype), make)
    return made


def _joined(weights: Sequence[Tensor], call: Call) -> Tensor:
    """In a tensor of which torch tells whether something was written into it."""
    with torch.inference_mode(False):
        joined = torch.empty(len(weights), *weights[0].shape, dtype=call.dtype)
    for own, weight in zip(joined, weights, strict=True):
        own.copy_(weight)
    return joined


def _check(patch: Patch, hidden: Tensor, t_emb: Tensor) -> None:
    """Its forward is run with one random image token; what it would attend with is noted.

    Raises: UnsupportedError: it is for another width, or attends with something else than the ranks will.
    """
    adapter, attention = patch.function.adapter, patch.function.original_block.x_block.attn
    heads, width, own = attention.num_heads, adapter.to_k_ip.weight.shape[0], attention.qkv.weight.shape[1]
    told = pack_and_version(type(adapter))
    if width != own:
        raise UnsupportedError(
            f"An image prompt ({told}) for blocks {width} wide came to a model whose blocks are {own} wide.",
            "Choose an adapter for this model: InstantX's is for SD3.5-Large.",
        )
    generator = torch.Generator().manual_seed(0)
    token = torch.randn(len(hidden), 1, width, generator=generator).to(hidden)
    try:
        noted = _noted(adapter, hidden, token, t_emb, heads)
        wanted = _as_ranks_will(adapter, hidden, token, t_emb, heads)
        as_known = len(noted) == 3 and all(
            torch.allclose(tensor, expected, rtol=1e-2, atol=1e-3)
            for tensor, expected in zip(noted, wanted, strict=True)
        )
    except MISFITS as error:
        what = f"{type(error).__name__}: {str(error)[:200]}"
        raise UnsupportedError(f"The image prompt of {told} can't be computed: {what}.", _OTHER) from error
    if not as_known:
        raise UnsupportedError(
            f"A parallel MODEL can't honour the image prompt of {told}: it attends otherwise than is known.", _OTHER
        )


def _noted(adapter: Any, hidden: Tensor, token: Tensor, t_emb: Tensor, heads: int) -> list[Tensor]:
    """Queries, keys and values (rows, heads, tokens, H) with which the adapter's own code attends."""
    noted: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        noted.extend((q, k, v))
        return q

    asked = with_others(type(adapter).forward, {"F": SimpleNamespace(scaled_dot_product_attention=attend)})
    asked(adapter, hidden, token, token, token.unflatten(-1, (heads, -1)), t_emb, heads)
    return noted


def _as_ranks_will(adapter: Any, hidden: Tensor, token: Tensor, t_emb: Tensor, heads: int) -> list[Tensor]:
    """The same by `parallel_backend/extras/joint_image_prompt.py`'s arithmetic."""
    shift, scale = _modulation([adapter], t_emb)[:, 0, :, None].unbind(1)
    taken = F.layer_norm(hidden, hidden.shape[-1:], eps=_EPS) * (1 + scale) + shift
    of_prompt = [taken @ layer.weight.mT for layer in (adapter.to_k_ip, adapter.to_v_ip)]
    image, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (token, *of_prompt))

    def normed(x: Tensor, norm: Any) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], norm.weight.to(x), _EPS)

    keys = torch.cat([normed(image, adapter.norm_k), normed(k, adapter.norm_ip_k)], dim=2)
    return [normed(image, adapter.norm_q), keys, torch.cat([image, v], dim=2)]


KIND = Kind(_knows, _extras)
