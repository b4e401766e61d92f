"""A sampling job on one rank, from the request to its result."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import msgspec
import torch
from torch import Tensor

from ..config import SAMPLERS_OF_OWN_STEPS, SAMPLERS_OF_PATCHES, BranchName, SamplerSpec
from ..distributed.cfg import own_branches
from ..distributed.stale import Kept, Step
from ..distributed.step_cache import StepCaches
from ..distributed.traffic import Timeline, with_ranks
from ..errors import BackendError, ConfigError, UnsupportedError
from ..extras.reading import Extras
from ..models.extra import Extra
from ..models.pipeline import Pipeline
from ..models.prediction import Predictor
from ..models.rows import Branch, Prompt
from ..models.share import Share
from ..rpc.messages import ControlUse, Result, Sample, StepDone
from ..rpc.state import AxisCost, RankCost, Swap
from ..sampling.driver import StepReport
from ..sampling.image import sample_latent
from ..sampling.parameterization import Discrete, Flow, Parameterization, parameterization_of
from .branches import branches_of, check_extras, prompts_of
from .control_nets import ControlNets
from .jobs import Job
from .step_messages import StepMessages, step_messages

# Of a rank and a job: they are as good as alike.
MOST_NOTES = 2


@dataclass
class SampleJob:
    """What a checked request comes to."""

    body: Sample
    job: Job
    predictor: Predictor
    branches: Mapping[BranchName, Branch]
    latent: Tensor
    kept: Kept
    swap: Swap
    share: Share = field(init=False)
    weaker: Share | None = field(init=False, default=None)
    pipeline: Pipeline | None = field(init=False, default=None)
    messages: StepMessages = field(init=False)
    steps: int = field(init=False, default=0)
    sums: list[tuple[int, Tensor]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.messages = step_messages(self.job.emit, self.latent.device, tells=self.job.control.rank == 0)

    def start(self) -> None:
        """What its evaluations take from the prompts is made.

        Raises: InputError: an image with too few rows for the patches of a pipeline. Comm: `Predictor.share`'s.
        """
        spec, shape, kept = self.body.spec, self.latent.shape, self.kept
        always = [branch for name, branch in self.branches.items() if name != "weaker"]
        self.share = self.predictor.share_of(shape[0], always)
        if (weaker := self.branches.get("weaker")) is not None:
            self.weaker = self.predictor.share_of(shape[0], [weaker])
        first, job = spec.first_displaced, self.job
        if kept.token_kv is not None and first is not None:
            make = partial(Pipeline, self.predictor, self.share, shape, kept, first, job.cancelled)
            self.pipeline = job.control.agreed(make)

    def nbytes(self) -> int:
        """Of what is kept from evaluation to evaluation."""
        return self.kept.nbytes() + sum(share.nbytes() for share in self._shares())

    def _shares(self) -> list[Share]:
        return [self.share] if self.weaker is None else [self.share, self.weaker]

    def foresee(self, timesteps: Sequence[Tensor]) -> None:
        """Those of the schedule, on the CPU, in their order."""
        for share in self._shares():
            share.foresee(timesteps)
        if self.kept.caches is not None:
            self.kept.caches.steps = len(timesteps)

    def outputs(self, x: Tensor, timestep: Tensor, index: int, sigma: Tensor) -> list[Tensor]:
        """An evaluation that all ranks make together, of the branches that act there, in their order."""
        step, timeline = _step(self.body.spec, index, self.kept, float(sigma)), self.kept.timeline
        if self.kept.caches is not None:
            self.kept.caches.begin(index, self._acting(step.sigma))
        if timeline is not None:
            timeline.begin(index)
        with nullcontext() if timeline is None else timeline.span():
            outputs = self.predictor.outputs(x, timestep, self.share, step)
            if self.weaker is not None and self._leads_away(step.sigma):
                outputs += self.predictor.outputs(x, timestep, self.weaker, step)
        self._note(index, outputs)
        return outputs

    def _leads_away(self, sigma: float | None) -> bool:
        asked = self.body.spec.weaker
        return asked is not None and sigma is not None and asked.is_at(sigma)

    def _acting(self, sigma: float | None) -> tuple[bool, ...]:
        """Which of its extras and ControlNets act there, whichever ranks have their rows."""
        branches = self.branches.values()
        extras = [extra.is_at(sigma) for branch in branches for extra in branch.extras]
        return (*extras, *(use.is_at(sigma) for branch in branches for use in branch.prompt.controls))

    def _note(self, step: int, tensors: Sequence[Tensor]) -> None:
        """Sums, in which NaN and infinity stay. They stay on the device: to look at one would stop the host."""
        self.sums += [(step, x.sum()) for x in tensors]

    def first_bad_step(self, out: Tensor) -> int | None:
        """The step at which it began, of a result on the CPU that holds NaN or infinity."""
        if not self.sums or torch.isfinite(out.sum()):
            return None
        finite = torch.stack([total for _, total in self.sums]).isfinite().tolist()
        return min((step for (step, _), fine in zip(self.sums, finite, strict=True) if not fine), default=None)

    def on_step(self, report: StepReport) -> None:
        self.steps += 1
        self._note(report.index, [report.denoised])
        may_be_last = report.index == report.total - 1 or self.body.spec.sampler in SAMPLERS_OF_OWN_STEPS
        shown = self.body.preview == "all" or (self.body.preview == "last" and may_be_last)
        tensors = [report.x, report.denoised] if shown else []
        self.messages.tell(StepDone(report.index, report.total), tensors)
        if self.pipeline is None or report.index < self.pipeline.first_step:  # after that, it asks by itself
            self.job.check_cancelled()


def run_sample(
    body: Sample,
    tensors: list[Tensor],
    job: Job,
    resident: Callable[[], tuple[Predictor, Swap]],
    control_nets: ControlNets,
    extras: Extras,
) -> tuple[Result, list[Tensor]]:
    """The sampled latent and what it cost; with `trace`, all ranks' timeline after it.

    Args:
        resident: the model with this job's patches on its weights, or the error that it isn't held.
    Raises: BackendError: on every rank alike.
    """
    start = time.perf_counter()
    run = job.control.agreed(lambda: _prepare(body, tensors, job, control_nets, extras, *resident()))
    predictor, kept, device = run.predictor, run.kept, run.latent.device
    counted = predictor.mesh.counted
    kept.timeline = Timeline([axis.traffic for axis in counted], device) if body.trace else None
    before = [(axis.traffic.sent_bytes, axis.traffic.waited) for axis in counted]
    timed = device.type == "cpu" or kept.timeline is not None  # see Traffic
    job.check_cancelled()
    held = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    try:
        run.start()
        with nullcontext() if kept.timeline is None else kept.timeline:
            out = sample_latent(
                run.outputs,
                body.spec,
                _parameterization(predictor, body.spec),
                latent=run.latent,
                branches=list(run.branches),
                mask=None if body.mask is None else tensors[body.mask],
                noise=None if body.noise is None else tensors[body.noise].float(),
                sigmas=None if body.sigmas is None else tensors[body.sigmas],
                batch_index=body.batch_index,
                noise_dtype=tensors[body.latent].dtype,
                share=job.control.share,
                on_schedule=run.foresee,
                on_step=run.on_step,
                pipeline=run.pipeline,
            )
    except BackendError:
        kept.close()  # all ranks are here together; after any other error they may not be, and waiting could hang
        raise
    kept_bytes = run.nbytes()
    kept.close()
    if _sigma_count(body, tensors) == 0:
        out = tensors[body.latent].float()
    else:
        out = predictor.kind.to_vae(out).cpu()  # which waits for the device
    run.messages.finish()
    costs = [
        AxisCost(axis.name, axis.traffic.sent_bytes - sent, axis.traffic.waited - waited if timed else None)
        for axis, (sent, waited) in zip(counted, before, strict=True)
        if axis.degree > 1 and (axis is not predictor.mesh.everyone or axis.traffic.sent_bytes > sent)
    ]
    peak = torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else None
    notes, caches = predictor.take_notes()[:MOST_NOTES], kept.caches
    if caches is not None and job.control.rank == 0:
        notes.append(caches.note())
    ranks = job.control.gather(RankCost(costs, kept_bytes, peak, notes, [] if caches is None else caches.reused()))
    timeline = [] if kept.timeline is None else [with_ranks(job.control.gather_rows(kept.timeline.table()))]
    result = Result(time.perf_counter() - start, run.steps, ranks, run.swap, run.first_bad_step(out))
    return result, [out, *timeline]


def _prepare(
    body: Sample,
    tensors: list[Tensor],
    job: Job,
    control_nets: ControlNets,
    extras: Extras,
    predictor: Predictor,
    swap: Swap,
) -> SampleJob:
    """Raises: BackendError: an input that can't be honoured."""
    spec, latent = body.spec, tensors[body.latent].float()
    wanted = prompts_of(body)
    for prompt in wanted.values():
        predictor.check_latent(latent, tensors[prompt.context].shape[1])
    if body.batch_index and body.noise is None and latent.shape[0] == 1:
        latent = latent.repeat(len(body.batch_index), 1, 1, 1)
    rows = latent.shape[0]
    known: dict[ControlUse, Any] = {}
    prompts: dict[BranchName, Prompt] = {}
    for name, p in wanted.items():
        prompt_of_rows = predictor.prompt(tensors[p.context], tensors[p.pooled], rows, p.sizes)
        concat = predictor.concat(None if p.concat is None else tensors[p.concat], latent)
        controls = control_nets.uses(p.controls, tensors, predictor, latent, known, is_patched=bool(body.patches.files))
        prompts[name] = replace(prompt_of_rows, concat=concat, controls=controls)
    size = (latent.shape[2], latent.shape[3])
    branches = branches_of(body, prompts, lambda asked, of: extras.read(asked, tensors, predictor, size, of))
    check_extras(branches, rows, predictor.mesh.dp.degree)
    steps = _sigma_count(body, tensors) - 1
    acting = list({id(extra): extra for branch in branches.values() for extra in branch.extras}.values())
    kept = _kept(predictor, spec, steps, latent.shape[2], has_controls=bool(known), extras=acting)
    kept.caches = _caches(predictor, spec, list(branches.values()), acting)
    latent = latent.to(predictor.device)
    if torch.count_nonzero(latent) > 0:
        latent = predictor.kind.to_model(latent)
    return SampleJob(body, job, predictor, branches, latent, kept, swap)


