"""Figures about the small checkpoints that need no judge: what their pictures show, and how equal equal runs are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..client.backend import Backend
from ..client.remote import RemoteModel
from ..client.remote_control import ControlUse, RemoteControl
from ..client.remote_vae import RemoteVAE
from ..rank.one_process import OneProcess
from .command import BACKEND
from .drawing import as_picture
from .edges import hints, pictures_of
from .progress import each
from .scenes import Scene, held_out_scenes
from .score import label_colors, shows
from .trained import Trained

BATCH = 10
# Equal to the last bit of fp32 and beyond: more than 8-bit pictures can tell.
HIGHEST_PSNR = 150.0


def run_score(trained: Trained, *, count: int, size: int) -> None:
    """Prints the scores of a checkpoint and its autoencoder on held-out captions, and the PSNR of two ranks to one.

    With a ControlNet for edges, the pictures are drawn along those of the scenes' own, and it prints how far they agree with these.
    """
    scenes = held_out_scenes(count)
    truths = pictures_of(scenes, size)
    backend = Backend(2, "cpu", BACKEND)
    try:
        vae = backend.load_vae(trained.vae, "float32")
        restored = [_restored(vae, truth) for truth in each(truths, "reconstructing")]
        model = backend.load_model(trained.path, trained.mesh, "float32")
        net = trained.net(backend, model)
        sampled = sampled_pictures(trained, model, vae, scenes, size, "sampling", net)
        alone = vae.decode(_alone(trained, scenes[:BATCH], truths[:BATCH], size))
        psnrs = [psnr(a, b) for a, b in zip(sampled[:BATCH], alone, strict=True)]
        for name, pictures in (("reconstructions", restored), ("samples", sampled)):
            share = share_shown(pictures, scenes)
            print(f"{name}: {share:.0%} of {count} held-out captions are shown, at {size} x {size} pixels")
        if net:
            without = sampled_pictures(trained, model, vae, scenes, size, "without the ControlNet")
            shares = [agreement(pictures, truths) for pictures in (sampled, without)]
            print(f"pixels of the colour that the edges' picture has: {shares[0]:.1%}, without them {shares[1]:.1%}")
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
    net: RemoteControl | None = None,
    *,
    leave: bool = True,
    **changed: Any,
) -> list[Tensor]:
    """A picture (Y, X, 3) in 0..1 of each scene's caption, always from the same seeds.

    Args:
        net: draws them along the edges of `pictures_of` the scenes.
        leave: the bar stays.
        changed: of the checkpoint's own settings.
    """
    images: list[Tensor] = []
    drawn = pictures_of(scenes, size) if net else []
    for start in each(range(0, len(scenes), BATCH), title, leave=leave):
        captions = [scene.caption() for scene in scenes[start : start + BATCH]]
        controls = [ControlUse(net, hints(drawn[start : start + BATCH]))] if net else []
        changed["seed"] = trained.spec.seed + start
        images += list(vae.decode(trained.sample(model, captions, size, controls, **changed)))
    return images


def share_shown(images: Sequence[Tensor], scenes: Sequence[Scene]) -> float:
    """Of the pictures, those that show their scene."""
    return sum(shows(as_picture(image), scene) for image, scene in zip(images, scenes, strict=True)) / len(scenes)


def agreement(images: Sequence[Tensor], truths: Sequence[Image.Image]) -> float:
    """The share of the pictures' pixels that are of the truths' colours."""
    labels = [
        (label_colors(as_picture(image)), label_colors(truth)) for image, truth in zip(images, truths, strict=True)
    ]
    return float(np.mean([ours == theirs for ours, theirs in labels]))


def psnr(a: Tensor, b: Tensor) -> float:
    """In dB, of images in 0..1; 150 where they are equal."""
    error = float((a.double() - b.double()).square().mean())
    return min(HIGHEST_PSNR, -10 * math.log10(error)) if error else HIGHEST_PSNR


def _alone(trained: Trained, scenes: Sequence[Scene], truths: Sequence[Image.Image], size: int) -> Tensor:
    """The latents of the scenes, along the truths' edges where there is a ControlNet, by one process."""
    process, control = OneProcess(trained.path), trained.control_path
    along = {process.load_control(control): hints(truths)} if control else None
    return process.sample(*trained.job([scene.caption() for scene in scenes], size), trained.spec, along)


def _restored(vae: RemoteVAE, picture: Image.Image) -> Tensor:
    image = torch.from_numpy(np.array(picture, np.float32)) / 255
    return vae.decode(vae.encode(image[None]))[0]
