"""`parallel-mmdit bench`: its figures and their options. Each is imported when it is asked for."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from ..config import MeshSpec
from ..demo.trained import UNET, add_choice, chosen, trained_in
from ..errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benches = parser.add_subparsers(required=True, metavar="FIGURE")
    quality = benches.add_parser("quality", help="what displaced steps cost, by ranks and warm-up steps")
    quality.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    quality.add_argument("--warmups", type=int, nargs="+", default=[0, 1, 2, 4])
    quality.add_argument("--steps", type=int, default=20)
    quality.add_argument("--size", type=int, default=128, help="pixels")
    of = quality.add_mutually_exclusive_group()
    of.add_argument("--model", type=Path, help="an SDXL UNet, on a random prompt, in place of the demo's")
    of.add_argument("--trained", type=Path, metavar="FOLDER", help="of `train unet`: its UNet, on a caption")
    quality.set_defaults(run=_quality)

    communication = benches.add_parser("communication", help="bytes that each method sends, beside its formula")
    communication.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    communication.add_argument("--size", type=int, default=256, help="pixels")
    communication.add_argument("--depth", type=int, default=4, help="blocks")
    communication.set_defaults(run=_communication)

    pictures = benches.add_parser(
        "pictures", help="what displaced steps, or step caches, do to the demo's pictures: PSNR and score"
    )
    add_choice(pictures)
    pictures.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    pictures.add_argument("--warmups", type=int, nargs="+", default=[0, 1, 2, 4])
    pictures.add_argument("--count", type=int, default=20, help="captions")
    pictures.add_argument("--size", type=int, default=128, help="pixels")
    pictures.add_argument(
        "--step-caches",
        type=float,
        nargs="+",
        metavar="VALUE",
        help="step caches in place of displaced steps: thresholds, of a UNet intervals",
    )
    pictures.add_argument("--plot", type=Path, help="a PNG of it")
    pictures.set_defaults(run=_pictures)

    weights = benches.add_parser("weights", help="what weights held in fp8 do to the demo's pictures: PSNR and score")
    add_choice(weights)
    weights.add_argument("--count", type=int, default=20, help="captions")
    weights.add_argument("--size", type=int, default=128, help="pixels")
    weights.set_defaults(run=_weights)

    faults = benches.add_parser("faults", help="kills, stops, fills and removes; prints what a user sees of it")
    faults.add_argument("--only", action="append", default=[], metavar="FAULT", help="repeatable")
    faults.set_defaults(run=_faults)

    soak = benches.add_parser("soak", help="clients that come and go; prints what is left of them in the end")
    soak.add_argument("--minutes", type=float, default=2.0)
    soak.add_argument("--clients", type=int, default=3)
    soak.set_defaults(run=_soak)

    swap = benches.add_parser("swap", help="a LoRA on, changed, off: seconds, and bytes read of the model's file")
    swap.add_argument("--model", type=Path, help="SD3 or SD3.5; a small one with random weights where left out")
    swap.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    swap.add_argument("--rank", type=int, default=32, help="of the LoRA")
    swap.add_argument("--rounds", type=int, default=5)
    swap.add_argument("--depth", type=int, default=12, help="blocks of the small model")
    swap.set_defaults(run=_swap)
    _predict_arguments(
        benches.add_parser("predict", help="seconds of a step on 1, 2, 4, 8 GPUs by mesh, from one device")
    )
    _trace_arguments(benches.add_parser("trace", help="a job rank by rank: a picture, a Chrome trace, waits and bytes"))


def _trace_arguments(trace: argparse.ArgumentParser) -> None:
    trace.add_argument("--mesh", nargs="+", default=["pp=2"], metavar="AXIS=DEGREE")
    trace.add_argument("--steps", type=int, default=6)
    trace.add_argument("--warmup-steps", type=int, default=1, help="exact steps; as many as steps for none displaced")
    trace.add_argument("--num-patches", type=int, default=0, help="that flow through stages; 0 is one a stage")
    trace.add_argument("--size", type=int, default=512, help="pixels")
    trace.add_argument("--depth", type=int, default=8, help="blocks of the small model")
    trace.add_argument("--model", type=Path, help="an MMDiT; a small one with random weights where left out")
    trace.add_argument("--output", type=Path, default=Path("trace"), help="folder")
    trace.set_defaults(run=_trace)


def _predict_arguments(predict: argparse.ArgumentParser) -> None:
    of = predict.add_mutually_exclusive_group()
    of.add_argument("--model", type=Path, help="in place of random weights")
    of.add_argument("--layout", default="sd3.5-large", help="sd3.5-large, sd3.5-medium or sdxl; small ones on a CPU")
    predict.add_argument("--size", type=int, help="pixels; 1024 on a GPU, 256 on a CPU where left out")
    predict.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8])
    predict.add_argument("--mesh", nargs="+", default=[], metavar="AXIS=DEGREE", help="this one beside one rank alone")
    predict.add_argument("--link", help="nvlink4, nvlink3, pcie5, pcie4, 100gbe, loopback or measured")
    predict.add_argument("--device", choices=("cuda", "cpu"))
    predict.add_argument("--dtype", help="bfloat16 on a GPU, float32 on a CPU where left out")
    predict.add_argument("--displaced", action="store_true", help="displaced steps too, of meshes that have them")
    predict.add_argument("--graphs", action="store_true", help="each evaluation as one CUDA graph")
    predict.add_argument(
        "--check", action="store_true", help="beside what two CPU ranks take; 1 where they are 15 %% apart"
    )
    predict.add_argument("--rounds", type=int, default=3, help="of which the medians are taken")
    predict.add_argument(
        "--patience", type=float, default=0.0, help="seconds to wait for others to leave --check the cores"
    )
    predict.add_argument(
        "--write-defaults", type=Path, metavar="FILE", help="the fastest meshes into a file of default meshes"
    )
    predict.add_argument("--figures", choices=("h100",), help="those of a machine that was measured, not of this one")
    predict.set_defaults(run=partial(_predict, predict))


# What `bench predict` takes where it does something else than to predict this machine's steps.
_TAKES = {"figures": {"figures", "write_defaults"}, "check": {"check", "size", "rounds", "patience"}}


def _refuse_unused(predict: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Raises: ConfigError: an option that would change nothing."""
    mode = next((mode for mode in _TAKES if getattr(args, mode)), None)
    unused = vars(args).keys() - {"run"} - _TAKES[mode] if mode else {"patience"}
    given = sorted(name for name in unused if getattr(args, name) != predict.get_default(name))
    if given:
        what = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        beside = f"--{mode}" if mode else "a prediction without --check"
        raise ConfigError(f"{beside} makes nothing of {what}.", "Leave it out.")


