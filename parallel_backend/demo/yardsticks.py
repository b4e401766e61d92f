"""Figures about the small checkpoints that need no judge: what their pictures show, and how equal equal runs are."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..config import MeshSpec
from ..one_process import OneProcess
from ..rpc.client import Backend
from ..rpc.remote import Conditioning, RemoteModel, RemoteVAE
from .captions import encode
from .command import BACKEND, SPEC
from .drawing import as_picture, draw
from .files import MMDIT, TAESD3
from .scenes import Scene, held_out_scenes
from .score import shows

BATCH = 10
# Equal to the last bit of fp32 and beyond: more than 8-bit pictures can tell.
HIGHEST_PSNR = 150.0


def run_score(*, count: int, size: int) -> None:
    """Prints the scores of the autoencoder and the MMDiT on held-out captions, and the PSNR of two ranks to one."""
    scenes = held_out_scenes(count)
    backend = Backend.attach_or_start(2, "cpu", BACKEND)
    try:
        vae = backend.load_vae(TAESD3, "float32")
        restored = _reconstructions(vae, scenes, size)
        model = backend.load_model(MMDIT, MeshSpec(cfg=2), "float32")
        sampled = sampled_pictures(model, vae, scenes, size, "sampling")
        alone = vae.decode(OneProcess(MMDIT).sample(*_job(scenes[:BATCH], size), SPEC))
        psnrs = [psnr(a, b) for a, b in zip(sampled[:BATCH], alone, strict=True)]
        for name, pictures in (("reconstructions", restored), ("samples", sampled)):
            share = share_shown(pictures, scenes)
            print(f"{name}: {share:.0%} of {count} held-out captions are shown, at {size} x {size} pixels")
        print(f"two ranks against one process, same seeds: PSNR {min(psnrs):.1f} dB at least, of {len(psnrs)} pictures")
    finally:
        backend.stop()


def sampled_pictures(
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
    for start in tqdm(range(0, len(scenes), BATCH), desc=title, leave=leave):
        latent = model.sample(
            *_job(scenes[start : start + BATCH], size),
            seed=SPEC.seed + start,
            steps=SPEC.steps,
            cfg_scale=SPEC.cfg_scale,
            warmup_steps=warmup_steps,
        )
        images += list(vae.decode(latent))
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
    return [vae.decode(vae.encode(image[None]))[0] for image in tqdm(images, desc="reconstructing")]


def _job(scenes: Sequence[Scene], size: int) -> tuple[Tensor, Conditioning, Conditioning]:
    """The empty latent and both prompts of a batch."""
    prompt = Conditioning(*encode([scene.caption() for scene in scenes]))
    return torch.zeros(len(scenes), 16, size // 8, size // 8), prompt, Conditioning(*encode([""]))
