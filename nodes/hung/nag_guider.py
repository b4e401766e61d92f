"""Normalized attention guidance of the pack ComfyUI-NAG, whose guider samples with a forward of its own in the network's place.

On a parallel MODEL that forward computes nothing: it is taken off before the sampling, and what it holds becomes a patch in the
guider's options, which both routes translate as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ...parallel_backend.errors import UnsupportedError
from ...parallel_backend.rpc.extras import AnyExtra, NormalizedJointPrompt, NormalizedPrompt
from . import skip_layers
from .asked_patch import attention
from .asking import check, drawn, unknown, with_others
from .kept_extras import kept_extras
from .layers import is_own
from .normalized_formula import NAME, guided_away
from .pack_version import pack_and_version
from .patches import Call, Kind, Patch, origin, patches_in
from .refusal import LOCALLY, MISFITS
from .sigmas import in_fp32
from .unet_places import all_places

GUIDER = "samplers:NAGCFGGuider"
_UNET, _TRANSFORMER = "unet_forward", "dit_forward"
# By the `origin` of a forward: of which kind of patch it is, and what the guider has given it.
_FORWARDS = {
    "openaimodel:NAGUNetModel.forward": (_UNET, {"nag_negative_context", "nag_sigma_end"}),
    "mmdit:NAGOpenAISignatureMMDITWrapper.forward": (
        _TRANSFORMER,
        {"nag_negative_context", "nag_negative_y", "nag_sigma_end"},
    ),
}
# Numbers that the pack leaves on layers, where nothing but a forward of its own reads them.
_LEFT = ("nag_scale", "nag_tau", "nag_alpha")


@dataclass(frozen=True, eq=False)
class NagForward:
    """A forward of the pack.

    Args:
        function: the pack's own. given: what it is called with beside a network's inputs.
        scale, tau, alpha: as the network's layers have them.
    """

    kind: str
    function: Any
    given: Mapping[str, Any]
    scale: float
    tau: float
    alpha: float

    @property
    def context(self) -> Tensor:
        """(latents, tokens, context width): the negative prompt."""
        return self.given["nag_negative_context"]  # type: ignore[no-any-return]

    @property
    def end(self) -> float:
        """The last sigma at which it acts."""
        return in_fp32(float(self.given["nag_sigma_end"]))

    @property
    def on_layer(self) -> dict[str, float]:
        """Its numbers as the pack calls them."""
        return dict(zip(_LEFT, (self.scale, self.tau, self.alpha), strict=True))

    @property
    def settings(self) -> dict[str, float]:
        """Its numbers, and when it acts, as extras have them."""
        return {"scale": self.scale, "tau": self.tau, "alpha": self.alpha, "end": self.end}


def take_forward(guider: Any, network: Module) -> None:
    """The forward that the pack's guider has put on the network, if any, is one of the guider's options from now on.

    It isn't put back: the pack itself forgets to take it off where a sampling doesn't come to its end.
    Raises: UnsupportedError: a version that is not known.
    """
    bound = vars(network).get("forward")
    if bound is None or origin(type(guider)) != GUIDER or is_own(network, "forward", bound):
        return
    del network.forward
    forward = _known_forward(network, bound)
    if forward is None:
        raise unknown(NAME, type(guider), "it puts another forward on the network")
    options = guider.model_options["transformer_options"]
    options["patches"] = {**options.get("patches", {}), forward.kind: [forward]}


def _known_forward(network: Module, bound: Any) -> NagForward | None:
    held = bound.__func__ if isinstance(bound, MethodType) else None
    if not isinstance(held, partial) or held.args:
        return None
    kind, names = _FORWARDS.get(origin(held.func), ("", set()))
    if not kind or held.keywords.keys() != names:
        return None
    layers = [network]
    if kind == _UNET:
        layers = [layer for name, layer in network.named_modules() if name.endswith(".attn2")]
    numbers = {tuple(getattr(layer, name, None) for name in _LEFT) for layer in layers}
    found: Any = numbers.pop() if len(numbers) == 1 else ()
    if not found or not all(isinstance(number, int | float) for number in found):
        return None
    return NagForward(kind, held.func, held.keywords, *map(float, found))


def _knows(patch: Patch) -> bool:
    return isinstance(patch.function, NagForward)


def uneven_prompts(options: Mapping[str, Any], extras: Iterable[AnyExtra], lengths: Sequence[int]) -> Iterator[str]:
    """Why prompts of so many tokens can't be had for a whole sampling: what the pack repeats differs by evaluation."""
    if not any(_knows(patch) for patch in patches_in(options)):
        return
    own = [extra.context.shape[1] for extra in extras if isinstance(extra, NormalizedJointPrompt)]
    if len({*lengths, *own}) > 1:
        yield "ComfyUI-NAG with prompts of unlike lengths"


