"""Plain, frozen settings and their checks: what a mesh is, what a sampling run is. They travel as they are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from math import inf, isfinite, prod
from typing import Literal, TypeAlias, get_args

import msgspec

from .command_line import command_line
from .errors import ConfigError
from .guidance_spec import APG, AwayFromWeaker, check_neg_scale

AXES = ("dp", "cfg", "pp", "patch", "ring", "ulysses", "tp")
# Which axes the two kinds of model know, and which of them takes the ranks that nothing else was said of.
MMDIT_AXES, MMDIT_REST = ("dp", "cfg", "pp", "ring", "ulysses", "tp"), "ulysses"
UNET_AXES, UNET_REST = ("dp", "cfg", "patch"), "patch"
DTYPES = ("float32", "float16", "bfloat16")
# How a rank holds weights of half-precision files, where not in the dtype that it computes in: e4m3 with a scale for each row; or
# every tensor cast to that type, as ComfyUI's weight_dtype casts it.
FP8, CAST_TO = "fp8", ("float8_e4m3fn", "float8_e5m2")
WEIGHTS = (FP8, *CAST_TO)
CELL = 8  # pixels of a latent's cell, each way
# Of a dtype: what suits the file on the cards of all ranks.
AUTO = "auto"
KERNELS = ("auto", "native", "flash", "flash3", "sage", "cudnn", "efficient")
DeviceType = Literal["cuda", "cpu"]
DEFAULT_IDLE_SECONDS = 1800
LONGEST_IDLE_SECONDS = 1e8

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


def choose(value: str, allowed: tuple[str, ...], what: str) -> str:
    """`value`, which is one of `allowed`, or a ConfigError that lists them."""
    if value not in allowed:
        raise ConfigError(f"{what} {value!r} is not known.", f"Choose one of: {', '.join(allowed)}.")
    return value


def check_positive(name: str, value: float, usual: str) -> None:
    """Raises ConfigError unless it is a finite number above 0."""
    if not (isfinite(value) and value > 0):
        raise ConfigError(f"{name}={value} is not possible.", f"Use a positive number; {usual}.")


class MeshSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the ranks of a backend share one model: a degree for each axis, outermost axis first.

    `order` is the nesting of the axes in rank numbers, outermost first; ranks of the innermost axis are
    neighbours. It matters only for which links an axis uses, never for the result. `sliced`: of a UNet's weights each rank
    of cfg and patch holds a slice, and gathers a block's when it needs them.
    """

    dp: int = 1
    cfg: int = 1
    pp: int = 1
    patch: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1
    order: tuple[str, ...] = AXES
    sliced: bool = False

    def __post_init__(self) -> None:
        for axis in AXES:
            degree = getattr(self, axis)
            if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
                raise ConfigError(f"{axis}={degree!r} is not a degree.", "Give a whole number of 1 or more.")
        if self.cfg > 2:
            raise ConfigError(
                f"cfg={self.cfg} is not possible: guidance has two branches, cond and uncond.", "Use cfg=1 or cfg=2."
            )
        if sorted(self.order) != sorted(AXES):
            raise ConfigError(f"order={self.order} does not name each axis once.", f"Use an order of {AXES}.")

    @property
    def degrees(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def axes(self) -> dict[str, int]:
        """Those of more than one rank, outermost first."""
        return {axis: getattr(self, axis) for axis in self.order if getattr(self, axis) > 1}

    @property
    def world_size(self) -> int:
        return prod(self.degrees.values())

    def check_world(self, world_size: int) -> None:
        """Raises ConfigError unless dp*cfg*pp*patch*ring*ulysses*tp == world_size."""
        if self.world_size != world_size:
            terms = " * ".join(f"{axis}={degree}" for axis, degree in self.degrees.items())
            raise ConfigError(
                f"{terms} = {self.world_size}, but the backend has {world_size} ranks.",
                f"Choose degrees whose product is {world_size}, or a backend of {self.world_size} ranks.",
            )

    def coordinates(self, rank: int) -> dict[str, int]:
        """The position of `rank` on every axis."""
        position = {}
        for axis in reversed(self.order):
            rank, position[axis] = divmod(rank, getattr(self, axis))
        return position

    def groups(self, *axes: str) -> list[list[int]]:
        """The ranks that talk to each other along an axis, or several, one list per group, each in axis order."""
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            position = self.coordinates(rank)
            found.setdefault(tuple(position[a] for a in AXES if a not in axes), []).append(rank)
        return sorted(found.values())

    def describe(self) -> str:
        named = [f"{axis}={degree}" for axis, degree in self.degrees.items() if degree > 1]
        return " ".join([*named, *(["sliced"] if self.sliced else [])]) or "one rank"

    @classmethod
    def from_axes(
        cls,
        cfg: tuple[int, int],
        sp: tuple[int, int],
        tp: tuple[int, int],
        *,
        mesh_shape: tuple[int, int],
        sp_method: Literal["ring", "ulysses"] = "ring",
    ) -> MeshSpec:
        """The form `((cfg_factor, cfg_axis), (sp_factor, sp_axis), (tp_factor, tp_axis))` on a named mesh shape.

        Ranks are numbered along the rows of `mesh_shape`. Where factors share a mesh axis, cfg is outermost and
        tp innermost. Source: the parallel config of tt-metal's SD3.5 Large.
        """
        if sp_method not in ("ring", "ulysses"):
            raise ConfigError(f"sp_method {sp_method!r} is not known.", "Use 'ring' or 'ulysses'.")
        parts = {"cfg": cfg, sp_method: sp, "tp": tp}
        for name, (_, mesh_axis) in parts.items():
            if mesh_axis not in (0, 1):
                raise ConfigError(
                    f"{name} is put on axis {mesh_axis} of a {mesh_shape[0]}x{mesh_shape[1]} mesh.",
                    "Use axis 0 (rows) or 1 (columns).",
                )
        for mesh_axis, size in enumerate(mesh_shape):
            factors = {name: factor for name, (factor, at) in parts.items() if at == mesh_axis}
            if prod(factors.values()) != size:
                terms = " * ".join(f"{n}={f}" for n, f in factors.items()) or "no factor"
                raise ConfigError(
                    f"{terms} does not fill axis {mesh_axis} of the {mesh_shape[0]}x{mesh_shape[1]} mesh, which has {size}.",
                    "The factors on a mesh axis multiply to its size.",
                )
        nesting = [name for mesh_axis in (0, 1) for name, (_, at) in parts.items() if at == mesh_axis]
        order = tuple([axis for axis in AXES if axis not in nesting] + nesting)
        return cls(order=order, **{name: factor for name, (factor, _) in parts.items()})  # type: ignore[arg-type]

    def check_axes(self, axes: Sequence[str], what: str) -> None:
        """Raises ConfigError where a degree above 1 is of an axis that the model has no use for, or slices are."""
        if self.sliced and axes != UNET_AXES:
            raise ConfigError(
                f"sliced is for UNets; {what} spreads its weights otherwise.", "Use tp or pp in its place."
            )
        for axis, degree in self.degrees.items():
            if degree > 1 and axis not in axes:
                raise ConfigError(
                    f"{axis}={degree} can't be used on {what}: its axes are {', '.join(axes)}.",
                    f"Set {axis} to 1, and raise one of these in its place.",
                )

    @classmethod
    def filled(cls, world_size: int, rest: str = MMDIT_REST, *, sliced: bool = False, **degrees: int) -> MeshSpec:
        """The mesh of these degrees, where 0 leaves one open: cfg is 2 where that fits, `rest` takes what is left, dp is 1.

        Raises: ConfigError: the degrees don't fit `world_size` ranks.
        """
        given = {axis: degree for axis, degree in degrees.items() if degree}
        left = world_size // max(1, prod(given.values()))
        if degrees.get("cfg") == 0:
            given["cfg"] = 2 if left and left % 2 == 0 else 1
            left //= given["cfg"]
        if rest not in given:
            given[rest] = max(1, left)
        mesh = cls(sliced=sliced, **given)  # type: ignore[arg-type]
        mesh.check_world(world_size)
        return mesh

    @classmethod
    def exact_default(cls, world_size: int, rest: str = MMDIT_REST) -> MeshSpec:
        """cfg 2 where it fits, the rest ulysses, or bands for a UNet: what mesh_choice takes where it has no figures."""
        return cls.filled(world_size, rest, cfg=0)

    @classmethod
    def all_of(cls, world_size: int, axes: Sequence[str] = MMDIT_AXES) -> list[MeshSpec]:
        """Every mesh of `world_size` ranks on `axes`, in a fixed order; tests and benchmarks go through it."""
        divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
        combos = (dict(zip(axes, degrees, strict=True)) for degrees in product(divisors, repeat=len(axes)))
        return [cls(**c) for c in combos if prod(c.values()) == world_size and c["cfg"] <= 2]  # type: ignore[arg-type]


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
    changes of the first block's input add up to little. UNets: `deepcache`, all but the outermost level in one of `interval`.
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
    prompts, in which the negative one has this weight. `apg` and `weaker`: see guidance_spec. `differential`: a mask's values say
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


def gpu_numbers(text: str) -> tuple[int, ...]:
    """CUDA ordinals, as a person writes them: 0,1,3. Raises: ConfigError: something else."""
    try:
        return tuple(int(part) for part in text.replace(" ", "").split(",") if part)
    except ValueError:
        raise ConfigError(
            f"devices {text!r} is not a list of GPU numbers.", "Write it like 0,1,3 or leave it empty."
        ) from None


class BackendSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which backend is meant, and how it is started when none of that name runs.

    `devices` lists CUDA ordinals, one per rank; empty means 0, 1, ... in order. With an `address` (tcp://host:port) it is
    one that runs elsewhere, is never started from here, and lets in who has its `keys` (a folder); a world_size of 0 then
    takes any.
    """

    name: str = "default"
    world_size: int = 2
    device: DeviceType = "cpu"
    devices: tuple[int, ...] = ()
    idle_seconds: float = DEFAULT_IDLE_SECONDS
    memory_budget: int = 0
    address: str = ""
    keys: str = ""

    def __post_init__(self) -> None:
        if self.address and not (self.address.startswith("tcp://") and self.address.rpartition(":")[2].isdigit()):
            raise ConfigError(f"Address {self.address!r} can't be used.", "Write it like tcp://host:5555.")
        if self.address and not self.keys:
            raise ConfigError(
                f"{self.address} can't be used without keys.",
                f"Name the folder that `{command_line('keys', 'FOLDER')}` has made.",
            )
        if not self.name or not all(c.isalnum() or c in "-_." for c in self.name) or self.name.startswith("."):
            raise ConfigError(f"Backend name {self.name!r} can't be used.", "Use letters, digits, '-', '_' and '.'.")
        choose(self.device, get_args(DeviceType), "Device")
        if self.world_size < (0 if self.address else 1):
            raise ConfigError(f"world_size={self.world_size} is not possible.", "Use one rank or more.")
        if self.devices and self.device == "cpu":
            raise ConfigError(
                f"devices={','.join(map(str, self.devices))} name GPUs, but the ranks are to run on the CPU.",
                "Leave devices empty, or use device 'cuda'.",
            )
        if self.devices and len(self.devices) != self.world_size:
            raise ConfigError(
                f"{len(self.devices)} devices are named for {self.world_size} ranks.", "Name one device per rank."
            )
        if not 0 < self.idle_seconds <= LONGEST_IDLE_SECONDS:
            raise ConfigError(
                f"idle_seconds={self.idle_seconds} is not possible.", f"Use up to {LONGEST_IDLE_SECONDS:.0f} seconds."
            )
        if self.memory_budget < 0:
            raise ConfigError(f"memory_budget={self.memory_budget} is not possible.", "Use bytes per rank, 0 for none.")


class Hosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A backend's part on this host, of several: `index` 0 is where rank 0 and its socket are, at `rendezvous` (host:port)."""

    count: int = 1
    index: int = 0
    rendezvous: str = ""
    interface: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ConfigError(f"Host {self.index} of {self.count} is not possible.", "Count hosts from 0.")
        if self.count > 1 and not self.rendezvous.rpartition(":")[2].isdigit():
            raise ConfigError(
                f"rendezvous {self.rendezvous!r} can't be used.",
                "Give host 0's address and a free port: 10.0.0.1:29500.",
            )


class ServeSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What only `serve` can set: who may reach the backend, and which files it opens for them.

    `models`: folders below which files are opened; none is any file. `listen`: a tcp:// address beside the local socket, for
    those who have `keys`. `metrics_port`: of the Prometheus page on loopback; 0 is none.
    """

    models: tuple[str, ...] = ()
    listen: str = ""
    keys: str = ""
    metrics_port: int = 0
    hosts: Hosts = Hosts()

    def __post_init__(self) -> None:
        if self.listen and not self.keys:
            raise ConfigError(
                f"{self.listen} is not listened on without keys.", f"Make some with `{command_line('keys', 'FOLDER')}`."
            )
        if self.listen and not re.fullmatch(r"tcp://[^/\s]+:\d+", self.listen):
            raise ConfigError(f"listen {self.listen!r} can't be used.", "Write it like tcp://0.0.0.0:5555.")
        if self.listen and not self.models:
            raise ConfigError(
                "Whoever has the keys could have any file opened.", "Name the model folders with --models."
            )