def _sigma_count(body: Sample, tensors: list[Tensor]) -> int:
    """How many the run goes through, or a few less; 0 leaves the latent as it is."""
    if body.sigmas is not None:
        return tensors[body.sigmas].numel()
    return 0 if body.spec.denoise == 0 else body.spec.steps + 1


def _kept(
    predictor: Predictor, spec: SamplerSpec, steps: int, height: int, *, has_controls: bool, extras: Sequence[Extra]
) -> Kept:
    """What the job keeps between its evaluations.

    Args:
        height: of the latent.
        has_controls: ControlNets are added to it.
        extras: act inside it.
    Raises: ConfigError, UnsupportedError: displaced steps that can't be had.
    """
    displaced, stages = spec.first_displaced is not None and spec.first_displaced < steps, predictor.spec.pp
    if spec.num_patches and (stages == 1 or spec.first_displaced is None):
        raise ConfigError(
            f"num_patches={spec.num_patches} is for displaced steps on pp ranks; here is {predictor.spec.describe()}.",
            "Set displaced, and pp in Mesh Config; or leave num_patches at 0.",
        )
    if displaced and stages > 1 and spec.sampler not in SAMPLERS_OF_PATCHES:
        raise UnsupportedError(
            f"Sampler {spec.sampler} can't run on patches of an image that are at different steps.",
            f"Leave displaced off, or use one of: {', '.join(SAMPLERS_OF_PATCHES)}.",
        )
    if displaced and stages > 1:
        _refuse_guidance_of_whole_images(spec)
    if displaced and spec.weaker is not None:
        raise UnsupportedError(
            "Displaced steps can't evaluate a weaker model, of which there is nothing yet that could be stale.",
            "Leave displaced off, or the guidance away from it out.",
        )
    if displaced and stages > 1 and has_controls:
        raise UnsupportedError(
            "ControlNets in the ranks can't run on patches of an image that are at different steps.",
            "Leave displaced off, or set ring in place of pp in Mesh Config.",
        )
    of_others = [extra.name for extra in extras if stages > 1 or not extra.by_token or extra.comes_and_goes]
    if displaced and of_others:
        raise UnsupportedError(
            f"Displaced steps can't honour {', '.join(of_others)}, which needs what other ranks have now.",
            "Leave displaced off, or remove what is named here.",
        )
    return predictor.network.new_job(displaced, spec.num_patches or min(stages, predictor.network.most_patches(height)))


