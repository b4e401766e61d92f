"""`parallel-mmdit run`: the checkpoint is loaded on the mesh that `auto` takes, and draws a prompt."""

from __future__ import annotations

import argparse
import random
import re
from pathlib import Path
from typing import Any

from ..checkpoint_files.hub import SUFFIXES
from ..client.backend import Backend
from ..client.names import DEFAULT
from ..client.remote import RemoteModel, Step
from ..config import AUTO, SAMPLERS, SCHEDULERS, gpu_numbers
from ..demo.captions import Captions
from ..demo.files import DemoFile, demo_of
from ..demo.progress import progress
from ..demo.trained import MMDIT, UNET, Trained
from ..errors import InputError
from ..rpc.messages import Progress
from ..version import __version__
from .files import save, target

_SIZE = re.compile(r"(\d+)(?:x(\d+))?")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="of SD3, SD3.5 or SDXL: a file, a pipeline's folder, a hub name that was downloaded; or parallel_demo/mmdit.safetensors",
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--negative", metavar="TEXT", help="what not to draw")
    parser.add_argument("--size", metavar="WxH", help="pixels, or N for a square; the model's own where left out")
    parser.add_argument("--steps", type=int, help="28 for SD3, 50 for SDXL, where left out")
    parser.add_argument("--cfg", type=float, help="guidance: 7 for SD3, 5 for SDXL, where left out")
    parser.add_argument("--seed", type=int, help="a new one where left out; it is printed")
    parser.add_argument("--count", type=int, default=1, help="pictures of the prompt, in one batch")
    parser.add_argument(
        "--sampler", choices=SAMPLERS, metavar="NAME", help="ComfyUI's; the pipeline's own where left out"
    )
    parser.add_argument("--scheduler", choices=SCHEDULERS, metavar="NAME", help="ComfyUI's; as --sampler")
    parser.add_argument(
        "--text-encoder",
        action="append",
        metavar="PATH",
        help="CLIP-L, bigG or T5, a file or folder; repeatable; those of the checkpoint where left out",
    )
    parser.add_argument("--tokenizer", action="append", default=[], metavar="FOLDER", help="repeatable")
    parser.add_argument("--vae", metavar="PATH", help="the checkpoint's own where left out")
    parser.add_argument("--dtype", default=AUTO)
    parser.add_argument("--output", default=".", metavar="PATH", help="a .png file or a folder; nothing is overwritten")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draws, and prints the mesh, the seconds a step and, last, each picture's path. Ctrl-C ends the job, not the backend."""
    height, width = _size(args.size)
    demo = _demo(args.checkpoint)
    first = target(args.output, _name(args.checkpoint))
    seed = random.randrange(2**32) if args.seed is None else args.seed
    settings = {
        "negative_prompt": args.negative,
        "num_inference_steps": args.steps,
        "guidance_scale": args.cfg,
        "num_images_per_prompt": args.count,
        "sampler": args.sampler,
        "scheduler": args.scheduler,
        "seed": seed,
    }
    with progress("Backend") as bar:

        def waiting(_: float, what: str) -> None:
            bar.set_description(f"Backend: {what}")

        name, devices = args.name or DEFAULT, gpu_numbers(args.devices)
        backend = Backend(args.world_size, args.device, name, devices=devices, waiting=waiting)
    with backend:
        model = _loaded(backend, demo, args)
        mesh = next(held.mesh for held in backend.status().models if held.model == model.name)
        print(f"{args.checkpoint}: {mesh}, {model.load.dtype}, {backend.world_size} ranks; seed {seed}")
        drawn = _drawn(model, args.prompt, height=height, width=width, **settings)
        texts = {
            "prompt": args.prompt,
            "checkpoint": _name(args.checkpoint),
            "mesh": mesh,
            "software": f"parallel-mmdit {__version__}",
        }
        texts |= {name: str(value) for name, value in settings.items() if value is not None}
        for picture in drawn:
            print(save(picture, first, texts))
    return 0


def _size(text: str | None) -> tuple[int | None, int | None]:
    """Height and width. Raises: InputError: not WxH, not N."""
    if text is None:
        return None, None
    match = _SIZE.fullmatch(text)
    if match is None:
        raise InputError(f"--size {text} is no size.", "Give WxH, such as 1216x832, or N for a square.")
    return int(match[2] or match[1]), int(match[1])


def _name(checkpoint: str) -> str:
    """For people: where a file lies, which a picture would carry along, is nobody's business."""
    path = Path(checkpoint)
    return path.stem if path.suffix in SUFFIXES else path.name


def _demo(checkpoint: str) -> Trained | None:
    """Which of the demo's checkpoints it is, by its path or by its name in loaders; their prompts need no text encoder."""
    for trained in (MMDIT, UNET):
        file = trained.checkpoint
        if isinstance(file, DemoFile) and (checkpoint == file.listed or demo_of(Path(checkpoint).absolute()) == file):
            return trained
    return None


def _loaded(backend: Backend, demo: Trained | None, args: argparse.Namespace) -> RemoteModel:
    path: str | Path = args.checkpoint
    parts: dict[str, Any] = {"text_encoders": args.text_encoder, "vae": args.vae, "tokenizers": args.tokenizer}
    if demo is not None:
        path = demo.path
        parts["text_encoders"] = args.text_encoder or Captions(demo.widths)
        parts["vae"] = args.vae or demo.vae
    with progress(f"Loading {Path(args.checkpoint).name}") as bar:

        def show(event: Any, _: object) -> None:
            if isinstance(event, Progress) and event.total > 1:
                bar.bar_format, bar.unit_scale = None, True
                bar.total, bar.n = event.total, event.done
            bar.refresh()

        return backend.load_model(path, dtype=args.dtype, **parts, on_event=show)


def _drawn(model: RemoteModel, prompt: str, **settings: Any) -> list[Any]:
    """The pictures; prints what a step took."""
    with progress("Drawing") as bar:
        bar.set_description("Drawing: reads the prompt")

        def show(step: Step) -> None:
            if not step.index:  # what came before is no part of a step's time
                bar.bar_format = None
                bar.reset(step.total)
                bar.set_description("Drawing")
            bar.update()

        pictures = model.generate(prompt, **settings, on_step=show).images
    assert model.last is not None
    print(f"{model.last.seconds / model.last.steps:.3f} s a step, {model.last.steps} steps")
    return pictures
