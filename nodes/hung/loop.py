"""A sampling as one request: recognised in what a guider and a sampler object carry, or why it can't be one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import comfy.k_diffusion.sampling as core_samplers
import comfy.samplers
import torch
from comfy.extra_samplers import uni_pc
from comfy.samplers import KSAMPLER, CFGGuider
from torch import Tensor

from ...parallel_backend import Conditioning, ControlUse, PerpNeg
from ...parallel_backend.config import SAMPLERS, SAMPLERS_BELOW_ONE, SAMPLERS_OF_PATCHES, FlowSampling, ModelSampling
from ...parallel_backend.errors import UnsupportedError
from ...parallel_backend.rpc.extras import AnyExtra, ImagePrompt, SharedAttention, SharedNorms, SparseAttention
from ..known_to_core import known_to
from . import joint_image_prompt
from .controlnet import ControlChain
from .further_branches import in_further_branches, odd_branches, processed_empty
from .kinds import extras_of, step_by_step, unknown_patches
from .known_functions import Known, Sampling, known_functions
from .loop_patches import loop_patches, replaced_functions
from .makers import is_cores_own
from .model_sampling import read_sampling
from .nag_guider import GUIDER, uneven_prompts
from .patches import Call, Schedule, origin

# Of a processed prompt: what ComfyUI's loop reads beside the model's own inputs, and the value that changes nothing.
_NEUTRAL: Mapping[str, Any] = {"strength": 1.0}
_READ = ("area", "mask", "strength", "control", "gligen", "hooks", "default")
_NAMED = {"control": "a ControlNet"}
_INPUTS, _MAY_HAVE = {"c_crossattn", "y"}, {"c_concat"}
# Guiders, by `origin`: core's extra nodes are loaded under a name that differs from start to start.
_BASIC, _OF_THREE = "nodes_custom_sampler:Guider_Basic", "nodes_perpneg:Guider_PerpNeg"
_EMPTY = "empty_negative_prompt"
# Prompts, as guiders call them, by their numbers as branches.
_NUMBERED = ("positive", "negative", _EMPTY)
# Marks the processed one that PerpNeg's node evaluates by itself.
_OF_NODE = "of_node"
# A MODEL's option.
_AROUND = "model_function_wrapper"


@dataclass(frozen=True)
class Loop:
    """What one request needs of a sampling; latents and noise as ComfyUI's guider is given them."""

    latent: Tensor
    noise: Tensor
    sigmas: Tensor
    sampler: str
    cfg_scale: float
    seed: int
    positive: Conditioning
    negative: Conditioning | None
    mask: Tensor | None
    model_sampling: ModelSampling
    functions: Mapping[str, Any]
    controls: Mapping[str, Sequence[ControlUse]]
    extras: Sequence[AnyExtra]


