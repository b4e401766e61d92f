"""What a training run is told; every check of it lives here."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Literal

import msgspec

from parallel_backend.errors import ConfigError

TASKS = ("autoencoder", "mmdit", "unet", "controlnet")
DTYPES = ("auto", "float32", "bfloat16")
# A resumed run may change these and no others: they don't touch what a step computes.
FREE_ON_RESUME = ("output", "until", "save_every", "sheet_every")


class TrainSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One run. `batch` is images per model rank and micro-step; a step is `accumulate` of these on every model rank.

    An autoencoder's images are crops of `crop` pixels a side; 0 mixes crops and whole pictures, with as many pixels as
    crops of 64. `initial` is the folder of a run whose weights this one starts from, `unet` that of the UNet that a ControlNet
    is for. `until`: ends and exports after so many of the steps, as if it were cut off there; 0 is all of them. `latent_noise`:
    what an autoencoder's decoder learns to bear on its latents, as a standard deviation, at most; it sets colours apart there,
    which a model of few channels needs.
    """

    task: Literal["autoencoder", "mmdit", "unet", "controlnet"]
    output: str
    steps: int
    batch: int = 32
    accumulate: int = 1
    learning_rate: float = 4e-4
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    ema_decay: float = 0.999
    prompt_dropout: float = 0.1
    size: int = 128
    channels: int = 16
    depth: int = 4
    seed: int = 0
    first_scenes: int = 512
    fresh_scenes: int = 4
    autoencoder: str = ""
    unet: str = ""
    initial: str = ""
    crop: int = 0
    latent_noise: float = 0.0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    until: int = 0
    save_every: int = 250
    sheet_every: int = 500

    def __post_init__(self) -> None:
        positive = ("steps", "batch", "accumulate", "depth", "first_scenes", "save_every", "sheet_every")
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not possible.", f"Give {name} of 1 or more.")
        if not 0 <= self.until <= self.steps:
            raise ConfigError(f"until={self.until} is not possible.", f"Give at most {self.steps}, or 0 for all steps.")
        if not 0 <= self.latent_noise <= 1:
            raise ConfigError(f"latent_noise={self.latent_noise} is not possible.", "Give 0 for none, to 1.")
        if self.crop < 0 or self.crop % 8 or self.crop > min(side for bucket in self.buckets for side in bucket):
            raise ConfigError(
                f"crop={self.crop} is not possible.", "Give a multiple of 8 within every picture, or 0 for mixed sizes."
            )
        if self.size < 64 or self.size % 32:
            raise ConfigError(f"size={self.size} is not possible.", "Give a multiple of 32 pixels, 64 or more.")
        if self.task != "autoencoder" and not self.autoencoder:
            raise ConfigError(
                f"The task {self.task} is trained on latents.", "Name the folder of a trained autoencoder."
            )
        if (self.task == "controlnet") != bool(self.unet):
            raise ConfigError(
                f"unet={self.unet!r} is not possible for the task {self.task}.",
                "A ControlNet needs the folder of a trained UNet; the other tasks take none.",
            )
        wanted = {"autoencoder": (4, 16), "mmdit": (16,), "unet": (4,), "controlnet": (4,)}[self.task]
        if self.channels not in wanted:
            raise ConfigError(
                f"channels={self.channels} is not possible for the task {self.task}.",
                "An MMDiT has latents of 16 channels, a UNet and its ControlNet of 4, an autoencoder either.",
            )

    @property
    def last(self) -> int:
        """The step after which the run ends."""
        return self.until or self.steps

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """(width, height) of square, wide and tall pictures of about as many pixels."""
        long, short = (round(self.size * factor / 32) * 32 for factor in (1.25, 0.75))
        return [(self.size, self.size), (long, short), (short, long)]

    def check_resume(self, saved: TrainSpec) -> None:
        """Raises: ConfigError: the saved run computes something else."""
        ours, theirs = (msgspec.structs.asdict(spec) for spec in (self, saved))
        changed = [name for name in ours if name not in FREE_ON_RESUME and ours[name] != theirs[name]]
        if changed:
            values = ", ".join(f"{name}: {theirs[name]} then, {ours[name]} now" for name in changed)
            raise ConfigError(f"The run to resume was another one ({values}).", "Use its values, or another folder.")


class Roles(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which ranks render and encode, and which ranks each of them feeds. Without a map every rank does both."""

    world_size: int
    feeds: dict[int, list[int]] = {}

    @classmethod
    def parse(cls, text: str, world_size: int) -> Roles:
        """From a map such as `{0: [1, 2, 3]}`; empty for none.

        Raises: ConfigError: not such a map, or one that leaves a rank out or names it twice.
        """
        if not text:
            return cls(world_size)
        like = "Write it like '{0: [1, 2, 3]}', each rank once."
        try:
            feeds = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise ConfigError(f"The loader map {text!r} can't be read.", like) from None
        if not isinstance(feeds, Mapping) or not all(isinstance(fed, list) and fed for fed in feeds.values()):
            raise ConfigError(f"The loader map {text!r} is no map from a rank to a list of ranks.", like)
        named = sorted([*feeds, *(rank for fed in feeds.values() for rank in fed)])
        if named != list(range(world_size)):
            raise ConfigError(f"The loader map names ranks {named}; the run has {list(range(world_size))}.", like)
        return cls(world_size, {int(loader): list(fed) for loader, fed in feeds.items()})

    @property
    def model_ranks(self) -> list[int]:
        return [rank for rank in range(self.world_size) if rank not in self.feeds]

    def loader_of(self, rank: int) -> int:
        """The rank whose batches `rank` trains on: itself where there are no loader ranks."""
        return next((loader for loader, fed in self.feeds.items() if rank in fed), rank)