def _predict(predict: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    _refuse_unused(predict, args)
    import torch

    from .predict import Asked, run_predict
    from .predict_check import run_check
    from .trace import mesh_of

    if args.figures:
        from ..mesh_choice.tables import write
        from .h100_figures import printed, tables

        print(printed(tables()))
        if args.write_defaults is not None:
            write(args.write_defaults, tables())
        return 0
    if args.check:
        return 0 if run_check(args.size or 256, args.rounds, args.patience) else 1
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device == "cuda"
    meshes = [MeshSpec(), mesh_of(args.mesh)] if args.mesh else []
    dtype, size = args.dtype or ("bfloat16" if on_gpu else "float32"), args.size or (1024 if on_gpu else 256)
    asked = Asked(args.layout, args.model, device, dtype, size, args.gpus, meshes, args.displaced, args.graphs)
    run_predict(asked, args.link or ("nvlink4" if on_gpu else "loopback"), args.rounds, args.write_defaults)
    return 0


def _quality(args: argparse.Namespace) -> int:
    from .quality import of_checkpoint, of_trained, run_quality

    if args.model:
        subject = of_checkpoint(args.model)
    else:
        subject = of_trained(trained_in(args.trained) if args.trained else UNET, args.size)
    run_quality(subject, args.ranks, args.warmups, args.steps, args.size)
    return 0


def _communication(args: argparse.Namespace) -> int:
    from .communication import run_communication

    run_communication(args.ranks, args.size, args.depth)
    return 0


def _pictures(args: argparse.Namespace) -> int:
    from .pictures import run_pictures, run_step_caches

    if args.step_caches:
        run_step_caches(chosen(args), args.step_caches, args.count, args.size)
        return 0
    run_pictures(chosen(args), args.ranks, args.warmups, args.count, args.size, args.plot)
    return 0


def _weights(args: argparse.Namespace) -> int:
    from .weights import run_weights

    run_weights(chosen(args), args.count, args.size)
    return 0


def _faults(args: argparse.Namespace) -> int:
    from .faults import print_faults

    return 0 if print_faults(args.only) else 1


def _soak(args: argparse.Namespace) -> int:
    from .soak import print_soak

    return 0 if print_soak(args.minutes, args.clients) else 1


def _swap(args: argparse.Namespace) -> int:
    from .swap import run_swap

    run_swap(args.model, args.tp, args.rank, args.rounds, args.depth)
    return 0


def _trace(args: argparse.Namespace) -> int:
    from .trace import mesh_of, run_trace

    warmup = args.warmup_steps if args.warmup_steps < args.steps else None
    settings = {"steps": args.steps, "warmup_steps": warmup, "num_patches": args.num_patches}
    run_trace(mesh_of(args.mesh), settings, args.size, args.depth, args.model, args.output)
    return 0
