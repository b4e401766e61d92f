"""What a rank does for each request. The only place that puts models, methods and sampling together."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from ..config import DTYPES, KERNELS, MeshSpec, choose
from ..distributed.attention import resolve_kernel
from ..distributed.device_memory import memory_of
from ..distributed.mesh import BandAxes, Groups, Mesh, build_mesh
from ..errors import ConfigError, InputError, MissingTensorsError, ProtocolError, UnknownModelError
from ..models.checkpoint import load_parameters
from ..models.compiled import check_compiler, compile_blocks
from ..models.families import OpenedModel, open_model
from ..models.network import Network
from ..models.prediction import Predictor, Rows
from ..models.vae import BandVAE, open_vae
from ..rpc.messages import (
    Decode,
    Done,
    Encode,
    Forward,
    Loaded,
    LoadModel,
    LoadVAE,
    ModelState,
    Progress,
    Reply,
    RequestHeader,
    Result,
    Sample,
    Unload,
)
from .allowed_files import AllowedFiles
from .jobs import Job
from .room import check_fits, fits
from .sample import run_sample

TENSOR_CACHE_BYTES = 2**28
COMPILED = "/compiled"


@dataclass
class Resident:
    """A model that is held, and what is said of it."""

    model: Predictor | BandVAE
    state: ModelState
    channels: int


class _Sizes(msgspec.Struct):
    """What a rank says of a load: bytes read from the file, bytes held; and how many more there is room for."""

    read: int
    held: int
    free: int = 0


class Engine:
    """One rank's models. All ranks handle the same requests in the same order.

    Args:
        memory_budget: bytes per rank for models; the least recently used leave when it is passed. 0 is no budget.
    """

    def __init__(
        self,
        device: torch.device,
        memory_budget: int = 0,
        files: AllowedFiles = AllowedFiles(),  # noqa: B008 - frozen
    ) -> None:
        self.device = device
        self.files = files
        self.memory_budget = memory_budget
        self.residents: OrderedDict[str, Resident] = OrderedDict()
        self._meshes: dict[MeshSpec, Mesh] = {}
        self._groups = Groups()
        self._bands = BandAxes(self._groups)
        self._tensors: OrderedDict[str, Tensor] = OrderedDict()
        self._handlers: dict[type, Any] = {
            LoadModel: self._load_model,
            LoadVAE: self._load_vae,
            Sample: self._sample,
            Forward: self._forward,
            Decode: self._decode,
            Encode: self._encode,
            Unload: self._unload,
        }

    @property
    def place(self) -> list[int]:
        """How many collectives this rank has started, by axis: alike on ranks that stand at the same place."""
        return [axis.traffic.collectives for mesh in self._meshes.values() for axis in mesh.axes] + [
            self._bands.traffic.collectives
        ]

    @property
    def cached_tensors(self) -> int:
        return len(self._tensors)

    @torch.inference_mode()
    def handle(self, header: RequestHeader, tensors: Sequence[Tensor | None], job: Job) -> tuple[Reply, list[Tensor]]:
        """The final reply and its tensors, alike on every rank.

        Raises: BackendError: on every rank alike; the models stay. Any other exception: ranks may be out of step.
        """
        full = self._complete(header, tensors)
        handler = self._handlers.get(type(header.body))
        if handler is None:
            raise ProtocolError(f"{type(header.body).__name__} is not a job.", "Send it as a control message.")
        return handler(header.body, full, job)

    # -- tensors that are kept by key -------------------------------------------------------------------------

    def _complete(self, header: RequestHeader, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """All tensors of the message; those sent with a key are kept, those named by it alone are looked up.

        Ranks have the same requests in the same order, so they keep and miss the same.
        """
        for meta, tensor in zip(header.tensors, tensors, strict=True):
            if meta.key is not None and tensor is not None:
                self._tensors[meta.key] = tensor
        unsent = [meta.key for meta, tensor in zip(header.tensors, tensors, strict=True) if tensor is None]
        missing = [name for name in unsent if name not in self._tensors]
        if missing:
            raise MissingTensorsError("The backend no longer holds these tensors.", " ".join(map(str, missing)))
        full = []
        for meta, tensor in zip(header.tensors, tensors, strict=True):
            if meta.key is not None:
                self._tensors.move_to_end(meta.key)
            full.append(tensor if tensor is not None else self._tensors[str(meta.key)])
        while sum(t.nbytes for t in self._tensors.values()) > TENSOR_CACHE_BYTES:
            self._tensors.popitem(last=False)
        return full

    # -- loading ------------------------------------------------------------------------------------------------

    def _load_model(self, body: LoadModel, _: list[Tensor], job: Job) -> tuple[Reply, list[Tensor]]:
        start = time.perf_counter()
        job.control.agreed(lambda: self._check_load(body, job.control.world_size))
        opened, spec = None, body.mesh

        def find() -> OpenedModel:
            return open_model(self.files.checked(body.path, body.key), body.kind)

        if spec is None:
            opened = job.control.agreed(find)
            spec = MeshSpec.exact_default(job.control.world_size, opened.kind.rest)
        name = (
            f"{body.key}/{body.dtype}/{body.kernel}/{spec.describe()}/{'-'.join(spec.order)}{COMPILED * body.compile}"
        )
        if name in self.residents and body.kind in ("any", self._resident(name, Predictor).kind.name):
            return self._loaded(name, _Sizes(0, 0), [], start, job), []
        mesh = self._mesh(spec)
        dtype = getattr(torch, body.dtype)
        opened = opened or job.control.agreed(find)
        path = opened.source.path

        def build() -> tuple[nn.Module, str, int]:
            spec.check_axes(opened.kind.axes, opened.config.family)
            kernel = resolve_kernel(body.kernel, self.device, dtype, mesh.ring.degree > 1)
            if body.compile:
                check_compiler(self.device)
            with torch.device("meta"):
                model = opened.build(mesh, kernel)
            return model, kernel, sum(p.numel() for p in model.parameters()) * dtype.itemsize

        model, kernel, needed = job.control.agreed(build)
        evicted = self._make_room(needed, path.name, opened.kind.name, spec, job)
        job.emit(Progress(f"Loading {path.name}", 0, 1), [])

        def read() -> Network:
            load_parameters(
                model,
                opened.source,
                device=self.device,
                dtype=dtype,
                unread=opened.unread(model),
                should_stop=job.given_up,
            )
            network = opened.network(model, mesh, kernel, self.device, dtype)
            if body.compile:
                compile_blocks(model, opened.repeated)
            return network

        network, config = job.control.agreed(read), opened.config
        predictor = Predictor(network, mesh, dtype, self.device, opened.kind)
        state = ModelState(name, path.name, config.family, spec.describe(), body.dtype, needed)
        self.residents[name] = Resident(predictor, state, config.channels)
        return self._loaded(name, _Sizes(opened.source.bytes_read, needed), evicted, start, job), []

    def _load_vae(self, body: LoadVAE, _: list[Tensor], job: Job) -> tuple[Reply, list[Tensor]]:
        start = time.perf_counter()
        choose(body.dtype, DTYPES, "dtype")
        name = f"{body.key}/{body.dtype}/vae"
        if name in self.residents:
            return self._loaded(name, _Sizes(0, 0), [], start, job), []
        paths = job.control.agreed(lambda: self.files.all_checked(body.paths, body.key))
        checkpoint = job.control.agreed(lambda: open_vae(paths).checked_for(body.dtype))
        dtype = getattr(torch, body.dtype)
        needed = checkpoint.elements * dtype.itemsize
        evicted = self._make_room(needed, paths[0].name, "vae", MeshSpec(), job)
        vae = job.control.agreed(lambda: checkpoint.build(self.device, dtype, self._bands, job.given_up))
        state = ModelState(name, paths[0].name, vae.family, "bands", body.dtype, needed)
        self.residents[name] = Resident(vae, state, vae.latent_channels)
        return self._loaded(name, _Sizes(checkpoint.bytes_read, needed), evicted, start, job), []

    @staticmethod
    def _check_load(body: LoadModel, world_size: int) -> None:
        if body.mesh is not None:
            body.mesh.check_world(world_size)
        choose(body.dtype, DTYPES, "dtype")
        choose(body.kernel, KERNELS, "Attention kernel")

    def _mesh(self, spec: MeshSpec) -> Mesh:
        if spec not in self._meshes:
            self._meshes[spec] = build_mesh(spec, self._groups)
        return self._meshes[spec]

    def _make_room(self, needed: int, name: str, kind: str, spec: MeshSpec, job: Job) -> list[str]:
        """Lets models go, oldest use first, until `needed` more bytes fit the budget and the memory of every rank.

        Raises: ConfigError, OutOfMemoryError: they don't fit without any other; then all stay.
        """
        rank, world = job.control.rank, job.control.world_size

        def check(without: int) -> None:
            """Whether they would fit once so many bytes of other models are gone."""
            check_fits(needed, self._free_bytes() + without, name, kind, spec, world, rank)

        most, _, _ = self._everywhere(needed, job)
        if self.memory_budget and most > self.memory_budget:
            raise ConfigError(
                f"{name} needs {most / 2**20:.0f} MiB on a rank; the budget is {self.memory_budget / 2**20:.0f} MiB.",
                "Raise the memory budget, use a smaller dtype, or spread the weights further with tp.",
            )
        job.control.agreed(lambda: check(sum(resident.state.rank_bytes for resident in self.residents.values())))
        evicted: list[str] = []
        while self.residents:
            held = sum(resident.state.rank_bytes for resident in self.residents.values())
            _, all_held, short = self._everywhere(needed, job, held)
            if not short and not (self.memory_budget and most + all_held > self.memory_budget):
                break
            evicted.append(self.residents.popitem(last=False)[1].state.name)
            self.give_back_memory()
        job.control.agreed(lambda: check(0))
        return evicted

    def _everywhere(self, needed: int, job: Job, held: int = 0) -> tuple[int, int, bool]:
        """The most that any rank needs, the most that any holds, and whether any has not enough free."""
        notes = job.control.gather(_Sizes(needed, held, self._free_bytes()))
        return max(n.read for n in notes), max(n.held for n in notes), any(not fits(n.read, n.free) for n in notes)

    def _free_bytes(self) -> int:
        """CPU ranks of one machine share its memory."""
        free = memory_of(self.device)[0]
        return free if self.device.type == "cuda" else free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def _loaded(self, name: str, sizes: _Sizes, evicted: list[str], start: float, job: Job) -> Loaded:
        self.residents.move_to_end(name)
        resident = self.residents[name]
        everywhere = job.control.gather(_Sizes(sizes.read, resident.state.rank_bytes))
        return Loaded(
            model=name,
            family=resident.state.family,
            bytes_read=[s.read for s in everywhere],
            resident_bytes=[s.held for s in everywhere],
            seconds=time.perf_counter() - start,
            evicted=evicted,
            channels=resident.channels,
        )

    def _unload(self, body: Unload, _: list[Tensor], job: Job) -> tuple[Reply, list[Tensor]]:
        for name in body.models or list(self.residents):
            self.residents.pop(name, None)
        if not body.models:
            self._tensors.clear()
        self.give_back_memory()
        return Done(), []

    def give_back_memory(self) -> None:
        """What was freed can be had by other programs; models with hooks or compiled blocks are cycles until collected."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; the launcher has it keep what is freed
            if trim is not None:
                trim(0)

    # -- computing ----------------------------------------------------------------------------------------------

    def _resident(self, name: str, kind: type) -> Any:
        if name not in self.residents:
            raise UnknownModelError(f"The backend does not hold {name!r} (any more).", "Load it again.")
        self.residents.move_to_end(name)
        model = self.residents[name].model
        if not isinstance(model, kind):
            raise InputError(
                f"{name!r} is not a model for this request.", "Use a diffusion model to sample, a VAE to decode."
            )
        return model

    def _sample(self, body: Sample, tensors: list[Tensor], job: Job) -> tuple[Reply, list[Tensor]]:
        return run_sample(body, tensors, job, lambda: self._resident(body.model, Predictor))

    def _forward(self, body: Forward, tensors: list[Tensor], job: Job) -> tuple[Reply, list[Tensor]]:
        start = time.perf_counter()

        def prepare() -> tuple[Predictor, Rows]:
            predictor: Predictor = self._resident(body.model, Predictor)
            x, timesteps = tensors[body.x].to(self.device), tensors[body.timesteps].to(self.device)
            context = tensors[body.context]
            predictor.check_latent(x, context.shape[1] if context.ndim == 3 else 0)
            if timesteps.shape != x.shape[:1]:
                raise InputError(f"{list(timesteps.shape)} timesteps for {x.shape[0]} latents.", "Give one per latent.")
            return predictor, Rows(x, timesteps, predictor.prompt(context, tensors[body.pooled], x.shape[0]))

        predictor, rows = job.control.agreed(prepare)
        output = predictor.output(rows)
        return Result(time.perf_counter() - start, 1), [output]

    def _decode(self, body: Decode, tensors: list[Tensor], job: Job) -> tuple[Reply, list[Tensor]]:
        start = time.perf_counter()
        vae: BandVAE = job.control.agreed(lambda: self._checked_vae(body.vae, tensors[body.latent], "latent"))
        image = vae.decode(tensors[body.latent], raw=body.raw, cancelled=job.cancelled)
        return Result(time.perf_counter() - start), [image] if image is not None else []

    def _encode(self, body: Encode, tensors: list[Tensor], job: Job) -> tuple[Reply, list[Tensor]]:
        start = time.perf_counter()
        vae: BandVAE = job.control.agreed(lambda: self._checked_vae(body.vae, tensors[body.image], "image"))
        latent = vae.encode(tensors[body.image], cancelled=job.cancelled)
        return Result(time.perf_counter() - start), [latent] if latent is not None else []

    def _checked_vae(self, name: str, x: Tensor, what: str) -> BandVAE:
        vae: BandVAE = self._resident(name, BandVAE)
        vae.check_latent(x) if what == "latent" else vae.check_image(x)
        if not torch.isfinite(x).all():
            raise InputError(f"The {what} holds NaN or infinity.", "Look at the node that made it.")
        return vae
