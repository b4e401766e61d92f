"""ComfyUI's memory manager, and weights that a backend holds on ComfyUI's own device: who counts them, who makes room."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.patcher_extension
import torch

from ..parallel_backend import Backend, RemoteModel, RemoteVAE
from ..parallel_backend.client.connection import Connection
from ..parallel_backend.errors import BackendError, CancelledError, OutOfMemoryError
from ..parallel_backend.rpc.runtime_dir import machine
from ..parallel_backend.rpc.state import RankState
from .node_text import say
from .parallel_mesh import ParallelMesh

# Left free for activations beside the weights, and for what other programs take meanwhile.
ACTIVATION_BYTES = 1536 * 2**20
ALL = 1e30


class WeightsElsewhere(comfy.model_patcher.ModelPatcher):
    """What ComfyUI's memory manager holds in its list for weights in a backend.

    Its size is the bytes that ranks on ComfyUI's own device hold of them, and 1 where none does. Asked to leave, they leave all
    ranks; loaded by ComfyUI, they are back. On its own GPU, room is asked for what the ranks compute there too.
    """

    @property
    def remote(self) -> RemoteModel | RemoteVAE:
        raise NotImplementedError

    def is_dynamic(self) -> bool:
        return False

    def is_clone(self, other: Any) -> bool:
        """Also where another MODEL has the same weights: ComfyUI's list then has them once."""
        return super().is_clone(other) or (
            isinstance(other, WeightsElsewhere) and same_weights(self.remote, other.remote)
        )

    def memory_required(self, input_shape: Any = None) -> int:
        return ACTIVATION_BYTES if self._is_here() and self.load_device.type == "cuda" else 0

    def current_loaded_device(self) -> Any:
        """Asked by ComfyUI before it makes room: weights that left without its doing do not count as loaded."""
        if self._is_here() and self.loaded_size() > 0 and not self._is_held():
            self._note_gone()
        return super().current_loaded_device()

    def get_free_memory(self, device: Any) -> float:
        return ALL  # cond and uncond always go out as one batch

    def pinned_memory_size(self) -> int:
        return 0

    def loaded_ram_size(self) -> int:
        return 0

    def partially_unload_ram(self, ram_to_unload: int, subsets: Any = None) -> int:
        return 0

    def partially_unload(self, device_to: Any, memory_to_free: int = 0, force_patch_weights: bool = False) -> int:
        return 0

    def load(
        self,
        device_to: Any = None,
        lowvram_model_memory: int = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        """Called by ComfyUI where it believes that they are not loaded, after it has made room."""
        if self._is_here() and not self._is_held():
            say(f"loading {self.remote.file} again on the ranks", log=True)
            interruptible(self.remote.backend, self.remote.ensure_loaded)
        self._note_loaded(device_to)
        for callback in self.get_all_callbacks(comfy.patcher_extension.CallbacksMP.ON_LOAD):
            callback(self, device_to, lowvram_model_memory, force_patch_weights, full_load)

    def detach(self, unpatch_all: bool = True) -> Any:
        """Called with `unpatch_all` by ComfyUI where it wants the room.

        Raises nothing: ComfyUI calls it between prompts, where an error would end the thread that runs them. Weights that
        could not leave still count as loaded.
        """
        stays = unpatch_all and self._is_here() and self.loaded_size() > 0 and not self._leave()
        return super().detach(unpatch_all and not stays)

    def _leave(self) -> bool:
        """Whether the backend has let them go; where it hasn't, the reason is in the log."""
        say(f"{self.remote.file} leaves the ranks: ComfyUI wants the room", log=True)
        try:
            self.remote.leave(mm.processing_interrupted)
        except CancelledError:
            return False
        except BackendError as error:
            say(f"{self.remote.file} did not leave the ranks: {error.brief}", log=True)
            return False
        return True

    def pre_run(self) -> None:
        """Called before each sampling, when ComfyUI has put this into its list."""
        super().pre_run()
        _hold_on(self)

    def register(self) -> None:
        """In ComfyUI's list of loaded models, and loaded; there until ComfyUI wants the room."""
        mm.load_models_gpu([self, *self._beside()], memory_required=self.memory_required())
        _hold_on(self)

    def _beside(self) -> list[WeightsElsewhere]:
        """What else is loaded in the same backend. ComfyUI lets nothing go that is named with this: the ranks do, where they
        lack room themselves."""
        listed = [loaded.model for loaded in list(mm.current_loaded_models)]
        others = [p for p in listed if isinstance(p, WeightsElsewhere) and not self.is_clone(p)]
        return [p for p in others if _place(p.remote) == _place(self.remote) and p.is_loaded()]

    def is_loaded(self) -> bool:
        """As far as ComfyUI knows, which asks the backend for that."""
        return self.current_loaded_device() == self.load_device and self.loaded_size() > 0

    def note_held(self) -> None:
        """A backend has just loaded them: ComfyUI need not make room."""
        self._note_loaded(self.load_device)

    def _note_loaded(self, device: Any) -> None:
        self.model.device = device
        self.model.model_loaded_weight_memory = self.model_size()
        self.model.model_lowvram = False
        # As if nothing lay on the weights, whatever evaluations bring with them. A patcher that a pack makes around the same model then
        # takes it as loaded; with another uuid here, it would put weights of zeros into the layers.
        self.model.current_weight_patches_uuid = None

    def _note_gone(self) -> None:
        self.model.device = self.offload_device
        self.model.model_loaded_weight_memory = 0
        self.model.current_weight_patches_uuid = None

    def _is_here(self) -> bool:
        return self.model_size() > 1

    def _is_held(self) -> bool:
        """By the backend; what it doesn't answer changes nothing."""
        with contextlib.suppress(BackendError):
            return self.remote.is_held(mm.processing_interrupted)
        return True


def _place(remote: RemoteModel | RemoteVAE) -> tuple[str, str]:
    return remote.backend.spec.name, remote.backend.spec.address


def same_weights(one: RemoteModel | RemoteVAE, other: RemoteModel | RemoteVAE) -> bool:
    """Whether a backend holds them once for both."""
    return (_place(one), one.name) == (_place(other), other.name)


def _hold_on(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """ComfyUI's list refers to it weakly, and a backend's weights stay after their workflow has gone: the list's own entry
    keeps what they can be let go by, until they are."""
    root = patcher
    while root.parent is not None:
        root = root.parent
    for loaded in mm.current_loaded_models:
        if loaded.model is patcher:
            loaded.weights_elsewhere = root


# -- on ComfyUI's own device ------------------------------------------------------------------------------------------


def own_card() -> tuple[str, str]:
    """What ComfyUI computes on: the type of device, and the uuid of a GPU."""
    device = mm.get_torch_device()
    card = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return device.type, str(getattr(card, "uuid", ""))


def free_here() -> int:
    """Bytes that any process could take of the GPU that ComfyUI computes on."""
    return torch.cuda.mem_get_info(mm.get_torch_device())[0]


def ranks_here(ranks: Sequence[RankState]) -> list[RankState]:
    """Those on ComfyUI's own card, whatever number either side knows it by; on a CPU, those of this machine."""
    kind, uuid = own_card()
    if kind == "cuda" and not uuid:
        return []  # which one it is can't be told
    return [r for r in ranks if r.machine == machine() and (r.device.split(":")[0], r.uuid) == (kind, uuid)]


def bytes_here(remote: RemoteModel | RemoteVAE) -> int:
    """What ranks on ComfyUI's own device hold of it; 1 where none does, since ComfyUI measures what has no size."""
    return max(1, sum(remote.loaded.resident_bytes[rank.rank] for rank in ranks_here(remote.backend.status().ranks)))


def make_room(backend: Backend, rank_bytes: int, held_as: str) -> str:
    """ComfyUI's own models leave the GPU that they share with ranks, as far as those lack room for `rank_bytes` each.

    Args:
        held_as: how the backend's name of it begins; what is held already needs no room.
    Returns: what was done, for the node to show; empty where nothing was needed.
    """
    state = backend.status()
    here = [rank for rank in ranks_here(state.ranks) if rank.uuid]
    needed = (rank_bytes + ACTIVATION_BYTES) * len(here)
    if not here or any(model.model.startswith(held_as) for model in state.models) or free_here() >= needed:
        return ""
    mm.soft_empty_cache()
    free = free_here()
    if free >= needed or not _let_own_models_leave(needed):
        return ""
    places = ", ".join(f"rank {rank.rank} on {rank.device}" for rank in here)
    return f"unloaded models of ComfyUI's own: {needed / 2**20:.0f} MiB are needed for {places} ({free / 2**20:.0f} MiB free)"


def interruptible(backend: Connection, request: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """request(*args, **kwargs) of that backend, given up when ComfyUI is interrupted; then ComfyUI's own exception is raised.

    Where a rank lacks memory while ComfyUI's own models (a text encoder, perhaps) hold some of the same device, these leave and
    the request is made once more.
    """
    asked = partial(request, *args, should_cancel=mm.processing_interrupted, **kwargs)
    try:
        with ParallelMesh.noting_refusals(backend.spec):
            return _with_room(backend, asked)
    except CancelledError:
        mm.throw_exception_if_processing_interrupted()
        raise


def _with_room(backend: Connection, request: Callable[[], Any]) -> Any:
    try:
        return request()
    except OutOfMemoryError as error:
        if not _has_ranks_here(backend) or not _let_own_models_leave(ALL):
            raise
        say(f"unloaded ComfyUI's own models, and once more: {error.message}", log=True)
        return request()


def _has_ranks_here(backend: Connection) -> bool:
    """False also where the backend does not answer any more."""
    try:
        return bool(ranks_here(backend.status(mm.processing_interrupted).ranks))
    except BackendError:
        return False


def _let_own_models_leave(needed: float) -> bool:
    """ComfyUI frees `needed` bytes of its device of its own models; those in backends stay. Whether it freed any."""
    elsewhere = [loaded for loaded in mm.current_loaded_models if isinstance(loaded.model, WeightsElsewhere)]
    before = _own_loaded_bytes()
    mm.free_memory(needed, mm.get_torch_device(), keep_loaded=elsewhere)
    mm.soft_empty_cache()
    return _own_loaded_bytes() < before


def _own_loaded_bytes() -> int:
    """What ComfyUI's own models hold of its device, as it counts it."""
    patchers = [loaded.model for loaded in mm.current_loaded_models if loaded.device == mm.get_torch_device()]
    return sum(p.loaded_size() for p in patchers if p is not None and not isinstance(p, WeightsElsewhere))
