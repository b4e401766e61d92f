"""What a rank does for each request. The only place that puts models, methods and sampling together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from ..config import DTYPES, FP8, KERNELS, WEIGHTS, MeshSpec, choose
from ..distributed.device_memory import give_back
from ..distributed.kernel_trial import choose_kernel
from ..distributed.kernels import Use
from ..distributed.mesh import Mesh, MeshAxis
from ..distributed.peer_access import cards_reach_each_other
from ..errors import BackendError, ProtocolError
from ..extras.reading import Extras
from ..extras.weights import PatchedWeights, PatchFiles
from ..fused.all import FUSED
from ..fused.operation import note_of
from ..mesh_choice.choice import default_mesh
from ..models.captured import CapturedNetwork
from ..models.checkpoint import HeldWeight, TensorSource, bytes_held, is_quantised, load_parameters
from ..models.compiled import FirstTimes, check_compiler, compile_blocks, refuse_quantised, refuse_tensor_parallel
from ..models.cuda_graphs import CUDAGraphs, check_graphs
from ..models.families import OpenedModel, open_model
from ..models.fp8_products import cards_multiply_fp8, make_products_in_fp8
from ..models.fp8_source import FP8Source
from ..models.left_over import left_over_note
from ..models.network import Network
from ..models.prediction import Predictor
from ..models.shared_reading import pass_on
from ..models.vae import BandVAE
from ..rpc.headers import RequestHeader
from ..rpc.messages import (
    Adjust,
    Decode,
    Done,
    Encode,
    Forget,
    Forward,
    LoadControl,
    Loaded,
    LoadModel,
    LoadVAE,
    Patches,
    PatchFilePart,
    Progress,
    Reply,
    Request,
    Sample,
    Unload,
)
from ..rpc.state import ModelState, Swap
from .allowed_files import AllowedFiles
from .control_nets import ControlNets
from .forward import run_forward
from .jobs import Job
from .kept_tensors import KeptTensors
from .meshes import Meshes
from .meter import Meter
from .residents import Resident, Residents
from .sample import run_sample
from .shared_tensors import SharedTensors
from .vaes import VAEs

COMPILED = "/compiled"
# Patches that take longer to lay on are told of.
PATCHES_SECONDS = 1.0
# Of a mesh's communicators on a GPU, about.
COMMUNICATOR_BYTES = 512 * 2**20


def is_compiled(body: Request) -> bool:
    """Whether the job may wait for a compiler."""
    if isinstance(body, LoadModel):
        return body.compile
    return isinstance(body, (Sample, Forward)) and body.model.endswith(COMPILED)


class _Sizes(msgspec.Struct):
    """What a rank says of a load: bytes read from the file, bytes held; and what the user should know of it."""

    read: int
    held: int
    notes: list[str] = []


def _held_note(source: TensorSource, load: LoadModel) -> str:
    """How weights are held, where that isn't in the dtype that they are computed in."""
    if isinstance(source, FP8Source):
        how = "held in fp8, each row scaled" if load.weights == FP8 else f"cast to {load.weights}"
        return f"weights are {how}; computed in {load.dtype}"
    if is_quantised(source):
        return f"weights stay quantised, as in the file; computed in {load.dtype}"
    return ""


