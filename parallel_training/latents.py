"""What the tasks on latents share: where latents come from, and sheets of held-out captions."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from parallel_backend.config import SamplerSpec
from parallel_backend.demo.captions import word_ids
from parallel_backend.demo.drawing import draw
from parallel_backend.demo.scenes import held_out_scenes
from parallel_backend.sampling.image import sample_latent
from parallel_backend.sampling.parameterization import Parameterization

from .autoencoder import open_autoencoder
from .config import TrainSpec
from .data import LatentSource, hint_of, no_hints
from .sheets import tile

SHEET_STEPS, SHEET_GUIDANCE = 20, 3.0


class LatentTask:
    """A task whose model predicts something of a noised latent and a caption, and of a picture's edges where `wants_edges`.

    Args:
        noise: what it predicts, and the noise that it is trained on.
        scheduler: of the sheets.
    """

    wants_edges = False

    def __init__(self, spec: TrainSpec, device: torch.device, noise: Parameterization, scheduler: str) -> None:
        self.spec, self.device, self.noise, self.scheduler = spec, device, noise, scheduler
        self.autoencoder = open_autoencoder(Path(spec.autoencoder), spec.channels).to(device)

    def output(self, model: nn.Module, x: Tensor, timesteps: Tensor, words: Tensor, hints: Tensor) -> Tensor:
        """The model's output for captions given as word numbers, and for hints where `wants_edges`."""
        raise NotImplementedError

    def source(self, rank: int) -> LatentSource:
        return LatentSource(self.spec, rank, self._encode, with_edges=self.wants_edges)

    @torch.no_grad()
    def sheet(self, model: nn.Module) -> Image.Image:
        """Held-out captions, sampled with guidance."""
        scenes, size = held_out_scenes(16), self.spec.size
        words, side = torch.tensor([word_ids(scene) for scene in scenes]), size // 8
        drawn = [draw(scene, size, size, random.Random(0)) for scene in scenes] if self.wants_edges else []
        hints = torch.stack([hint_of(picture) for picture in drawn]) if drawn else no_hints(len(scenes))
        latents = sample_latent(
            lambda x, t, *_: [
                self.output(model, x, t.to(self.device).expand(len(x)), w, hints)
                for w in (words, torch.zeros_like(words))
            ],
            SamplerSpec(steps=SHEET_STEPS, cfg_scale=SHEET_GUIDANCE, seed=1, scheduler=self.scheduler),
            self.noise,
            latent=torch.zeros(len(words), self.spec.channels, side, side, device=self.device),
        )
        return tile(self.autoencoder.decode(latents).float().cpu(), 8)

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Tensor:
        return self.autoencoder.encode(images.to(self.device)).cpu()