def repeated_prompt(context: Tensor, extras: Iterable[AnyExtra]) -> Tensor:
    """The prompt's tokens one after the other until there are as many as of a negative prompt that goes beside them."""
    own = [extra.context.shape[1] for extra in extras if isinstance(extra, NormalizedJointPrompt)]
    return context.repeat(1, max(own) // context.shape[1], 1) if own and max(own) > context.shape[1] else context


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    """For the same patches they are the same objects, whose tensors are sent once."""
    for patch in patches:
        forward = patch.function
        if 0 not in call.branches or (call.sigma is not None and call.sigma < forward.end):
            continue
        _check_rows(forward, call)
        _check_alone(forward, call)
        yield from kept_extras([patch], call, (call.tokens,), partial(_MADE[forward.kind], forward, call))


def _of_unet(forward: NagForward, call: Call) -> list[AnyExtra]:
    prompt = _beside(forward, call)
    _check(forward, _asked_attention, "NAGCrossAttention")
    return [NormalizedPrompt(places=list(all_places(call.network)), prompt=prompt, **forward.settings)]


def _of_transformer(forward: NagForward, call: Call) -> list[AnyExtra]:
    context, pooled = _beside(forward, call), forward.given["nag_negative_y"][:1].cpu()
    _check(forward, _asked_block, "_nag_block_mixing")
    return [NormalizedJointPrompt(context=context, pooled=pooled, **forward.settings)]


def _beside(forward: NagForward, call: Call) -> Tensor:
    """The negative prompt as it stands beside the call's, (1, tokens, context width): the pack repeats the tokens of both.

    Raises: UnsupportedError: the pack's own function does something else.
    """
    own, tokens = forward.context[:1].float().cpu(), call.tokens
    if not torch.equal(forward.context.float().cpu(), own.expand(forward.context.shape)):
        raise UnsupportedError(
            f"{NAME} ({_version(forward)}) came with a negative prompt of {len(forward.context)} rows that differ.",
            "Give it one prompt: a conditioning that isn't batched.",
        )
    counted = torch.arange(1.0, tokens + 1)[None, :, None].expand(1, -1, own.shape[2])
    try:
        both = forward.function.__globals__["cat_context"](counted, own)
    except MISFITS as error:
        raise unknown(NAME, forward.function, error) from error
    if len(both) != 2 or not torch.equal(both[0], counted[0].repeat(both.shape[1] // tokens, 1)):
        raise unknown(NAME, forward.function, "it changes the prompt")
    wanted = own.repeat(1, -(-both.shape[1] // own.shape[1]), 1)[:, -both.shape[1] :]
    if not torch.equal(both[1:], wanted):
        raise unknown(NAME, forward.function, "it changes the negative prompt")
    return wanted.contiguous()


def _check_rows(forward: NagForward, call: Call) -> None:
    """Raises: UnsupportedError: the pack would guide other rows than those of one positive prompt."""
    layout, latents = call.layout, call.shape[0] // len(call.branches)
    if layout.count(0) > 1 or layout[-1] != 0:
        raise UnsupportedError(
            f"{NAME} ({_version(forward)}) can't be honoured in evaluations of {layout.count(0)} positive prompts among "
            f"{len(layout)}: it guides the last rows alone.",
            "Have one positive and one negative prompt.",
        )
    if (rows := len(forward.context)) != latents:
        raise UnsupportedError(
            f"{NAME} ({_version(forward)}) is for a batch of {rows}; here are {latents} latents.",
            "Connect the same latent to the guider and to the sampler.",
        )


def _check_alone(forward: NagForward, call: Call) -> None:
    """Raises: UnsupportedError: beside patches that the pack's forward would give rows of the negative prompt as well."""
    for patch in patches_in(call.options):
        of_transformer = patch.kind == "dit" and not skip_layers.KIND.knows(patch)
        if of_transformer if forward.kind != _UNET else patch.kind.startswith("attn2"):
            raise UnsupportedError(
                f"{NAME} ({_version(forward)}) can't be honoured beside {patch.told}: both act on attention to the prompt.",
                f"Remove one of them, or {LOCALLY}.",
            )


def _check(forward: NagForward, ask: Callable[[FunctionType, NagForward], tuple[Tensor, Tensor]], name: str) -> None:
    """The pack's own attention, with numbers that are known. Raises: UnsupportedError: it gives something else than the ranks will."""
    names = forward.function.__globals__

    def acts() -> tuple[Tensor, Tensor]:
        """At its end with cond, below it, and at its end without."""
        at_end = torch.tensor([forward.end])
        when = [
            bool(names["check_nag_activation"]({"sigmas": sigma, "cond_or_uncond": rows}, forward.end))
            for sigma, rows in ((at_end, [1, 0]), (at_end - 1, [1, 0]), (at_end, [1]))
        ]
        return torch.tensor(when).float(), torch.tensor([1.0, 0.0, 0.0])

    check(NAME, forward.function, acts)
    check(NAME, forward.function, lambda: ask(getattr(names[name], "forward", names[name]), forward))


def _asked_attention(function: FunctionType, forward: NagForward) -> tuple[Tensor, Tensor]:
    """What an attention to the prompt gives of two rows, and of one of the negative prompt, and what it should."""
    x, context = drawn(2, 3, 8), drawn(3, 5, 8)
    layer = SimpleNamespace(**dict.fromkeys(("to_q", "to_k", "to_v", "to_out"), _as_it_is), **forward.on_layer)
    layer.heads, layer.attn_precision = 2, None
    theirs = with_others(function, {"optimized_attention": attention})(layer, x, context=context)
    own, other = attention(x, context[:2], context[:2], 2), attention(x[1:], context[2:], context[2:], 2)
    return theirs, torch.cat([own[:1], guided_away(own[1:], other, forward.scale, forward.alpha, forward.tau)])


def _asked_block(function: FunctionType, forward: NagForward) -> tuple[Tensor, Tensor]:
    """As `_asked_attention`, of a joint block: what it gives for text and image."""
    context, x = drawn(3, 2, 8), drawn(2, 3, 8)
    projected = SimpleNamespace(pre_attention=lambda x, _: ((x, x, x), ()), post_attention=_as_it_is)
    projected.pre_only, projected.x_block_self_attn, projected.attn = False, False, SimpleNamespace(num_heads=2)
    theirs = with_others(function, {"optimized_attention": attention})(
        context, x, projected, projected, drawn(3, 8), **forward.on_layer
    )
    tokens = torch.cat([context, torch.cat([x, x[1:]])], dim=1)
    of_text, of_image = attention(tokens, tokens, tokens, 2).split([2, 3], dim=1)
    guided = guided_away(of_image[1:2], of_image[2:], forward.scale, forward.alpha, forward.tau)
    ours = (of_text, torch.cat([of_image[:1], guided]))
    return torch.cat([part.flatten() for part in theirs]), torch.cat([part.flatten() for part in ours])


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _version(forward: NagForward) -> str:
    return pack_and_version(forward.function)


_MADE: Mapping[str, Callable[[NagForward, Call], list[AnyExtra]]] = {
    _UNET: _of_unet,
    _TRANSFORMER: _of_transformer,
}
KIND = Kind(_knows, _extras, left=lambda attribute, _: attribute in _LEFT)