class Engine:
    """One rank's models. All ranks handle the same requests in the same order.

    Args:
        memory_budget, sharers: as `Residents` takes them.
        beat: called at every block of a model, which can take a GPU seconds, and at every weight that is patched.
        patches_folder: where clients leave patches on weights.
    """

    def __init__(
        self,
        device: torch.device,
        memory_budget: int = 0,
        files: AllowedFiles = AllowedFiles(),  # noqa: B008 - frozen
        sharers: int = 1,
        beat: Callable[[], object] = lambda: None,
        patches_folder: Path = Path(),
    ) -> None:
        self.device = device
        self.files = files
        self.residents = Residents(device, memory_budget, sharers, self._let_go_of_groups)
        self.kept_tensors, self.shared_tensors = KeptTensors(), SharedTensors()
        self.patch_files = PatchFiles(patches_folder)
        self.control_nets = ControlNets(self.residents, files, beat)
        self.extras = Extras()
        self.meshes = Meshes(device)
        self.vaes = VAEs(device, self.residents, files, self.meshes.bands)
        self._job: Job | None = None
        self._beat = beat
        self._handlers: dict[type, Any] = {
            LoadModel: self._load_model,
            LoadVAE: self._load_vae,
            LoadControl: self._load_control,
            Sample: self._sample,
            PatchFilePart: self._keep_patches,
            Decode: self._decode,
            Encode: self._encode,
            Unload: self._unload,
            Forget: self._forget,
            Adjust: self._adjust,
        }

    @torch.inference_mode()
    def handle(self, header: RequestHeader, tensors: Sequence[Tensor | None], job: Job) -> tuple[Reply, list[Tensor]]:
        """The final reply and its tensors, alike on every rank.

        Raises: BackendError: on every rank alike; the models stay. Any other exception: ranks may be out of step.
        """
        self._job, kept = job, self.kept_tensors.complete(header.tensors, tensors)

        def given() -> list[Tensor]:
            return self.shared_tensors.complete(header.tensors, kept)

        try:
            if isinstance(header.body, Forward):  # many in a row: ranks agree once on all that each of them needs
                return self._forward(header.body, given, job)
            handler = self._handlers.get(type(header.body))
            if handler is None:
                raise ProtocolError(f"{type(header.body).__name__} is not a job.", "Send it as a control message.")
            lies_in_memory = any(meta.shared is not None for meta in header.tensors)
            return handler(header.body, job.control.agreed(given) if lies_in_memory else given(), job)
        except BackendError:
            self.meshes.joined()
            if isinstance(header.body, (LoadModel, LoadVAE, LoadControl)):
                self.residents.clear_up()
            elif isinstance(header.body, (Decode, Encode)):
                give_back(self.device)
            raise
        finally:
            self.meshes.joined()
            self._job = None

    # -- loading ------------------------------------------------------------------------------------------------

    def _load_model(self, body: LoadModel, _: list[Tensor], job: Job) -> tuple[Reply, list[Tensor]]:
        start = time.perf_counter()
        job.control.agreed(lambda: self._check_load(body, job.control.world_size))
        opened, spec = None, body.mesh

        def find() -> OpenedModel:
            found = open_model(self.files.checked(body.path, body.key), body.kind, body.weights, self.device)
            if body.mesh is not None:
                body.mesh.check_axes(found.kind.axes, found.config.family)
            return found

        if spec is None:
            opened = job.control.agreed(find)
            world, kind = job.control.world_size, opened.kind.name
            spec = default_mesh(world, kind, self.device.type, graphs=body.graphs).mesh
        name = f"{body.held_as}{spec.describe()}/{'-'.join(spec.order)}{COMPILED * body.compile}"
        if name in self.residents and body.kind in ("any", self.residents.model(name, Predictor).kind.name):
            self._capture(self.residents.model(name, Predictor), body.graphs)
            return self._loaded(name, _Sizes(0, 0), [], start, job), []
        opened = opened or job.control.agreed(find)
        dtype, path = getattr(torch, body.dtype), opened.source.path
        evicted = self._room_for_communicators(spec, path.name, opened.kind.name, job)
        mesh = self.meshes.join(spec)

        def build() -> tuple[nn.Module, str, int, list[str]]:
            heads = -(-opened.config.heads // (mesh.tp.degree * mesh.ulysses.degree))
            use = Use(self.device, dtype, mesh.ring.degree > 1, heads, opened.config.head_dim)
            kernel, note = choose_kernel(body.kernel, use)
            if body.compile:
                refuse_tensor_parallel(spec)
                refuse_quantised(opened.source)
                check_compiler(self.device)
            with torch.device("meta"):
                model = opened.build(mesh, kernel)
            wanted = {*dict(model.named_parameters()), *opened.unread(model)}
            notes = [
                note,
                note_of(FUSED, self.device),
                left_over_note(wanted, opened.source.names(), path.name),
                _held_note(opened.source, body),
            ]
            return model, kernel, bytes_held(model, opened.source, dtype), notes

        model, kernel, needed, notes = job.control.agreed(build)
        evicted += self.residents.make_room(needed, path.name, opened.kind.name, spec, job.control)
        meter = Meter(job, f"loading {path.name}", "bytes", needed)
        network, weights, note = self._read(opened, model, mesh, kernel, body, job, meter)
        meter.finish()
        config = opened.config
        predictor = Predictor(network, mesh, dtype, self.device, opened.kind)
        if body.compile:
            predictor.compiling = FirstTimes(self._tell_first_time)
        self._capture(predictor, body.graphs)
        state = ModelState(name, path.name, config.family, spec.describe(), body.held_in, needed, spec.axes)
        self.residents[name] = Resident(predictor, state, config.channels, weights)
        sizes = _Sizes(opened.source.bytes_read, needed, [*notes, note])
        return self._loaded(name, sizes, evicted, start, job), []

    def _read(
        self, opened: OpenedModel, model: nn.Module, mesh: Mesh, kernel: str, body: LoadModel, job: Job, meter: Meter
    ) -> tuple[Network, PatchedWeights, str]:
        """The model with its weights, read by this rank or shared out, and what to tell of its products.

        Comm: `pass_on`'s, `cards_multiply_fp8`'s.
        """
        shared, dtype = self._readers(opened.source, mesh.spec, job), getattr(torch, body.dtype)
        # A gathered slice is dequantised.
        may = is_quantised(opened.source) and not mesh.spec.sliced
        in_fp8 = may and cards_multiply_fp8(self.device, job.control, body.has_fp8)

        def read() -> dict[str, HeldWeight]:
            return load_parameters(
                model,
                opened.source,
                device=self.device,
                dtype=dtype,
                unread=opened.unread(model),
                should_stop=job.given_up,
                shared=shared,
                told=meter.add,
            )

        def finish() -> Network:
            network = opened.network(model, mesh, kernel, self.device, dtype)
            for block in filter(lambda module: isinstance(module, opened.repeated), model.modules()):
                block.register_forward_pre_hook(lambda *_: self._tell_block())
            if body.compile:
                compile_blocks(model, opened.repeated)
            return network

        held = job.control.agreed(read)
        if shared is not None:
            pass_on(model, shared, meter.add)
        note = make_products_in_fp8(held.values(), body.fast_fp8) if in_fp8 else ""
        network = job.control.agreed(finish)
        return network, PatchedWeights(held, opened.source, opened.place, opened.later(network)), note

    def _capture(self, predictor: Predictor, asked: bool) -> None:
        """Its evaluations are graphs from now on, or not."""
        if asked == (predictor.captured is not None):
            return
        if predictor.captured is not None:
            predictor.captured.drop()
            predictor.captured = None
        else:
            graphs = CUDAGraphs(self.device)
            told = (self._tell_block, self._tell_first_time)
            predictor.captured = CapturedNetwork(predictor.network, predictor.mesh, graphs, *told)

    def _load_vae(self, body: LoadVAE, _: list[Tensor], job: Job) -> tuple[Reply, list[Tensor]]:
        start, name, evicted, read, notes = time.perf_counter(), body.held_as, list[str](), 0, list[str]()
        if name not in self.residents:
            evicted, read, notes = self.vaes.load(body, name, job)
        return self._loaded(name, _Sizes(read, 0, notes), evicted, start, job), []

    def _load_control(self, body: LoadControl, _: list[Tensor], job: Job) -> tuple[Reply, list[Tensor]]:
        start = time.perf_counter()
        base: Predictor = job.control.agreed(lambda: self.residents.model(body.model, Predictor))
        name, evicted, read, notes = body.held_as, list[str](), 0, list[str]()
        if name not in self.residents:
            evicted, read, notes = self.control_nets.load(body, base, job)
        return self._loaded(name, _Sizes(read, 0, notes), evicted, start, job), []

    def _check_load(self, body: LoadModel, world_size: int) -> None:
        if body.mesh is not None:
            body.mesh.check_world(world_size)
        choose(body.dtype, DTYPES, "dtype")
        if body.weights:
            choose(body.weights, WEIGHTS, "Dtype of weights")
        choose(body.kernel, KERNELS, "Attention kernel")
        if body.graphs:
            check_graphs(self.device, sliced=body.mesh is not None and body.mesh.sliced)

    def _tell_first_time(self, what: str, done: int) -> None:
        if self._job is not None:
            self._job.emit(Progress(what, done, 1), [])

    def _tell_block(self) -> None:
        """A hook: what it returned would be taken for the block's inputs."""
        self._beat()

    def _readers(self, source: TensorSource, spec: MeshSpec, job: Job) -> MeshAxis | None:
        """The ranks that share the reading of a model out, where all hold the same and that is faster; else None."""
        alike = job.control.world_size > 1 and not spec.sliced and spec.tp * spec.pp == 1
        if not alike or is_quantised(source) or not cards_reach_each_other(self.device, job.control):
            return None
        return self.meshes.bands.first(job.control.world_size)

    def _room_for_communicators(self, spec: MeshSpec, name: str, kind: str, job: Job) -> list[str]:
        """On GPUs, for those of a mesh that is new: NCCL can't take what torch keeps for itself. The models that left for it."""
        if self.device.type != "cuda" or spec in self.meshes or spec.world_size == 1:
            return []
        self.residents.give_back_memory()
        return self.residents.make_room(COMMUNICATOR_BYTES, f"The mesh of {name}", kind, spec, job.control)

    def _let_go_of_groups(self) -> None:
        """Of meshes that no model is in, and of what extras have made for models that are gone."""
        models = [resident.model for resident in self.residents.values()]
        used = {model.spec for model in models if isinstance(model, Predictor)}
        if self.extras.prune():
            give_back(self.device)
        self.meshes.keep_only(used, bands=any(isinstance(model, BandVAE) for model in models))

    def _loaded(self, name: str, sizes: _Sizes, evicted: list[str], start: float, job: Job) -> Loaded:
        self.residents.move_to_end(name)
        resident = self.residents[name]
        everywhere = job.control.gather(_Sizes(sizes.read, resident.state.rank_bytes, sizes.notes))
        notes = list(dict.fromkeys(note for s in everywhere for note in s.notes if note))
        return Loaded(
            model=name,
            family=resident.state.family,
            bytes_read=[s.read for s in everywhere],
            resident_bytes=[s.held for s in everywhere],
            seconds=time.perf_counter() - start,
            evicted=evicted,
            channels=resident.channels,
            notes=notes,
        )

    def _unload(self, body: Unload, _: list[Tensor], job: Job) -> tuple[Reply, list[Tensor]]:
        self.control_nets.forget()
        self.extras.forget()
        self.shared_tensors.forget()
        self.residents.let_go(*(body.models or list(self.residents)))
        if not body.models:
            self.kept_tensors.clear()
        return Done(), []

    def _forget(self, body: Forget, _: list[Tensor], job: Job) -> tuple[Reply, list[Tensor]]:
        self.kept_tensors.forget(body.keys)
        self.extras.end(body.keys)
        self.shared_tensors.forget()
        return Done(), []

    def _adjust(self, body: Adjust, _: list[Tensor], job: Job) -> tuple[Reply, list[Tensor]]:
        if body.memory_budget is not None:
            self.residents.keep_within(body.memory_budget, job.control)
        return Done(), []

    # -- computing ----------------------------------------------------------------------------------------------

    def _patched(self, name: str, patches: Patches, job: Job) -> tuple[Predictor, Swap]:
        """The model of that name with these patches, and no others, on its weights."""
        predictor: Predictor = self.residents.model(name, Predictor)
        weights = self.residents[name].weights
        assert weights is not None
        meter = Meter(job, "laying patches on the weights", "", quiet_seconds=PATCHES_SECONDS)

        def told(done: int, total: int) -> None:
            self._beat()
            meter.at(done, total)

        swap = weights.wear(patches, self.patch_files, told)
        meter.finish()
        predictor.prepared.at_version(weights.version)
        if predictor.captured is not None:
            predictor.captured.at_version(weights.moved)
        return predictor, swap

    def _sample(self, body: Sample, tensors: list[Tensor], job: Job) -> tuple[Reply, list[Tensor]]:
        patched = partial(self._patched, body.model, body.patches, job)
        return run_sample(body, tensors, job, patched, self.control_nets, self.extras)

    def _forward(self, body: Forward, given: Callable[[], list[Tensor]], job: Job) -> tuple[Reply, list[Tensor]]:
        patched = partial(self._patched, body.model, body.patches, job)
        return run_forward(body, given, job, patched, self.control_nets, self.extras, self.device)

    def _keep_patches(self, body: PatchFilePart, tensors: list[Tensor], job: Job) -> tuple[Reply, list[Tensor]]:
        job.control.agreed(lambda: self.patch_files.add(body.file, body.part, tensors[body.data], last=body.last))
        return Done(), []

    def _decode(self, body: Decode, tensors: list[Tensor], job: Job) -> tuple[Reply, list[Tensor]]:
        return self.vaes.decode(body, tensors, job)

    def _encode(self, body: Encode, tensors: list[Tensor], job: Job) -> tuple[Reply, list[Tensor]]:
        return self.vaes.encode(body, tensors, job)
