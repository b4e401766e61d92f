"""Figures about the small checkpoints that need no judge: what their pictures show, and how equal equal runs are."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..client.backend import Backend
from ..client.remote import RemoteModel
from ..client.remote_vae import RemoteVAE
from ..rank.one_process import OneProcess
from .command import BACKEND
from .drawing import as_picture, draw
from .progress import each
from .scenes import Scene, held_out_scenes
from .score import shows
from .trained import Trained

BATCH = 10
# Equal to the last bit of fp32 and beyond: more than 8-bit pictures can tell.
HIGHEST_PSNR = 150.0


def run_score(trained: Trained, *, count: int, size: int) -> None:
    """Prints the scores of a checkpoint and its autoencoder on held-out captions, and the PSNR of two ranks to one."""
    scenes = held_out_scenes(count)
    backend = Backend.attach_or_start(2, "cpu", BACKEND)
    try:
        vae = backend.load_vae(trained.vae, "float32")
        restored = _reconstructions(vae, scenes, size)
        model = backend.load_model(trained.path, trained.mesh, "float32")
        sampled = sampled_pictures(trained, model, vae, scenes, size, "sampling")
        job = trained.job([scene.caption() for scene in scenes[:BATCH]], size)
        alone = vae.decode(OneProcess(trained.path).sample(*job, trained.spec))
        psnrs = [psnr(a, b) for a, b in zip(sampled[:BATCH], alone, strict=True)]
        for name, pictures in (("reconstructions", restored), ("samples", sampled)):
            share = share_shown(pictures, scenes)
            print(f"{name}: {share:.0%} of {count} held-out captions are shown, at {size} x {size} pixels")
        print(f"two ranks against one process, same seeds: PSNR {min(psnrs):.1f} dB at least, of {len(psnrs)} pictures")
    finally:
        backend.stop()


def sampled_pictures(
    trained: Trained,
    model: RemoteModel,
    vae: RemoteVAE,
    scenes: Sequence[Scene],
    size: int,
    title: str,
    *,
    leave: bool = True,
    warmup_steps: int | None = None,
) -> list[Tensor]:
    """A picture (Y, X, 3) in 0..1 of each scene's caption, always from the same seeds; `leave`: the bar stays."""
    images: list[Tensor] = []
    for start in each(range(0, len(scenes), BATCH), title, leave=leave):
        captions = [scene.caption() for scene in scenes[start : start + BATCH]]
        seed = trained.spec.seed + start
        images += list(vae.decode(trained.sample(model, captions, size, seed=seed, warmup_steps=warmup_steps)))
    return images


def share_shown(images: Sequence[Tensor], scenes: Sequence[Scene]) -> float:
    """Of the pictures, those that show their scene."""
    return sum(shows(as_picture(image), scene) for image, scene in zip(images, scenes, strict=True)) / len(scenes)


def psnr(a: Tensor, b: Tensor) -> float:
    """In dB, of images in 0..1; 150 where they are equal."""
    error = float((a.double() - b.double()).square().mean())
    return min(HIGHEST_PSNR, -10 * math.log10(error)) if error else HIGHEST_PSNR


def _reconstructions(vae: RemoteVAE, scenes: list[Scene], size: int) -> list[Tensor]:
    rng = random.Random(1)
    images = [torch.from_numpy(np.array(draw(scene, size, size, rng), np.float32)) / 255 for scene in scenes]
    return [vae.decode(vae.encode(image[None]))[0] for image in each(images, "reconstructing")]
