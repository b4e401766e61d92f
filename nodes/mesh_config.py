"""MeshConfig: how many ranks, and how they share the work."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..parallel_backend.client.cards import Ranks, choose_ranks, seen
from ..parallel_backend.client.names import DEFAULT, backend_name
from ..parallel_backend.config import AUTO, DEFAULT_IDLE_SECONDS, DTYPES, FP8, KERNELS, BackendSpec, gpu_numbers
from ..parallel_backend.errors import ConfigError
from .known_to_core import ADVANCED, search_aliases
from .node_text import say
from .parallel_mesh import MeshSocket, ParallelMesh


def parallel_mesh(
    ranks: int,
    device: str,
    devices: str,
    cfg: int,
    ulysses: int,
    ring: int,
    tp: int,
    dp: int,
    dtype: str,
    attention: str,
    backend: str,
    memory_budget_mib: int,
    idle_minutes: int,
    patch: int = 0,
    pp: int = 1,
    sliced: bool = False,
    address: str = "",
    keys: str = "",
    compile: bool = False,
    nan_is_error: bool = False,
    graphs: bool = False,
) -> ParallelMesh:
    """The settings as one object.

    Raises: ConfigError: they don't fit together.
    """
    ordinals = gpu_numbers(devices)
    asked: Any = None if device == AUTO else device
    if address and ordinals:
        raise ConfigError(f"devices={devices!r} can't be chosen at {address}.", "Leave devices empty: serve has them.")
    if address and not ranks:
        raise ConfigError(
            f"How many ranks the backend at {address} has is not known here.", "Set ranks to their number."
        )
    if address:
        chosen = Ranks(asked or "cuda", ranks)  # what is there is known once it answers
    else:
        here = seen(asked)
        chosen = choose_ranks(here, asked, ranks, ordinals)
        backend = backend_name(backend, chosen.device, here)
    limits = (idle_minutes * 60.0, memory_budget_mib * 2**20)
    spec = BackendSpec(backend, chosen.count, chosen.device, chosen.devices, *limits, address, keys)
    degrees = {"dp": dp, "cfg": cfg, "pp": pp, "patch": patch, "ring": ring, "ulysses": ulysses, "tp": tp}
    return ParallelMesh(spec, degrees, dtype, attention, sliced, compile, chosen.note, nan_is_error, graphs)


def default_mesh() -> ParallelMesh:
    """Mesh Config as it is when it is put down: all GPUs, an exact split. Raises: as `parallel_mesh`."""
    return parallel_mesh(**{setting.id: setting.default for setting in MeshConfig.define_schema().inputs})


class MeshConfig(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MeshConfig",
            display_name="Mesh Config (parallel)",
            category="parallel",
            description="Says how many GPUs work on one image and how they share it. "
            "Left as it is, it takes all GPUs and an exact split over as many of them as make an image of 1024 x 1024 pixels faster.",
            **search_aliases("multi gpu", "parallel", "tensor parallel", "ulysses", "ring attention"),
            inputs=[
                io.Int.Input(
                    "ranks",
                    default=0,
                    min=0,
                    max=256,
                    tooltip="Processes, one per GPU. 0: all GPUs of the best one's kind, or 2 on a CPU.",
                ),
                io.Combo.Input(
                    "device", options=["auto", "cuda", "cpu"], default="auto", tooltip="auto: GPUs where there are any."
                ),
                io.String.Input(
                    "devices",
                    default="",
                    tooltip="GPU numbers, one per rank, such as 0,1,3. Empty: those of the best one's kind.",
                ),
                io.Int.Input(
                    "cfg",
                    default=0,
                    min=0,
                    max=2,
                    tooltip="2: cond and uncond on different ranks, the cheapest split. 0: 2 where it fits. No gain at cfg 1.",
                ),
                io.Int.Input(
                    "ulysses",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="MMDiT: tokens over ranks, exchanged for heads in attention. 0: whatever is left.",
                ),
                io.Int.Input(
                    "ring",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="MMDiT: tokens over ranks, keys and values sent round a ring. For slow links or long sequences.",
                ),
                io.Int.Input(
                    "tp",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="MMDiT: weights over ranks: each holds 1/tp of the model. For models that don't fit one GPU.",
                ),
                io.Int.Input(
                    "dp",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="The batch over ranks, for batches of several images. 0: 1; but where no degree is set, the ranks "
                    "that a single image is not faster with.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=[AUTO, *DTYPES, FP8],
                    default=AUTO,
                    tooltip="auto: ComfyUI's own choice for the weakest of the GPUs: float16 on most. float32 on a CPU. fp8: auto, with "
                    "the model's weights in half the memory, each row scaled; a file that is quantised stays as it is.",
                ),
                io.Combo.Input(
                    "attention",
                    options=list(KERNELS),
                    default="auto",
                    tooltip="auto: the fastest that works on the card; each is tried when a model is loaded.",
                ),
                io.String.Input(
                    "backend",
                    default=DEFAULT,
                    tooltip="The backend's name. One of that name that runs already is used as it is. default: one for each "
                    "set of GPUs that a ComfyUI sees.",
                    **ADVANCED,
                ),
                io.Int.Input(
                    "memory_budget_mib",
                    default=0,
                    min=0,
                    max=2**24,
                    tooltip="Most MiB of models on a rank; the least recently used leave. 0: no limit.",
                    **ADVANCED,
                ),
                io.Int.Input(
                    "idle_minutes",
                    default=int(DEFAULT_IDLE_SECONDS / 60),
                    min=1,
                    max=10**6,
                    tooltip="After so long without work the models leave; the next prompt brings them back. The backend ends itself "
                    "after eight times as long, or four hours.",
                    **ADVANCED,
                ),
                io.Int.Input(
                    "patch",
                    default=0,
                    min=0,
                    max=64,
                    optional=True,
                    tooltip="UNet: horizontal bands of the image over ranks. 0: whatever is left.",
                ),
                io.Int.Input(
                    "pp",
                    default=1,
                    min=1,
                    max=64,
                    optional=True,
                    tooltip="MMDiT: blocks over ranks, in stages: each holds 1/pp of the model and sends least of all. "
                    "Faster than one GPU only with displaced steps (PipeFusion).",
                ),
                io.Boolean.Input(
                    "sliced",
                    default=False,
                    optional=True,
                    tooltip="UNet: each rank holds a slice of the weights and gathers a block's when it computes. For models "
                    "that don't fit one GPU; MMDiTs have tp and pp for that.",
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
                io.Boolean.Input(
                    "compile",
                    default=False,
                    optional=True,
                    tooltip="torch.compile of the model's blocks: faster steps, but the first one of each kind of size takes a "
                    "minute longer. Needs a C++ compiler where the ranks run, and triton on GPUs. Not with tp.",
                    **ADVANCED,
                ),
                io.Boolean.Input(
                    "nan_is_error",
                    default=False,
                    optional=True,
                    tooltip="Latents and pictures with NaN or infinity end the prompt. Off: they are drawn as ComfyUI draws them, and the "
                    "node says at which step they began.",
                    **ADVANCED,
                ),
                io.Boolean.Input(
                    "graphs",
                    default=False,
                    optional=True,
                    tooltip="CUDA graphs: from the second one of each kind of size on, a step is launched as one piece, which helps most "
                    "where ranks are many and pictures small. Takes memory for each kind of size. Not tried on a GPU yet.",
                    **ADVANCED,
                ),
            ],
            outputs=[MeshSocket.Output(display_name="mesh", tooltip="For the parallel loaders.")],
        )

    @classmethod
    def validate_inputs(
        cls,
        ranks: int | None = None,
        device: str | None = None,
        devices: str | None = None,
        cfg: int | None = None,
        ulysses: int | None = None,
        ring: int | None = None,
        tp: int | None = None,
        dp: int | None = None,
        patch: int | None = 0,
        pp: int | None = 1,
        address: str | None = "",
        keys: str | None = "",
    ) -> bool:
        given = {
            "ranks": ranks,
            "device": device,
            "devices": devices,
            "cfg": cfg,
            "ulysses": ulysses,
            "ring": ring,
            "tp": tp,
            "dp": dp,
            "patch": patch,
            "pp": pp,
            "address": address,
            "keys": keys,
        }
        if None in given.values():  # a linked value is known only when the node runs
            return True
        others: dict[str, Any] = {"dtype": AUTO, "attention": "auto", "backend": DEFAULT}
        # Raised, not returned: ComfyUI would repeat a returned text for each of these inputs.
        parallel_mesh(**given, **others, memory_budget_mib=0, idle_minutes=1)  # type: ignore[arg-type]
        return True

    @classmethod
    def execute(cls, **settings: Any) -> io.NodeOutput:
        mesh = parallel_mesh(**settings)
        say(mesh.describe(), log=True)
        return io.NodeOutput(mesh)
