"""What a sampling run is, and their checks. These travel as they are."""

from __future__ import annotations

from math import inf, isfinite
from typing import Literal, TypeAlias

import msgspec

from ..errors import ConfigError
from .choices import check_positive, choose
from .guidance import APG, AwayFromWeaker, check_neg_scale

SAMPLERS = (
    "euler",
    "euler_ancestral",
    "euler_stochastic",
    "heun",
    "heunpp2",
    "exp_heun_2_x0",
    "exp_heun_2_x0_sde",
    "dpm_2",
    "dpm_2_ancestral",
    "lms",
    "dpm_fast",
    "dpm_adaptive",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2m_sde_heun",
    "dpmpp_3m_sde",
    "ddpm",
    "lcm",
    "ipndm",
    "deis",
    "res_multistep",
    "res_multistep_ancestral",
    "gradient_estimation",
    "er_sde",
    "seeds_2",
    "seeds_3",
    "sa_solver",
    "sa_solver_pece",
    "ddim",
    "uni_pc",
    "uni_pc_bh2",
)
# Those whose step takes one evaluation and computes every value of the latent from its own alone: parts of an image can
# be at different steps. If they draw noise, they do from the first step on; sa_solver doesn't.
SAMPLERS_OF_PATCHES = (
    *("euler", "euler_ancestral", "euler_stochastic", "lms", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2m_sde_heun"),
    *("dpmpp_3m_sde", "ddpm", "lcm", "ipndm", "deis", "res_multistep", "res_multistep_ancestral"),
    *("gradient_estimation", "er_sde", "ddim"),
)
# Those that make other steps than their schedule has, so that none of them can be told to be the last.
SAMPLERS_OF_OWN_STEPS = ("dpm_fast", "dpm_adaptive")
# Those that begin at a little less than sigma 1 of a flow model, where the log of signal to noise is infinite.
SAMPLERS_BELOW_ONE = (
    *("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde", "er_sde", "seeds_2", "seeds_3"),
    *("exp_heun_2_x0", "exp_heun_2_x0_sde", "sa_solver", "sa_solver_pece"),
)
SCHEDULERS = (
    "simple",
    "sgm_uniform",
    "normal",
    "karras",
    "exponential",
    "ddim_uniform",
    "beta",
    "linear_quadratic",
    "kl_optimal",
)

# Evaluations that guidance asks for: of the positive, the negative and the empty prompt, and the weaker model's of the positive.
BranchName: TypeAlias = Literal["cond", "uncond", "empty", "weaker"]

# What a model's output is, on the schedules of Stable Diffusion's 1000 timesteps and of a range of sigmas.
DISCRETE_PREDICTIONS = ("eps", "v_prediction", "lcm", "x0", "img_to_img")
CONTINUOUS_PREDICTIONS = ("eps", "v_prediction", "edm")


class FlowSampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """The model gives noise - latent; its times are shifted by `shift` and told to it times `multiplier`.

    `sigmas`: how many the discrete schedules choose from.
    """

    shift: float = 3.0
    multiplier: float = 1000.0
    sigmas: int = 1000

    def __post_init__(self) -> None:
        check_positive("shift", self.shift, "SD3.5 uses 3")
        check_positive("multiplier", self.multiplier, "SD3.5 uses 1000")
        if not 2 <= self.sigmas <= 100_000:
            raise ConfigError(f"A flow of {self.sigmas} sigmas is not possible.", "Use 1000, or 10000 as Flux does.")


class DiscreteSampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Stable Diffusion's 1000 timesteps, of which `lcm` knows every 20th. See DISCRETE_PREDICTIONS."""

    prediction: str = "eps"
    zero_snr: bool = False

    def __post_init__(self) -> None:
        choose(self.prediction, DISCRETE_PREDICTIONS, "Prediction")


class ContinuousSampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Any sigma of a range; `times` says how the model is told it: a quarter of its logarithm, or its arc tangent."""

    prediction: str = "eps"
    times: Literal["log", "arctan"] = "log"
    sigma_min: float = 0.002
    sigma_max: float = 120.0
    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        choose(self.prediction, CONTINUOUS_PREDICTIONS, "Prediction")
        check_positive("sigma_min", self.sigma_min, "0.002 is usual")
        check_positive("sigma_data", self.sigma_data, "1 is usual")
        if not (isfinite(self.sigma_max) and self.sigma_max > self.sigma_min):
            raise ConfigError(
                f"sigma_max={self.sigma_max} is not possible with sigma_min={self.sigma_min}.",
                "Use a larger sigma_max.",
            )


ModelSampling: TypeAlias = FlowSampling | DiscreteSampling | ContinuousSampling


# "auto" is the first that the model knows.
STEP_CACHES = ("auto", "first_block", "teacache", "deepcache")


class StepCache(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which evaluations take most of their work from an earlier one. See distributed/step_cache.py.

    Transformers: `first_block` where the first block adds nearly what it added in the last computed evaluation, `teacache` while the
    changes of the first block's input add up to little. UNets: `deepcache`, all but the outermost blocks in one of `interval`.
    `auto`: first_block of transformers, deepcache of UNets.

    `threshold`: the relative change (L1) below which the two of transformers reuse; 0 never does. `first_steps`, `last_steps`: that
    are computed in any case.
    """

    method: str = "auto"
    threshold: float = 0.1
    interval: int = 2
    first_steps: int = 4
    last_steps: int = 1

    def __post_init__(self) -> None:
        choose(self.method, STEP_CACHES, "Step cache")
        if not 0.0 <= self.threshold < inf:
            raise ConfigError(f"threshold={self.threshold} is not possible.", "Use 0, which reuses nothing, or more.")
        if self.interval < 1:
            raise ConfigError(f"interval={self.interval} is not possible.", "Use 1, which reuses nothing, or more.")
        for name in ("first_steps", "last_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} is not possible.", "Use 0 or more.")


class SamplerSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What KSampler's widgets say. `denoise` below 1 keeps the end of a longer schedule, at 0 no step of it.

    With `warmup_steps`, ranks compute the steps after so many on what the others had a step ago; None is exact. On pp
    ranks, `num_patches` parts of the image then flow through the stages; 0 is as many as stages.

    `rescale_cfg`: how far guidance is brought back to the spread of cond, 0 to 1. `neg_scale`: guidance is Perp-Neg, of three
    prompts, in which the negative one has this weight. `apg` and `weaker`: see `guidance.py`. `differential`: a mask's values say
    when they begin to change, at this strength; None leaves the mask as it is.

    `model_sampling`: what nodes that change it say of the model's output and its sigmas; None is as the file says, with
    `shift` where that is a flow. `step_cache`: None computes every evaluation whole.
    """

    sampler: str = "euler"
    scheduler: str = "simple"
    steps: int = 20
    cfg_scale: float = 4.5
    denoise: float = 1.0
    seed: int = 0
    shift: float = 3.0
    warmup_steps: int | None = None
    num_patches: int = 0
    model_sampling: ModelSampling | None = None
    rescale_cfg: float = 0.0
    differential: float | None = None
    apg: APG | None = None
    neg_scale: float | None = None
    weaker: AwayFromWeaker | None = None
    step_cache: StepCache | None = None

    def __post_init__(self) -> None:
        choose(self.sampler, SAMPLERS, "Sampler")
        choose(self.scheduler, SCHEDULERS, "Scheduler")
        if not 1 <= self.steps <= 10_000:
            raise ConfigError(f"steps={self.steps} is not possible.", "Use 1 to 10000 steps.")
        if not 0.0 <= self.denoise <= 1.0:
            raise ConfigError(f"denoise={self.denoise} is not possible.", "Use 0 to 1; 0 leaves the latent as it is.")
        if not isfinite(self.cfg_scale):
            raise ConfigError(f"cfg_scale={self.cfg_scale} is not a number.", "Use a finite number; 1 is no guidance.")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed={self.seed} does not fit in 64 bits.", "Use 0 to 18446744073709551615.")
        check_positive("shift", self.shift, "SD3.5 uses 3")
        for name, share in (("rescale_cfg", self.rescale_cfg), ("differential", self.differential or 0.0)):
            if not 0.0 <= share <= 1.0:
                raise ConfigError(f"{name}={share} is not possible.", "Use 0 to 1.")
        check_neg_scale(self.neg_scale)
        if self.neg_scale is not None and self.rescale_cfg:
            raise ConfigError(
                f"rescale_cfg={self.rescale_cfg} rescales guidance of two prompts; Perp-Neg has three.",
                "Leave out one of the two.",
            )
        if self.apg is not None and self.cfg_scale == 0:
            raise ConfigError("cfg_scale=0 is not possible with APG, which divides by it.", "Use another cfg_scale.")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ConfigError(f"warmup_steps={self.warmup_steps} is not possible.", "Use 0 or more; 4 is usual.")
        if self.num_patches < 0:
            raise ConfigError(f"num_patches={self.num_patches} is not possible.", "Use 0 for one a stage, or more.")
        if self.step_cache is not None:
            self._check_beside_cache(self.step_cache)

    def _check_beside_cache(self, cache: StepCache) -> None:
        if self.warmup_steps is not None:
            raise ConfigError(
                f"Displaced steps and a step cache ({cache.method}) can't be combined.",
                "Leave the Step Cache node out; or have exact steps: method exact in Mesh Config, displaced off on Parallel "
                "Sampler, no Displaced Steps node.",
            )
        if self.sampler in SAMPLERS_OF_OWN_STEPS:
            raise ConfigError(
                f"Sampler {self.sampler} chooses its own steps, of which a step cache ({cache.method}) can't tell the last.",
                "Leave the step cache out, or use another sampler.",
            )

    @property
    def first_displaced(self) -> int | None:
        """The first displaced step; None for an exact run. The first step of all has nothing yet to go on."""
        return None if self.warmup_steps is None else max(1, self.warmup_steps)
