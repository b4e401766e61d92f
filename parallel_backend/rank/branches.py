"""What guidance evaluates in a sampling job: which prompts, with what inside the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..config import BranchName
from ..errors import ConfigError, UnsupportedError
from ..extras.reading import check_sizes
from ..models.extra import Extra
from ..models.reports import ReportingExtra
from ..models.rows import Branch, Prompt
from ..rpc.extras import AnyExtra
from ..rpc.messages import Prompt as AskedPrompt
from ..rpc.messages import Sample


def prompts_of(body: Sample) -> dict[BranchName, AskedPrompt]:
    """Those that guidance asks for, in the order of their evaluation; none that would have no weight.

    Raises: ConfigError: Perp-Neg without its prompts, or the other way round.
    """
    spec, named = body.spec, {"cond": body.cond}
    if (spec.neg_scale is None) != (body.empty is None) or (body.empty is not None and body.uncond is None):
        raise ConfigError(
            "Perp-Neg is guidance of a positive, a negative and an empty prompt, with a neg_scale.",
            "Give all of them, or leave the empty prompt and neg_scale out.",
        )
    guided = spec.cfg_scale != 1.0
    if body.uncond is not None and (guided if spec.neg_scale is None else spec.neg_scale != 0):
        named["uncond"] = body.uncond
    if body.empty is not None and (guided or spec.neg_scale != 0):
        named["empty"] = body.empty
    return named  # type: ignore[return-value] # its keys are


def branches_of(
    body: Sample,
    prompts: Mapping[BranchName, Prompt],
    read: Callable[[Sequence[AnyExtra], Sequence[int]], tuple[Extra, ...]],
) -> dict[BranchName, Branch]:
    """What guidance evaluates, in this order; the weaker model's last.

    Args:
        read: (extras, numbers of the branches that have them) -> what applies them.
    Raises: BackendError: extras that don't fit.
    """
    numbers = {"cond": 0, "uncond": 1, "empty": body.empty_number}
    everywhere, of_uncond = read(body.extras, [numbers[name] for name in prompts]), read(body.uncond_extras, [1])
    branches = {
        name: Branch(prompt, numbers[name], everywhere + of_uncond if name == "uncond" else everywhere)
        for name, prompt in prompts.items()
    }
    if body.spec.weaker is not None:
        if not body.weaker:
            raise ConfigError(
                "Guidance away from a weaker model came with nothing that makes it weaker.",
                "Name an extra, like SkipBlocks or PerturbedAttention.",
            )
        branches["weaker"] = replace(branches["cond"], extras=everywhere + read(body.weaker, [0]))
    return branches


def check_extras(branches: Mapping[BranchName, Branch]) -> None:
    """Raises: UnsupportedError, InputError: those that only single evaluations can have, or that don't fit these branches or each other."""
    for branch in branches.values():
        check_sizes(branch.extras)
        for extra in branch.extras:
            extra.check_tokens(branch.prompt.context.shape[1])
    extras = {id(extra): extra for branch in branches.values() for extra in branch.extras}.values()
    if reporting := [extra.name for extra in extras if isinstance(extra, ReportingExtra)]:
        raise UnsupportedError(
            f"{', '.join(reporting)} reports of each evaluation, and a whole sampling gives no reports.",
            "Ask for it evaluation by evaluation.",
        )
    first, *others = (branch for name, branch in branches.items() if name != "weaker")
    paired = [extra.name for extra in extras if extra.pairs]
    if paired and len(others) > 1:
        raise UnsupportedError(
            f"{', '.join(paired)} mixes rows of two prompts, and here are {len(others) + 1}.",
            "Leave Perp-Neg out, or ask for it evaluation by evaluation.",
        )
    if paired and others and not first.is_like(others[0]):
        raise UnsupportedError(
            f"{', '.join(paired)} mixes rows of both prompts, which are of unlike lengths, ControlNets or extras.",
            "Give prompts of one length with the same ControlNets, or ask for it evaluation by evaluation.",
        )
