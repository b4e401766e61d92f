"""Attentions of a band: its own queries, the whole image's keys and values.

Shapes: B batch, C channels, Y rows of the band, X columns, L tokens, D width, E context width, N heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ..fused.joint_heads import join_heads, part_heads
from .band import Band
from .collectives import all_gather, start_all_gather
from .graph_breaks import breaks_graph
from .kernels import attend
from .sites import At, Place, around
from .ulysses import heads_to_tokens, tokens_to_heads


class BandImageAttention(nn.Module):
    """A VAE's single-head attention over the image: a band's queries, the whole image's keys and values.

    Comm: one all-gather of keys and values, 2 * B * L * C elements of each band.
    """

    def __init__(self, attention: Attention, band: Band) -> None:
        super().__init__()
        assert attention.heads == 1 and attention.residual_connection and attention.spatial_norm is None
        self.inner: Attention = attention
        self.band: Band = band

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        inner, (B, C, Y, X) = self.inner, hidden_states.shape
        normed = inner.group_norm(hidden_states)
        tokens_BLC = normed.flatten(2).transpose(1, 2)
        kv = torch.stack([inner.to_k(tokens_BLC), inner.to_v(tokens_BLC)])
        kv = all_gather(kv, 2, [rows * X for rows in self.band.rows_like(hidden_states)], self.band.axis)
        # One head of its own axis: torch's fused kernels take nothing else, and its plain one makes the whole L x L table.
        q_B1LC, k_B1LC, v_B1LC = (x.unsqueeze(1) for x in (inner.to_q(tokens_BLC), *kv))
        out = F.scaled_dot_product_attention(q_B1LC, k_B1LC, v_B1LC).squeeze(1)
        out = inner.to_out[0](out).transpose(1, 2).reshape(B, C, Y, X)
        return (out + hidden_states) / inner.rescale_output_factor


class BandSelfAttention:
    """Processor of a UNet's self-attention: a band's queries, the whole image's keys and values.

    The attention has one product for queries, keys and values, `to_qkv`. On three bands or more, where there is a head for each
    rank, tokens are exchanged for heads, and back: 4 / R of the D elements of each token travel in place of 2.
    Comm: with R ranks, 4 * (R - 1) / R * B * L * D elements in two exchanges, or keys and values to every rank in one,
        2 * (R - 1) * B * L * D; the latter in jobs with displaced steps, in which they arrive late.
    """

    def __init__(self, band: Band, kernel: str, slot: str) -> None:
        self.band, self.kernel, self.slot = band, kernel, slot
        self.place: Place | None = None  # which a UNet's have

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        if self.band.sites is not None and self.place is not None:
            return self._with_extras(attn, hidden_states, self.place)
        return attn.to_out[0](self._attended(attn.heads, attn.to_qkv(hidden_states)))

    @breaks_graph
    def _with_extras(self, attn: Any, hidden_states: Tensor, place: Place) -> Tensor:
        sites, at = self.band.sites, At(place, self.band, self.kernel, attn.heads)
        assert sites is not None
        attended = around(sites.self_attended.get(place, ()), partial(self._attended, attn.heads), at)
        project = around(sites.self_projected.get(place, ()), attn.to_qkv, at)
        layer = around(sites.self_layer.get(place, ()), lambda x: attn.to_out[0](attended(project(x))), at)
        return layer(hidden_states)

    def _attended(self, heads: int, qkv_BLD: Tensor) -> Tensor:
        if self.band.axis.degree == 1:
            return attend_heads(self.kernel, heads, *qkv_BLD.chunk(3, dim=-1))
        return self._over_bands(qkv_BLD, heads)

    @breaks_graph
    def _over_bands(self, qkv_BLD: Tensor, heads: int) -> Tensor:
        band = self.band
        tokens = band.tokens_like(qkv_BLD)
        if band.step.stale is None and 2 < band.axis.degree <= heads:
            return self._by_heads(qkv_BLD, heads, tokens)
        q, kv = qkv_BLD.tensor_split([qkv_BLD.shape[-1] // 3], dim=-1)
        return attend_heads(self.kernel, heads, q, *self._whole(kv, tokens).chunk(2, dim=-1))

    def _by_heads(self, qkv_BLD: Tensor, heads: int, tokens: Sequence[int]) -> Tensor:
        axis, (B, _, D) = self.band.axis, qkv_BLD.shape
        head_dim, (stream, none) = D // (3 * heads), (x.chunk(3, dim=-1) for x in (qkv_BLD, qkv_BLD[:, :0]))
        no_norms = (None, None)
        sent = join_heads(stream, none, no_norms, no_norms, heads=heads, parts=axis.degree, eps=None)
        q, k, v = tokens_to_heads(sent, tokens, B, heads, head_dim, axis).permute(2, 1, 0, 3, 4).unbind(0)
        out = heads_to_tokens(attend(self.kernel, q, k, v), tokens, heads, axis)
        return part_heads(out, B, 0, heads, head_dim, axis.degree)[1]

    def _whole(self, kv_BLD: Tensor, tokens: Sequence[int]) -> Tensor:
        """Keys and values of the whole image; the order of bands doesn't matter to attention."""
        band, stale = self.band, self.band.step.stale
        if stale is not None:
            return stale.joined(self.slot, kv_BLD, 1, tokens, band.step.phase)
        B, L, D = kv_BLD.shape
        longest = max(tokens)
        # Tokens outermost: equal bands then lie one after the other as they come.
        sent_LBD = kv_BLD.new_empty(longest, B, D)
        sent_LBD[:L].copy_(kv_BLD.transpose(0, 1))
        whole = start_all_gather(sent_LBD, band.axis).wait()
        if any(count != longest for count in tokens):
            whole = torch.cat([whole[i * longest : i * longest + count] for i, count in enumerate(tokens)])
        return whole.transpose(0, 1)


class CachedCrossAttention:
    """Processor of a UNet's attention to the prompt, whose keys and values are there before an evaluation.

    The attention has one product for keys and values, `to_kv`, which makes them.
    """

    def __init__(self, band: Band, kernel: str, slot: str) -> None:
        self.band, self.kernel, self.slot = band, kernel, slot
        self.place: Place | None = None

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        if self.band.sites is not None and self.place is not None:
            return self._with_extras(attn, hidden_states, self.place)
        return attn.to_out[0](self._attended(attn.heads, attn.to_q(hidden_states)))

    @breaks_graph
    def _with_extras(self, attn: Any, hidden_states: Tensor, place: Place) -> Tensor:
        sites, at = self.band.sites, At(place, self.band, self.kernel, attn.heads, attn.to_kv, self.slot)
        assert sites is not None
        attended = around(sites.cross_attended.get(place, ()), partial(self._attended, attn.heads), at)
        layer = around(sites.cross_layer.get(place, ()), lambda x: attn.to_out[0](attended(attn.to_q(x))), at)
        return layer(hidden_states)

    def _attended(self, heads: int, q_BLD: Tensor) -> Tensor:
        k, v = self._keys_values().chunk(2, dim=-1)
        return attend_heads(self.kernel, heads, q_BLD, k, v)

    @breaks_graph
    def _keys_values(self) -> Tensor:
        return self.band.prompt_kv[self.slot]


def attend_heads(kernel: str, heads: int, q_BLD: Tensor, k_BLD: Tensor, v_BLD: Tensor) -> Tensor:
    """(B, L, D): queries' share of the values, head by head; keys and values may be of other tokens."""
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q_BLD, k_BLD, v_BLD))
    return attend(kernel, q, k, v).flatten(2)
