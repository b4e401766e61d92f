"""Figures about the small checkpoints that need no judge: what their pictures show, and how equal equal runs are."""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..config import MeshSpec
from ..one_process import OneProcess
from ..rpc.client import Backend
from ..rpc.remote import Conditioning, RemoteVAE
from .captions import encode
from .command import BACKEND, SPEC
from .drawing import draw
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
        none = Conditioning(*encode([""]))
        sampled: list[Tensor] = []
        psnrs: list[float] = []
        for start in tqdm(range(0, count, BATCH), desc="sampling"):
            prompt = Conditioning(*encode([scene.caption() for scene in scenes[start : start + BATCH]]))
            latent = torch.zeros(prompt.context.shape[0], 16, size // 8, size // 8)
            settings = {"steps": SPEC.steps, "cfg_scale": SPEC.cfg_scale}
            images = vae.decode(model.sample(latent, prompt, none, seed=SPEC.seed + start, **settings))  # type: ignore[arg-type]
            sampled += list(images)
            if start == 0:
                alone = vae.decode(OneProcess(MMDIT).sample(latent, prompt, none, SPEC))
                psnrs = [psnr(a, b) for a, b in zip(images, alone, strict=True)]
        for name, pictures in (("reconstructions", restored), ("samples", sampled)):
            share = sum(shows(_picture(image), scene) for image, scene in zip(pictures, scenes, strict=True)) / count
            print(f"{name}: {share:.0%} of {count} held-out captions are shown, at {size} x {size} pixels")
        print(f"two ranks against one process, same seeds: PSNR {min(psnrs):.1f} dB at least, of {len(psnrs)} pictures")
    finally:
        backend.stop()


def psnr(a: Tensor, b: Tensor) -> float:
    """In dB, of images in 0..1; 150 where they are equal."""
    error = float((a.double() - b.double()).square().mean())
    return min(HIGHEST_PSNR, -10 * math.log10(error)) if error else HIGHEST_PSNR


def _reconstructions(vae: RemoteVAE, scenes: list[Scene], size: int) -> list[Tensor]:
    rng = random.Random(1)
    images = [torch.from_numpy(np.array(draw(scene, size, size, rng), np.float32)) / 255 for scene in scenes]
    return [vae.decode(vae.encode(image[None]))[0] for image in tqdm(images, desc="reconstructing")]


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().to(torch.uint8).numpy())
