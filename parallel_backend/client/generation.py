"""A prompt to pictures, with the arguments and the defaults of diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..config import CELL, SAMPLERS, SAMPLERS_OF_OWN_STEPS, choose
from ..errors import ConfigError, InputError, UnsupportedError
from ..rpc.conditioning import Conditioning
from ..text_encoders.protocol import TextEncoders
from .families import Family
from .schedule import Schedule, comfyui_schedule, diffusers_schedule

if TYPE_CHECKING:
    from .remote import RemoteModel, Step

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
OutputType = Literal["pil", "np", "pt", "latent"]
StepEnd: TypeAlias = Callable[[Any, int, Tensor, dict[str, Tensor]], Mapping[str, Any] | None]
Generators: TypeAlias = torch.Generator | Sequence[torch.Generator]


@dataclass(frozen=True)
class Generated:
    """`images`: a list of PIL images; (B, Y, X, 3) of numpy, or (B, 3, Y, X), in 0..1; or latents as the model sees them."""

    images: Any


def generate(
    model: RemoteModel,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None = None,
    *,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    num_images_per_prompt: int = 1,
    generator: Generators | None = None,
    seed: int | None = None,
    latents: Tensor | None = None,
    output_type: OutputType = "pil",
    callback_on_step_end: StepEnd | None = None,
    sampler: str | None = None,
    scheduler: str | None = None,
    warmup_steps: int | None = None,
    on_step: Callable[[Step], None] | None = None,
    should_cancel: Callable[[], bool] | None = None,
) -> Generated:
    """Pictures of the prompts: those of diffusers' StableDiffusion3Pipeline or StableDiffusionXLPipeline, on the backend's ranks.

    Args:
        height, width: in pixels; the model's own where left out, as are steps and guidance (SD3: 28 and 7, SDXL: 50 and 5).
        guidance_scale: 1 or less computes no negative branch.
        generator: on the CPU, one or one for each picture; draws the noise in fp32. Without it, and without `seed`, torch's own.
        latents: noise in its place, (B, C, height / 8, width / 8).
        output_type: latent is as the model sees it, for a next pipeline: (B, C, Y, X), fp32.
        callback_on_step_end: called (model, step, timestep, {"latents": ...}) as soon as the next step has begun. What it raises
            cancels the job. It can watch, not change.
        sampler, scheduler: ComfyUI's names; left out, the pipeline's own Euler steps and sigmas.
        warmup_steps, on_step: see `sample`.
    Raises: CheckpointError, ConfigError, InputError, UnsupportedError: before anything is computed. And as `sample`.
    """
    parts = model.parts
    if parts is None:
        raise ConfigError("This model was loaded without its pipeline.", "Load it by Backend.load_model.")
    choose(output_type, OUTPUT_TYPES, "output_type")
    sampler = choose(sampler or "euler", SAMPLERS, "Sampler")
    if callback_on_step_end is not None and sampler in SAMPLERS_OF_OWN_STEPS:
        raise UnsupportedError(f"Sampler {sampler} makes steps of its own.", "Leave callback_on_step_end out.")
    family = parts.family(model.family)
    encoders = parts.encoders(family)
    size = _size(family, *(parts.default_size if side is None else side for side in (height, width)))
    steps = _whole("num_inference_steps", family.steps if num_inference_steps is None else num_inference_steps)
    schedule = _schedule(family, sampler, scheduler, steps)
    guidance = family.guidance_scale if guidance_scale is None else guidance_scale
    prompts, negatives = _texts(prompt, negative_prompt)
    count = len(prompts) * _whole("num_images_per_prompt", num_images_per_prompt)
    noise, step_seed = _noise((count, family.channels, *(side // CELL for side in size)), generator, seed, latents)
    # Now, and not when all is sampled: it may be none, or find no room.
    vae = None if output_type == "latent" else parts.vae()
    encoded = _encoded(encoders, model, [*prompts, *(negatives if guidance > 1 else [])])
    rows = _rows(len(prompts), len(negatives) if guidance > 1 else 0, num_images_per_prompt)
    ends = _StepEnds(model, schedule, callback_on_step_end, on_step)
    latent = model.sample(
        torch.zeros_like(noise),
        *(_conditioning(encoded, of, family, size) for of in rows),
        seed=step_seed,
        steps=steps,
        cfg_scale=max(float(guidance), 1.0),
        sampler=sampler,
        warmup_steps=warmup_steps,
        noise=noise * schedule.noise_factor,
        sigmas=schedule.sigmas,
        model_sampling=schedule.model_sampling,
        preview="none" if callback_on_step_end is None else "all",
        on_step=ends.begun,
        should_cancel=should_cancel,
    )
    ends.done(family.to_model(latent))
    if vae is None:
        return Generated(family.to_model(latent))
    return Generated(_pictures(output_type, vae.decode(latent, should_cancel=should_cancel)))


def _schedule(family: Family, sampler: str, scheduler: str | None, steps: int) -> Schedule:
    if scheduler is None:
        return diffusers_schedule(family.scheduler, steps)
    return comfyui_schedule(family.scheduler, sampler, scheduler, steps)


def _whole(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}={value!r} is not possible.", "Give a whole number of 1 or more.")
    return value


def _size(family: Family, height: int, width: int) -> tuple[int, int]:
    """Raises: ConfigError: a side that the model's cells don't divide."""
    for name, side in (("height", height), ("width", width)):
        if _whole(name, side) % family.cell:
            below = side // family.cell * family.cell
            near = [f"{value}" for value in (below, below + family.cell) if value]
            raise ConfigError(f"{name}={side} is no multiple of {family.cell}.", f"Use {' or '.join(near)}.")
    return height, width


def _texts(
    prompt: str | Sequence[str], negative: str | Sequence[str] | None
) -> tuple[list[str | None], list[str | None]]:
    """Prompts, and as many negative ones, or one that is all prompts'. Raises: InputError: they don't pair."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    negatives = [negative] if negative is None or isinstance(negative, str) else list(negative)
    if not prompts:
        raise InputError("No prompt was given.", "Give a text, or a list of texts.")
    if len(negatives) not in (1, len(prompts)):
        raise InputError(
            f"{len(negatives)} negative prompts came with {len(prompts)} prompts.", "Give one for all, or one for each."
        )
    return [*prompts], [*negatives]