def read_loop(
    guider: CFGGuider,
    noise: Tensor,
    latent: Tensor,
    sampler: Any,
    sigmas: Tensor,
    mask: Tensor | None,
    seed: int | None,
) -> Loop | list[str]:
    """The sampling that this guider is about to make; or, each by its name, what only ComfyUI's own loop can do."""
    model, inside = guider.model_patcher, guider.model_options["transformer_options"]
    name, sampling, kind_of_guider = sampler_name(sampler), read_sampling(model), origin(type(guider))
    of_three, is_flow = kind_of_guider == _OF_THREE, isinstance(sampling, FlowSampling)
    acted_on = Sampling(is_flow, float(guider.cfg), "negative" in guider.conds, of_three, sigmas)
    known, options = known_functions(guider.model_options, acted_on)
    if guider.cfg != 1:  # else both prompts are evaluated though one has no weight
        options.pop("disable_cfg1_optimization", None)
    schedule = _schedule(options, name, sigmas)
    if schedule is not None:
        del options[_AROUND]
    found = [*replaced_functions(), *loop_patches(model, options), *step_by_step(inside)]
    if type(guider) is not CFGGuider and kind_of_guider not in (_BASIC, _OF_THREE, GUIDER):
        found.append(f"the guider {type(guider).__name__}")
    found += _odd_sampling(sampler, name, sigmas, latent, mask, seed)
    if isinstance(sampling, str):
        found.append(sampling)
    found += unknown_patches(inside)
    one_prompt = Call(model.network, tuple(latent.shape), (0,), None, inside)
    found += odd_branches(known, one_prompt)
    conds = {kind: [dict(entry) for entry in entries] for kind, entries in guider.conds.items()}
    found += _odd_prompts(conds, known, len(latent))
    if found or name is None or seed is None or isinstance(sampling, str):
        return found
    processed = _processed(model, known, conds, noise, latent, mask, seed)
    prompts, controls = dict[str, Conditioning](), dict[str, list[ControlUse]]()
    for kind, (entry,) in processed.items():
        inputs = {key: value.cond for key, value in entry["model_conds"].items()}
        if found := [*_odd_inputs(kind, entry, inputs, sigmas)]:
            return found
        prompts[kind] = Conditioning(inputs["c_crossattn"], inputs["y"], concat=inputs.get("c_concat"))
        members = entry["control"].in_ranks if "control" in entry else []
        controls[kind] = [member.use_of_loop(latent, sigmas[0], inputs) for member in members]
    perp_neg = _perp_neg(guider, known, prompts)
    branches = _branches(guider.cfg, prompts, perp_neg)
    rows, tokens = (len(branches) * len(latent), *latent.shape[1:]), prompts["positive"].context.shape[1]
    extras = extras_of(Call(model.network, rows, branches, None, inside, tokens=tokens, schedule=schedule))
    lengths = [prompts[_NUMBERED[number]].context.shape[1] for number in branches]
    found += uneven_prompts(inside, extras, lengths)
    found += _odd_extras(extras, known, lengths, _are_alike(prompts, controls), mixes_others=perp_neg is not None)
    if any(isinstance(extra, ImagePrompt) and extra.regions is not None for extra in extras):
        found += _evaluated_apart(known, processed)
    if found:
        return found
    settings = {**known.shares, "apg": known.apg, "perp_neg": perp_neg} | in_further_branches(known, one_prompt)
    named = (sigmas, name, float(guider.cfg), seed, prompts["positive"], prompts.get("negative"))
    mask = None if mask is None else mask[:, :1]
    return Loop(latent, noise, *named, mask, sampling, settings, controls, extras)


def _odd_sampling(
    sampler: Any, name: str | None, sigmas: Tensor, latent: Tensor, mask: Tensor | None, seed: int | None
) -> Iterator[str]:
    """What of the sampler, its schedule and its latent only ComfyUI's own loop can do."""
    if name is None:
        yield f"the sampler {_described(sampler)}"
    elif name.startswith("uni_pc") and len(sigmas) == 2:
        yield f"the sampler {name} in one step"
    if seed is None:
        yield "a sampling without a seed"
    if (sigmas.diff() >= 0).any():
        yield "sigmas that don't fall"
    if getattr(latent, "is_nested", False) or latent.ndim != 4:
        yield "a latent of several parts or dims"
    if mask is not None and not torch.equal(mask, mask[:, :1].expand_as(mask)):
        yield "a noise mask that differs by channel"


def _odd_prompts(conds: Mapping[str, Sequence[Mapping[str, Any]]], known: Known, latents: int) -> Iterator[str]:
    """What of the prompts only ComfyUI's own loop can do."""
    for kind, entries in conds.items():
        yield from _odd_entries(kind, entries)
    yield from _odd_empty(conds.get(_EMPTY, ()), known)
    yield from _mixed_hints(conds, latents)


def _processed(
    model: Any,
    known: Known,
    conds: Mapping[str, list[dict[str, Any]]],
    noise: Tensor,
    latent: Tensor,
    mask: Tensor | None,
    seed: int,
) -> dict[str, list[dict[str, Any]]]:
    """The prompts as ComfyUI hands them to the model, the empty one of a node among them."""
    shapes = known_to(comfy.samplers.process_conds, latent_shapes=[latent.shape])
    # What goes in beside the latent is made of it, as the model sees it.
    seen = latent.float()
    if torch.count_nonzero(seen) > 0:
        seen = model.model.process_latent_in(seen)
    given = (noise.float(), conds, model.load_device, seen, mask, seed)
    processed: dict[str, list[dict[str, Any]]] = comfy.samplers.process_conds(_AsPatched(model), *given, **shapes)
    if (empty := processed_empty(known, model, noise.float())) is not None:
        processed[_EMPTY] = [empty | {_OF_NODE: True}]
    return processed


