"""Regional prompts (attention couple) and NegPiP: what patches of attention to the prompt put in its place.

Their arithmetic of strengths and masks is not repeated here: each is called, in ComfyUI's process, with rows of known numbers, and
what it makes of these says which prompts it attends to and how much of each comes to each token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from comfy.model_management import get_torch_device
from torch import Tensor

from ...parallel_backend.errors import UnsupportedError
from ...parallel_backend.rpc.extras import AnyExtra, RegionalPrompts, SplitPrompt
from .cross_attentions import cross_attentions
from .image_prompt_patches import is_image_prompt
from .kept_extras import kept_extras
from .pack_version import pack_and_version
from .patches import Call, Kind, Patch, origin, patches_in
from .prompt_rows import PromptRow, plain_rows
from .refusal import LOCALLY, MISFITS

_NEGPIP = "unet_negpip:sdxl_attn2_negpip"
# Of cgem156-ComfyUI, ComfyUI-ppm and comfyui-prompt-control, in this order.
_INPUTS = (
    "node:AttentionCouple.attention_couple_simple.<locals>.attn2_patch",
    "unet_couple:unet_attn2_couple_wrapper.<locals>.attn2_patch",
    "attention_couple_ppm:AttentionCoupleHook.attn2_patch",
)
_OUTPUTS = (
    "node:AttentionCouple.attention_couple_simple.<locals>.attn2_output_patch",
    "unet_couple:unet_attn2_output_couple_wrapper.<locals>.attn2_output_patch",
    "attention_couple_ppm:AttentionCoupleHook.attn2_output_patch",
)
# What comfyui-prompt-control hangs in place of its methods, and what it tells other packs beside.
_PROXY, _TOLD_BESIDE = "attention_couple_ppm:Proxy", "pc_couple"
_UNCOND = 1


def _origin(function: Any) -> str:
    return origin(function.function) if origin(function) == _PROXY else origin(function)


def _knows(patch: Patch) -> bool:
    known = {"attn2_patch": (*_INPUTS, _NEGPIP), "attn2_output_patch": _OUTPUTS}
    return _origin(patch.function) in known.get(patch.kind, ())


def _is_told_beside(option: str, options: Any) -> bool:
    """Whether a transformer option only says again what known patches beside it hold."""
    hung = options.get("patches", {}).get("attn2_patch", ())
    return option == _TOLD_BESIDE and any(origin(function) == _PROXY for function in hung)


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    """For the same patches they are the same objects, whose tensors are sent once.

    Raises: UnsupportedError: as `_check_alone` says, of what hangs beside them now, and `_Asked.extras`.
    """
    _check_alone(patches, call)
    return kept_extras(patches, call, (call.shape[2:], call.layout), lambda: _translated(patches, call))


@torch.inference_mode()
def _translated(patches: Sequence[Patch], call: Call) -> list[AnyExtra]:
    return _Asked(patches, call.layout, call).extras()


def regional_patches(call: Call) -> list[Patch]:
    """Those among a call's."""
    return [patch for patch in patches_in(call.options) if _knows(patch)]


@torch.inference_mode()
def prompt_rows(call: Call) -> Sequence[PromptRow]:
    """The rows that what replaces an attention to the prompt is given: of cond one for each prompt that it attends to.

    Raises: UnsupportedError: as `_check_alone` says, or rows that aren't known.
    """
    patches = regional_patches(call)
    if not patches:
        return plain_rows(call)
    _check_alone(patches, call)
    return _Asked(patches, call.layout, call).rows()


def _check_alone(patches: Sequence[Patch], call: Call) -> None:
    """Raises: UnsupportedError: others at the same place, which would be given rows of several prompts; or an order that isn't known."""
    hung = [patch.function for patch in patches]
    others = [
        Patch(kind, None, function)
        for kind in ("attn2_patch", "attn2_output_patch")
        for function in call.options.get("patches", {}).get(kind, ())
        if function not in hung
    ]
    replaced = call.options.get("patches_replace", {}).get("attn2", {}).items()
    others += [Patch("attn2", place, function) for place, function in replaced if function is not None]
    # These are asked what they add to each of the prompts: see `prompt_rows`.
    others = [patch for patch in others if not is_image_prompt(patch)]
    names = [_origin(patch.function) for patch in patches if patch.kind == "attn2_patch"]
    outputs = [_origin(patch.function) for patch in patches if patch.kind == "attn2_output_patch"]
    couples = [name for name in names if name != _NEGPIP]
    if others:
        beside = f"beside {others[0].told}: both act on attention to the prompt"
    elif len(couples) > 1 or names[:-1].count(_NEGPIP) != len(names[:-1]):
        beside = f"together: {', '.join(names)}. Known are one of regional prompts, and NegPiP before it"
    elif outputs != [_OUTPUTS[_INPUTS.index(name)] for name in couples]:
        beside = f"with {', '.join(outputs) or 'nothing'} for its output"
    else:
        return
    raise UnsupportedError(f"{_told(patches)} can't be honoured {beside}.", f"Remove one of them, or {LOCALLY}.")