def _refuse_guidance_of_whole_images(spec: SamplerSpec) -> None:
    """Raises: UnsupportedError: guidance that patches of an image can't have while they are at different steps."""
    for is_asked, needs, node in (
        (spec.rescale_cfg != 0, "rescale_cfg needs the spread", "RescaleCFG"),
        (spec.apg is not None, "APG needs the length of the guidance", "APG"),
        (spec.neg_scale is not None, "Perp-Neg needs sums", "Perp-Neg"),
    ):
        if is_asked:
            raise UnsupportedError(
                f"{needs} of the whole image, whose patches are at different steps.",
                f"Leave displaced off, or {node} out.",
            )


def _caches(
    predictor: Predictor, spec: SamplerSpec, branches: Sequence[Branch], extras: Sequence[Extra]
) -> StepCaches | None:
    """Raises: ConfigError, UnsupportedError: a step cache that this model doesn't know, or with what it can't be."""
    asked, network, mesh = spec.step_cache, predictor.network, predictor.mesh
    if asked is None:
        return None
    if asked.method == "auto":
        asked = msgspec.structs.replace(asked, method=network.step_caches[0])
    if asked.method not in network.step_caches:
        raise ConfigError(
            f"The step cache {asked.method} is not for {network.config.family}.",
            f"Use auto or {' or '.join(network.step_caches)}, or leave the step cache out.",
        )
    others = [extra.name for extra in extras if extra.between_blocks and asked.method == "deepcache"]
    others += ["Perp-Neg"] * (spec.neg_scale is not None) + ["guidance away from a weaker model"] * (
        spec.weaker is not None
    )
    if others:
        raise UnsupportedError(
            f"The step cache {asked.method} can't be honoured beside {', '.join(dict.fromkeys(others))}.",
            "Leave one of them out.",
        )
    own = own_branches(range(len(branches)), mesh.cfg)
    together = all(branch.is_like(branches[0]) for branch in branches)
    return StepCaches(asked, mesh.everyone, [0] if together else own, 1 if together else len(branches))


def _step(spec: SamplerSpec, index: int, kept: Kept, sigma: float) -> Step:
    fresh = spec.first_displaced is None or index < spec.first_displaced
    return Step(index, "sync" if fresh else "displaced", kept=kept, sigma=sigma)


def _parameterization(predictor: Predictor, spec: SamplerSpec) -> Parameterization:
    if spec.model_sampling is not None:
        return parameterization_of(spec.model_sampling)
    if predictor.kind.prediction == "flow":
        return Flow(spec.shift)
    config = predictor.network.config
    if config.edm is not None:
        return parameterization_of(config.edm)
    return Discrete("v_prediction" if config.v_prediction else "eps", zero_snr=config.zero_snr)
