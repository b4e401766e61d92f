"""The main job with nothing downloaded: a small trained checkpoint, two CPU ranks, seen from all sides."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..client.backend import Backend
from ..client.remote_vae import RemoteVAE
from ..rank.one_process import OneProcess
from .drawing import as_picture
from .progress import each, progress
from .scenes import CAPTIONS, parse
from .trained import Trained

BACKEND = "demo"
GAP, LINE = 6, 14


def run_demo(trained: Trained, output: str, *, prompts: Sequence[str], size: int) -> None:
    """Draws the captions on two ranks, cold and warm, and in one process; compares; writes a contact sheet.

    Raises: InputError: a caption outside the demo's grammar, or a size that the model can't take. CheckpointError: as `Trained.path`.
    """
    captions = list(prompts) or list(CAPTIONS)
    for caption in captions:
        parse(caption)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, autoencoder = trained.path, trained.vae
    print("1. A backend of two CPU ranks ...")
    with progress("   starting") as bar:
        backend = Backend.attach_or_start(2, "cpu", BACKEND, waiting=lambda seconds: bar.refresh())
    try:
        model = backend.load_model(checkpoint, trained.mesh, "float32")
        vae = backend.load_vae(autoencoder, "float32")
        print(f"   {trained.mesh.describe()}; {model.family}, {sum(model.loaded.bytes_read) / 2**20:.0f} MiB read")
        ours, seconds = _draw("2. On two ranks", captions, lambda caption: trained.sample(model, [caption], size))
        print(f"   {seconds / trained.spec.steps:.3f} s a step")
        again = backend.load_model(checkpoint, trained.mesh, "float32")
        warm, seconds = _draw(
            "3. The first again", captions[:1], lambda caption: trained.sample(again, [caption], size)
        )
        same = "bit-equal" if torch.equal(warm[0], ours[0]) else "NOT equal"
        print(f"   weights already resident: {sum(again.loaded.bytes_read)} bytes read; {same} to the first time")
        alone = OneProcess(checkpoint)
        theirs, seconds = _draw(
            "4. In one process", captions, lambda caption: alone.sample(*trained.job([caption], size), trained.spec)
        )
        difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))
        print(
            f"   {seconds / trained.spec.steps:.3f} s a step; largest relative difference of a latent {difference:.1e}"
        )
        sheet = folder / "demo.png"
        _contact_sheet(captions, _decode(vae, ours), _decode(vae, theirs)).save(sheet)
        print(f"5. Two ranks above, one process below: {sheet}")
    finally:
        backend.stop()
    print("The backend was stopped. In daily use it stays up: see `parallel-mmdit serve` and `status`.")


def _draw(title: str, captions: Sequence[str], sampled: Callable[[str], Tensor]) -> tuple[list[Tensor], float]:
    """The latents, and the mean seconds of each."""
    start = time.perf_counter()
    latents = [sampled(caption) for caption in each(captions, title)]
    return latents, (time.perf_counter() - start) / len(captions)


def _decode(vae: RemoteVAE, latents: Sequence[Tensor]) -> list[Image.Image]:
    return [as_picture(vae.decode(latent)[0]) for latent in latents]


def _contact_sheet(captions: Sequence[str], above: Sequence[Image.Image], below: Sequence[Image.Image]) -> Image.Image:
    """A column for each caption, which stands under its two pictures."""
    width, height = above[0].size
    lines = 5
    sheet = Image.new("RGB", (len(captions) * (width + GAP) + GAP, 2 * (height + GAP) + GAP + lines * LINE), "white")
    canvas = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        x = GAP + column * (width + GAP)
        sheet.paste(above[column], (x, GAP))
        sheet.paste(below[column], (x, 2 * GAP + height))
        for line, words in enumerate(_wrapped(canvas, caption, width)):
            canvas.text((x, 3 * GAP + 2 * height + line * LINE), words, fill="black")
    return sheet


def _wrapped(canvas: ImageDraw.ImageDraw, text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if canvas.textlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