def _told(patches: Sequence[Patch]) -> str:
    function = patches[0].function
    written = getattr(function, "function", function)
    named = written if hasattr(written, "__qualname__") else type(written)
    return f"Regional prompts ({named.__qualname__} of {pack_and_version(named)})"


class _Asked:
    """What patches say of attention to the prompt, in rows of that layout: 1 uncond, all others cond."""

    def __init__(self, patches: Sequence[Patch], layout: Sequence[int], call: Call) -> None:
        self.patches, self.layout, self.call = patches, layout, call
        self.inputs = [patch.function for patch in patches if patch.kind == "attn2_patch"]
        self.outputs = [patch.function for patch in patches if patch.kind == "attn2_output_patch"]
        self.splits = any(_origin(function) == _NEGPIP for function in self.inputs)
        self.options: dict[str, Any] = {"cond_or_uncond": list(layout), "original_shape": list(call.shape)}

    @property
    def _width(self) -> int | None:
        """Of the prompt; None where nothing attends to it."""
        blocks = (b for layer in self.call.network.modules() for b in getattr(layer, "transformer_blocks", ()))
        return next((block.attn2.to_k.in_features for block in blocks), None)

    @property
    def _has_regions(self) -> bool:
        return bool(self.outputs) and any(branch != _UNCOND for branch in self.layout)

    def rows(self) -> Sequence[PromptRow]:
        """Those that attention is computed for. Raises: UnsupportedError: others than each latent's for each of its prompts."""
        width, plain = self._width, plain_rows(self.call)
        if width is None or not self._has_regions:
            return plain
        try:
            queries, _, _ = self._by_branch(_drawn(len(plain), 2, width))
        except MISFITS as error:
            self._unknown(f"it can't be computed: {type(error).__name__}: {str(error)[:200]}")
        latents, found = len(plain) // len(self.layout), list[PromptRow]()
        for entry, (branch, own) in enumerate(zip(self.layout, queries, strict=True)):
            found += [PromptRow(entry, branch, n % latents, n // latents) for n in range(len(own))]
        return found

    def extras(self) -> list[AnyExtra]:
        """Raises: UnsupportedError: they do something else than attend to prompts and weigh what comes of it."""
        width = self._width
        if width is None:
            return []
        split: list[AnyExtra] = [SplitPrompt()] if self.splits else []
        base = _drawn(len(self.layout), 2, width)
        try:
            q, k, v = self._by_branch(base)
            if not self._has_regions:
                return split
            strength, keys, values = self._regions(base, k, v)
            masks = self._masks([len(rows) for rows in q])
        except MISFITS as error:
            self._unknown(f"it can't be computed: {type(error).__name__}: {str(error)[:200]}")
        same = all(torch.equal(key, value) for key, value in zip(keys, values, strict=True))
        regions = RegionalPrompts(strength=strength, keys=keys, values=None if same else values, masks=masks)
        return [*split, regions]

    def _by_branch(self, base_BTE: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Queries, keys and values, each by branch of the layout: a row for each latent of uncond, for cond as many for each prompt."""
        latents = len(base_BTE) // len(self.layout)
        given = q = _drawn(len(base_BTE), 2, 3)
        k = v = base_BTE
        for function in self.inputs:
            q, k, v = function(q, k, v, self.options)
        conds = sum(branch != _UNCOND for branch in self.layout)
        each, left = divmod(len(q) - latents * (len(self.layout) - conds), max(latents * conds, 1))
        counts = [latents if branch == _UNCOND else latents * each for branch in self.layout]
        if left or (each < 1 and conds) or not len(q) == len(k) == len(v) == sum(counts):
            self._unknown("it gives other numbers of rows")
        parts = [tuple(tensor.split(counts)) for tensor in (q, k, v)]
        tiles = self._tiles(base_BTE)
        for number, branch in enumerate(self.layout):
            own, first = [part[number] for part in parts], number * latents
            if not torch.equal(own[0], given[first : first + latents].repeat(len(own[0]) // latents, 1, 1)):
                self._unknown("it changes queries")
            strengths = {_strength(own[n][i], tiles[n - 1][first + i]) for n in (1, 2) for i in range(latents)}
            if None in strengths or (strengths != {1.0} and (branch == _UNCOND or not self.outputs)):
                self._unknown("it changes the prompt")
        q_parts, k_parts, v_parts = (list(part) for part in parts)
        return q_parts, k_parts, v_parts

    def _tiles(self, base_BTE: Tensor) -> tuple[Tensor, Tensor]:
        """The prompt's keys and values before regions: NegPiP parts them."""
        return (base_BTE[:, 0::2], base_BTE[:, 1::2]) if self.splits else (base_BTE, base_BTE)

    def _regions(
        self, base_BTE: Tensor, k: Sequence[Tensor], v: Sequence[Tensor]
    ) -> tuple[float, list[Tensor], list[Tensor]]:
        """The strength of the prompt itself, and the other prompts for keys and for values, (1, T, E)."""
        conds = [number for number, branch in enumerate(self.layout) if branch != _UNCOND]
        tiles = self._tiles(base_BTE)
        found = {
            _strength(part[number][0], tile[number])
            for part, tile in zip((k, v), tiles, strict=True)
            for number in conds
        }
        if len(found) != 1 or any(not torch.equal(part[n][1:], part[conds[0]][1:]) for part in (k, v) for n in conds):
            self._unknown("it takes keys and values of different strength, or other regions for each row")
        keys, values = ([row[None].cpu() for row in part[conds[0]][1:]] for part in (k, v))
        return found.pop() or 0.0, keys, values

    def _masks(self, counts: Sequence[int]) -> list[Tensor]:
        """By scale of the picture, (prompts, tokens): how much of each comes to each token."""
        scales = dict.fromkeys(attention.sides for attention in cross_attentions(self.call).values())
        return [self._masks_at(sides, counts) for sides in scales]

    def _masks_at(self, sides: tuple[int, ...], counts: Sequence[int]) -> Tensor:
        tokens, prompts = sides[0] * sides[1], max(counts)
        # A row is 1 in the channel of its own number.
        rows = torch.cat([torch.eye(prompts + 1, device=get_torch_device())[: n if n > 1 else 1] for n in counts])
        options = self.options | {"activations_shape": [*self.call.shape[:2], *sides]}
        out = rows[:, None].expand(-1, tokens, -1).clone()
        for function in self.outputs:
            out = function(out, options)
        if out.shape != (len(counts), tokens, prompts + 1):
            self._unknown("it gives other numbers of rows")
        conds = [number for number, branch in enumerate(self.layout) if branch != _UNCOND]
        kept = torch.zeros(prompts + 1, device=out.device)
        kept[0] = 1.0
        is_kept = all(torch.equal(out[n], kept.expand(tokens, -1)) for n in range(len(counts)) if n not in conds)
        if not is_kept or any(not torch.equal(out[n], out[conds[0]]) for n in conds) or out[conds[0]][:, -1].any():
            self._unknown("it doesn't weigh each region's output by a mask")
        return out[conds[0]][:, :-1].T.contiguous().cpu()

    def _unknown(self, why: str) -> NoReturn:
        raise UnsupportedError(
            f"{_told(self.patches)} are of a version that is not known, or don't fit this picture: {why}.",
            f"Use another version of that pack, or sizes that divide by 64; or {LOCALLY}.",
        )


def _drawn(*shape: int) -> Tensor:
    """Numbers of which no two are alike, where packs keep their prompts."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(get_torch_device())


def _strength(row_TE: Tensor, tile_TE: Tensor) -> float | None:
    """Times what a row is these tokens, again and again; None where it is something else."""
    if not len(row_TE) or len(row_TE) % len(tile_TE) or row_TE.shape[1] != tile_TE.shape[1]:
        return None
    whole = tile_TE.repeat(row_TE.shape[0] // tile_TE.shape[0], 1)
    if torch.equal(row_TE, whole):
        return 1.0
    strength = round(float((row_TE * whole).sum() / (whole * whole).sum()), 6)
    return strength if torch.allclose(row_TE, strength * whole, rtol=1e-4, atol=1e-6) else None


KIND = Kind(_knows, _extras, told=_is_told_beside)