def _odd_inputs(kind: str, entry: Mapping[str, Any], inputs: Mapping[str, Tensor], sigmas: Tensor) -> Iterator[str]:
    """What of a processed prompt only ComfyUI's own loop can do."""
    if not _acts_everywhere(entry, sigmas):
        yield f"a range of steps in the {kind} conditioning"
    elif odd := (set(inputs) - _MAY_HAVE) ^ _INPUTS:
        yield f"model inputs {', '.join(sorted(odd))} of the {kind} conditioning"
    elif _OF_NODE in entry and "c_concat" in inputs:
        yield "PerpNeg on a model that takes a picture beside the latent"


def _odd_extras(
    extras: Sequence[AnyExtra], known: Known, lengths: Sequence[int], are_alike: bool, mixes_others: bool
) -> Iterator[str]:
    """What of what hangs inside only ComfyUI's own loop can do, beside these prompts and what else the MODEL carries."""
    if len(set(lengths)) > 1 and any(isinstance(extra, SparseAttention) for extra in extras):
        # ComfyUI repeats the shorter one's tokens, which changes what a sparse map gives each.
        yield "PLADIS with prompts of unlike lengths"
    pairs = any(extra.pairs for extra in extras)
    names_rows = any(isinstance(extra, SharedAttention | SharedNorms) for extra in extras)
    if (pairs and (mixes_others or known.in_uncond is not None)) or (names_rows and known.weaker is not None):
        yield "a patch that mixes rows of two prompts, beside others"
    elif pairs and not are_alike:
        yield "a patch that mixes rows of both prompts, which are of unlike lengths or ControlNets"


def _schedule(options: Mapping[str, Any], sampler: str | None, sigmas: Tensor) -> Schedule | None:
    """Where the function around the network is known, and the sampler evaluates it at the schedule's sigmas alone."""
    around = options.get(_AROUND)
    if sampler not in SAMPLERS_OF_PATCHES or (sampler in SAMPLERS_BELOW_ONE and sigmas[0] >= 1):
        return None
    if not joint_image_prompt.is_around(around, options["transformer_options"]):
        return None
    return Schedule(tuple(float(sigma) for sigma in sigmas.float() if sigma > 0), around)


def _perp_neg(guider: Any, known: Known, prompts: Mapping[str, Conditioning]) -> PerpNeg | None:
    """The node evaluates the empty prompt by itself, as if it were the first of all; the guider as the third."""
    if known.empty is not None:
        return PerpNeg(prompts[_EMPTY], known.empty[1], 0)
    return PerpNeg(prompts[_EMPTY], float(guider.neg_scale)) if _EMPTY in prompts else None


def _branches(cfg: float, prompts: Mapping[str, Conditioning], perp_neg: PerpNeg | None) -> tuple[int, ...]:
    """The numbers of the prompts that are evaluated together: at scale 1 neither side computes the negative one, nor at neg_scale 0."""
    if perp_neg is None or perp_neg.number == 0:
        return (0,) if cfg == 1 or "negative" not in prompts else (0, 1)
    if perp_neg.neg_scale == 0:
        return (0,) if cfg == 1 else (0, 2)
    return (0, 1, 2)


def _are_alike(prompts: Mapping[str, Conditioning], controls: Mapping[str, Sequence[ControlUse]]) -> bool:
    """Whether one evaluation is of all of them."""
    lengths = {prompt.context.shape[1] for prompt in prompts.values()}
    return len(lengths) == 1 and not any(controls.values())