def _noise(
    shape: tuple[int, ...], generator: Generators | None, seed: int | None, latents: Tensor | None
) -> tuple[Tensor, int]:
    """Of variance 1, as diffusers draws it; and the seed of what samplers add between steps."""
    if generator is not None and seed is not None:
        raise ConfigError("Both generator and seed were given.", "Give one of them.")
    if seed is not None:
        if not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ConfigError(f"seed={seed!r} is not possible.", "Give a whole number from 0 to 2**64 - 1.")
        generator = torch.Generator().manual_seed(seed)
    each = [] if generator is None else [generator] if isinstance(generator, torch.Generator) else [*generator]
    if any(one.device.type != "cpu" for one in each):
        raise UnsupportedError(
            "A generator of a GPU was given.", "Use torch.Generator('cpu'), whose numbers are the same anywhere."
        )
    if not isinstance(generator, torch.Generator) and len(each) not in (0, shape[0]):
        raise InputError(f"{len(each)} generators came for {shape[0]} pictures.", "Give one, or one for each.")
    if latents is not None:
        if latents.shape != shape:
            raise InputError(f"latents of shape {list(latents.shape)} came; these pictures need {list(shape)}.")
        noise = latents.detach().float().cpu()
    elif len(each) > 1:
        noise = torch.cat([torch.randn(1, *shape[1:], generator=one) for one in each])
    else:
        noise = torch.randn(shape, generator=each[0] if each else None)
    # Taken of the noise, so that no more is drawn from a generator than diffusers draws.
    return noise, int(noise.flatten()[:1].view(torch.int32)) % 2**32 if seed is None else seed


def _encoded(encoders: TextEncoders, model: RemoteModel, texts: list[str | None]) -> tuple[Tensor, Tensor]:
    """All in one batch, so that encoders are brought to a GPU once; in the model's dtype, where its ranks are if that is here."""
    on_gpu = model.backend.record.device == "cuda" and torch.cuda.is_available()
    return encoders.encode(texts, torch.device("cuda" if on_gpu else "cpu"), getattr(torch, model.load.dtype))


def _rows(prompts: int, negatives: int, of_each: int) -> list[list[int]]:
    """Which encoded texts are the pictures' prompts and negative ones; one that is for all stands once."""

    def rows(count: int, first: int) -> list[int]:
        return [first + number for number in range(count) for _ in range(1 if count == 1 else of_each)]

    return [rows(prompts, 0), *([rows(negatives, prompts)] if negatives else [])]


def _conditioning(
    encoded: tuple[Tensor, Tensor], rows: list[int], family: Family, size: tuple[int, int]
) -> Conditioning:
    """SDXL is told of a picture that was as large as it is to be, and is not cropped, as diffusers tells it."""
    context, pooled = (tensor[rows] for tensor in encoded)
    return Conditioning(context, pooled, (*size, 0, 0, *size) if family.name == "SDXL" else None)


class _StepEnds:
    """Tells of a step's end when the next one begins, with the latents that it begins with."""

    def __init__(
        self,
        model: RemoteModel,
        schedule: Schedule,
        tell: StepEnd | None,
        on_step: Callable[[Step], None] | None,
    ) -> None:
        self._model, self._timesteps, self._tell, self._on_step = model, schedule.timesteps, tell, on_step

    def begun(self, step: Step) -> None:
        if self._on_step is not None:
            self._on_step(step)
        if step.index > 0 and step.x is not None:
            self._ended(step.index - 1, step.x)

    def done(self, latents: Tensor) -> None:
        self._ended(len(self._timesteps) - 1, latents)

    def _ended(self, index: int, latents: Tensor) -> None:
        """Raises: UnsupportedError: other latents came back, or these were written to."""
        if self._tell is None:
            return
        version = latents._version
        answer = self._tell(self._model, index, self._timesteps[index], {"latents": latents}) or {}
        changed = [name for name, value in answer.items() if value is not latents]
        if changed or latents._version != version:
            raise UnsupportedError(
                f"callback_on_step_end has changed {', '.join(changed) or 'latents'}: the ranks have their own.",
                "Let it watch alone; inputs that change between steps need a sampler in the backend.",
            )


def _pictures(output_type: str, image_BYXC: Tensor) -> Any:
    if output_type == "pt":
        return image_BYXC.permute(0, 3, 1, 2).contiguous()
    if output_type == "np":
        return image_BYXC.numpy()
    from PIL import Image

    return [Image.fromarray(picture) for picture in (image_BYXC * 255).round().to(torch.uint8).numpy()]
