"""Mesh Config's inputs, in the order in which the editor shows them: what everyone sets, the axes, the ranks' work, where they are."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..parallel_backend.client.names import DEFAULT
from ..parallel_backend.config import AUTO, DEFAULT_IDLE_SECONDS, DTYPES, FP8, KERNELS
from .hung.displaced_steps import USUAL_WARMUP
from .known_to_core import ADVANCED

EXACT, DISPLACED = "exact", "displaced"


def mesh_inputs() -> list[Any]:
    """All are optional but the first: prompts that know less of them run."""
    return [*_of_everyone(), *_axes(), *_work(), *_connection()]


def _of_everyone() -> list[Any]:
    return [
        io.Int.Input(
            "ranks",
            display_name="ranks (0: auto)",
            default=0,
            min=0,
            max=256,
            tooltip="Processes, one per GPU. 0: all GPUs of the best one's kind, or 2 on a CPU.",
        ),
        io.Combo.Input(
            "method",
            options=[EXACT, DISPLACED],
            default=EXACT,
            optional=True,
            tooltip="exact: the picture of a single GPU. displaced: after warmup_steps exact steps, ranks go on with what the others "
            "had a step ago: faster on slow links, and not exact. Displaced Steps and Parallel Sampler's displaced go first.",
        ),
        io.Combo.Input(
            "dtype",
            options=[AUTO, *DTYPES, FP8],
            default=AUTO,
            optional=True,
            tooltip="auto: ComfyUI's own choice for the weakest of the GPUs: float16 on most. float32 on a CPU. fp8: auto, with "
            "the model's weights in half the memory, each row scaled; a file that is quantised stays as it is.",
        ),
    ]


def _axes() -> list[Any]:
    return [
        io.Int.Input(
            "warmup_steps",
            default=USUAL_WARMUP,
            min=0,
            max=10000,
            optional=True,
            tooltip="Method displaced: exact steps before displaced ones. More: nearer to exact, and slower.",
            **ADVANCED,
        ),
        _degree(
            "cfg",
            0,
            2,
            "2: cond and uncond on different ranks, the cheapest split. 0: 2 where it fits. No gain at cfg 1.",
        ),
        _degree("ulysses", 0, 64, "MMDiT: tokens over ranks, exchanged for heads in attention. 0: whatever is left."),
        _degree(
            "ring",
            1,
            64,
            "MMDiT: tokens over ranks, keys and values sent round a ring. For slow links or long sequences.",
        ),
        _degree(
            "tp", 1, 64, "MMDiT: weights over ranks: each holds 1/tp of the model. For models that don't fit one GPU."
        ),
        _degree(
            "pp",
            1,
            64,
            "MMDiT: blocks over ranks, in stages: each holds 1/pp of the model and sends least of all. "
            "Faster than one GPU only with displaced steps (PipeFusion).",
        ),
        _degree("patch", 0, 64, "UNet: horizontal bands of the image over ranks. 0: whatever is left."),
        _switch(
            "sliced",
            "UNet: each rank holds a slice of the weights and gathers a block's when it computes. For models "
            "that don't fit one GPU; MMDiTs have tp and pp for that.",
        ),
        _degree(
            "dp",
            0,
            64,
            "The batch over ranks, for batches of several images. 0: 1; but where no degree is set, the ranks "
            "that a single image is not faster with.",
        ),
    ]


def _degree(axis: str, default: int, most: int, tooltip: str) -> Any:
    """`default` 0 leaves it open, and is its minimum."""
    return io.Int.Input(axis, default=default, min=default, max=most, optional=True, tooltip=tooltip, **ADVANCED)


def _work() -> list[Any]:
    return [
        io.Combo.Input(
            "device",
            options=["auto", "cuda", "cpu"],
            default="auto",
            optional=True,
            tooltip="auto: GPUs where there are any.",
            **ADVANCED,
        ),
        io.String.Input(
            "devices",
            default="",
            optional=True,
            tooltip="GPU numbers, one per rank, such as 0,1,3. Empty: those of the best one's kind.",
            **ADVANCED,
        ),
        io.Combo.Input(
            "attention",
            options=list(KERNELS),
            default="auto",
            optional=True,
            tooltip="auto: the fastest that works on the card; each is tried when a model is loaded.",
            **ADVANCED,
        ),
        _switch(
            "compile",
            "torch.compile of the model's blocks: faster steps, but the first one of each kind of size takes a "
            "minute longer. Needs a C++ compiler where the ranks run, and triton on GPUs. Not with tp.",
        ),
        _switch(
            "graphs",
            "CUDA graphs: from the second one of each kind of size on, a step is launched as one piece, which helps most "
            "where ranks are many and pictures small. Takes memory for each kind of size. Not tried on a GPU yet.",
        ),
        _switch(
            "nan_is_error",
            "Latents and pictures with NaN or infinity end the prompt. Off: they are drawn as ComfyUI draws them, and the "
            "node says at which step they began.",
        ),
        io.Int.Input(
            "memory_budget_mib",
            default=0,
            min=0,
            max=2**24,
            optional=True,
            tooltip="Most MiB of models on a rank; the least recently used leave. 0: no limit.",
            **ADVANCED,
        ),
        io.Int.Input(
            "idle_minutes",
            default=int(DEFAULT_IDLE_SECONDS / 60),
            min=1,
            max=10**6,
            optional=True,
            tooltip="After so long without work the models leave; the next prompt brings them back. The backend ends itself "
            "after eight times as long, or four hours.",
            **ADVANCED,
        ),
    ]


def _switch(name: str, tooltip: str) -> Any:
    return io.Boolean.Input(name, default=False, optional=True, tooltip=tooltip, **ADVANCED)


def _connection() -> list[Any]:
    return [
        io.String.Input(
            "backend",
            default=DEFAULT,
            optional=True,
            tooltip="The backend's name. One of that name that runs already is used as it is. default: one for each "
            "set of GPUs that a ComfyUI sees.",
            **ADVANCED,
        ),
        io.String.Input(
            "address",
            default="",
            optional=True,
            tooltip="tcp://host:port of a backend on another machine (parallel-mmdit serve --listen). Empty: this one.",
            **ADVANCED,
        ),
        io.String.Input(
            "keys",
            default="",
            optional=True,
            tooltip="Folder with client.key_secret and server.key, for an address (parallel-mmdit keys).",
            **ADVANCED,
        ),
    ]