def _evaluated_apart(known: Known, processed: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    """Where ComfyUI doesn't evaluate all prompts at once: what an image prompt gives each of a row's prompts depends on that."""
    what = "an image prompt beside regional prompts"
    if known.weaker is not None or known.empty is not None:
        yield f"{what}, and evaluations of one prompt by itself"
    first, *others = (entry for (entry,) in processed.values())
    for other in others:
        alike = comfy.samplers.cond_equal_size(first["model_conds"], other["model_conds"])
        if not alike or first.get("control") is not other.get("control"):
            yield f"{what}, and prompts that ComfyUI evaluates one after the other"


class _AsPatched:
    """The model as it will be while it samples, when core has put a MODEL's own model sampling in its place: ranges are by that."""

    def __init__(self, model: Any) -> None:
        self._model, self.model_sampling = model.model, model.get_model_object("model_sampling")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def sampler_name(sampler: Any) -> str | None:
    """The backend's name of it; None where it has none, or the sampler was given other settings than its own."""
    if type(sampler) is not KSAMPLER:
        return None
    function, options = sampler.sampler_function, sampler.inpaint_options
    name = backends_own(sampler) or _names().get(function) or _made_anew(function)
    if name is None or any(value for key, value in options.items() if key != "random"):
        return None
    defaults = {key: p.default for key, p in inspect.signature(function).parameters.items()}
    if any(defaults.get(key) != value for key, value in sampler.extra_options.items()):
        return None
    if options.get("random"):
        return "ddim" if name == "euler" else None
    return name


def _names() -> dict[Any, str]:
    """By ComfyUI's functions, those samplers that the backend has; without those that a pack has replaced."""
    known = [(core_samplers, f"sample_{name}", name) for name in SAMPLERS]
    known += [(uni_pc, "sample_unipc", "uni_pc"), (uni_pc, "sample_unipc_bh2", "uni_pc_bh2")]
    found = ((getattr(module, function, None), module, function, name) for module, function, name in known)
    return {
        function: name for function, module, called, name in found if is_cores_own(function, module.__name__, called)
    }


def _made_anew(function: Any) -> str | None:
    """Of the two that ComfyUI makes anew each time."""
    name = getattr(function, "__name__", "").removesuffix("_function")
    return name if name in ("dpm_fast", "dpm_adaptive") and function.__module__ == comfy.samplers.__name__ else None


def in_backend_alone(name: str) -> KSAMPLER:
    """A sampler that ComfyUI hasn't, for its guiders: they hand it to the backend, or refuse it."""

    def sample(*_: Any, **__: Any) -> NoReturn:
        raise UnsupportedError(f"The sampler {name} runs in the backend alone.", "Choose another sampler.")

    sample.backend_name = name  # type: ignore[attr-defined]
    return KSAMPLER(sample)


def backends_own(sampler: Any) -> str | None:
    """The name of a sampler that ComfyUI hasn't; None of all others."""
    return getattr(getattr(sampler, "sampler_function", None), "backend_name", None)


def _described(sampler: Any) -> str:
    function = getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", type(sampler).__name__).removeprefix("sample_")
    return f"{name} with other settings than its own" if function in _names() else name


def _odd_entries(kind: str, entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What a prompt carries beside one entry for the whole picture and all steps."""
    if len(entries) != 1:
        yield f"{len(entries)} entries in the {kind} conditioning"
    for key in _READ:
        if key == "control" and all(_in_ranks(entry.get(key)) for entry in entries):
            continue
        if any(key in entry and entry[key] is not None and entry[key] != _NEUTRAL.get(key) for entry in entries):
            yield f"{_NAMED.get(key, repr(key))} in the {kind} conditioning"


def _acts_everywhere(entry: Mapping[str, Any], sigmas: Tensor) -> bool:
    """Whether a processed prompt is heeded at every sigma at which the model is evaluated."""
    start, end = entry.get("timestep_start"), entry.get("timestep_end")
    # In fp32, as ComfyUI compares them there.
    evaluated = sigmas[sigmas > 0].float()
    begins_late = start is not None and bool((evaluated > start).any())
    return not begins_late and not (end is not None and bool((evaluated < end).any()))


def _odd_empty(of_guider: Sequence[Mapping[str, Any]], known: Known) -> Iterator[str]:
    """What the empty prompt carries that others may."""
    of_node = () if known.empty is None else known.empty[0]
    if known.empty is not None:
        yield from _odd_entries("empty", of_node)
    if any(entry.get("control") for entry in (*of_guider, *of_node)):
        yield "a ControlNet in the empty conditioning"


def _mixed_hints(conds: Mapping[str, Sequence[Mapping[str, Any]]], latents: int) -> Iterator[str]:
    """Twice as many pictures of a ControlNet as latents: where ComfyUI computes two prompts at once, each gets others of them."""
    if len(conds) < 2:
        return
    chains = {id(chain): chain for entries in conds.values() for entry in entries if (chain := entry.get("control"))}
    for chain in chains.values():
        for member in (chain.in_ranks or ()) if isinstance(chain, ControlChain) else ():
            if member.hints == 2 * latents:
                yield f"a ControlNet's {member.hints} pictures for {latents} latents"


def _in_ranks(control: Any) -> bool:
    """Whether nothing of it is ComfyUI's to compute."""
    return control is None or (isinstance(control, ControlChain) and control.in_ranks is not None)
