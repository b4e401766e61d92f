"""The main job with nothing downloaded: a small trained checkpoint, two CPU ranks, seen from all sides."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..client.backend import Backend
from ..client.remote import RemoteModel
from ..client.remote_control import ControlUse
from ..client.remote_vae import RemoteVAE
from ..rank.one_process import OneProcess
from .drawing import as_picture
from .edges import edges, hints, pictures_of
from .progress import each, progress
from .scenes import CAPTIONS, parse
from .trained import Trained

BACKEND = "demo"
GAP, LINE = 6, 14


def run_demo(trained: Trained, output: str, *, prompts: Sequence[str], size: int) -> None:
    """Draws the captions on two ranks, cold and warm, and in one process; compares; writes a contact sheet.

    A ControlNet gets the edges of a picture of each caption, which is drawn for it.

    Raises: InputError: a caption outside the demo's grammar, or a size that the model can't take. CheckpointError: as `Trained.path`.
    """
    captions = list(prompts) or list(CAPTIONS)
    drawn = pictures_of([parse(caption) for caption in captions], size)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, autoencoder, control = trained.path, trained.vae, trained.control_path
    print("1. A backend of two CPU ranks ...")
    with progress("   starting") as bar:
        backend = Backend(2, "cpu", BACKEND, waiting=lambda seconds, what: bar.refresh())
    try:
        model = backend.load_model(checkpoint, trained.mesh, "float32")
        vae = backend.load_vae(autoencoder, "float32")
        print(f"   {trained.mesh.describe()}; {model.family}, {sum(model.loaded.bytes_read) / 2**20:.0f} MiB read")
        net = trained.net(backend, model)

        def sampled(model: RemoteModel, number: int) -> Tensor:
            controls = [ControlUse(net, hints([drawn[number]]))] if net else []
            return trained.sample(model, [captions[number]], size, controls)

        every = range(len(captions))
        ours, seconds = _draw("2. On two ranks", every, lambda number: sampled(model, number))
        print(f"   {seconds / trained.spec.steps:.3f} s a step")
        again = backend.load_model(checkpoint, trained.mesh, "float32")
        warm, seconds = _draw("3. The first again", every[:1], lambda number: sampled(again, number))
        same = "bit-equal" if torch.equal(warm[0], ours[0]) else "NOT equal"
        print(f"   weights already resident: {sum(again.loaded.bytes_read)} bytes read; {same} to the first time")
        alone = OneProcess(checkpoint)
        name = alone.load_control(control) if control else ""

        def alone_sampled(number: int) -> Tensor:
            job = trained.job([captions[number]], size)
            return alone.sample(*job, trained.spec, {name: hints([drawn[number]])} if name else None)

        theirs, seconds = _draw("4. In one process", every, alone_sampled)
        difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))
        print(
            f"   {seconds / trained.spec.steps:.3f} s a step; largest relative difference of a latent {difference:.1e}"
        )
        sheet = folder / "demo.png"
        rows = [_decode(vae, ours), _decode(vae, theirs)]
        rows = [[edges(picture) for picture in drawn], *rows] if net else rows
        _contact_sheet(captions, rows).save(sheet)
        print(f"5. {'Edges, then two' if net else 'Two'} ranks above, one process below: {sheet}")
    finally:
        backend.stop()
    print("The backend was stopped. In daily use it stays up: see `parallel-mmdit serve` and `status`.")


def _draw(title: str, numbers: Sequence[int], sampled: Callable[[int], Tensor]) -> tuple[list[Tensor], float]:
    """The latents of the captions of those numbers, and the mean seconds of each."""
    start = time.perf_counter()
    latents = [sampled(number) for number in each(numbers, title)]
    return latents, (time.perf_counter() - start) / len(numbers)


def _decode(vae: RemoteVAE, latents: Sequence[Tensor]) -> list[Image.Image]:
    return [as_picture(vae.decode(latent)[0]) for latent in latents]


def _contact_sheet(captions: Sequence[str], rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """A column for each caption, which stands under its pictures, one of each row."""
    width, height = rows[-1][0].size
    lines, below = 5, len(rows) * (height + GAP) + GAP
    sheet = Image.new("RGB", (len(captions) * (width + GAP) + GAP, below + lines * LINE), "white")
    canvas = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        x = GAP + column * (width + GAP)
        for row, pictures in enumerate(rows):
            sheet.paste(pictures[column], (x, GAP + row * (height + GAP)))
        for line, words in enumerate(_wrapped(canvas, caption, width)):
            canvas.text((x, below + line * LINE), words, fill="black")
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
