"""ComfyUI's memory manager, and weights that a backend holds on ComfyUI's own device: who counts them, who makes room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.patcher_extension
import torch

from ..parallel_backend import Backend, RemoteModel, RemoteVAE
from ..parallel_backend.errors import CancelledError, OutOfMemoryError
from ..parallel_backend.rpc.messages import RankState
from ..parallel_backend.rpc.runtime_dir import machine
from .node_text import say

# Left free for activations beside the weights, and for what other programs take meanwhile.
ACTIVATION_BYTES = 1536 * 2**20
ALL = 1e30


class WeightsElsewhere(comfy.model_patcher.ModelPatcher):
    """What ComfyUI's memory manager holds in its list for weights in a backend.

    Its size is the bytes that ranks on ComfyUI's own device hold of them, and 1 where none does. Asked to leave, they leave all
    ranks; loaded by ComfyUI, they are back. No room is asked for what they compute: that is the ranks'.
    """

    @property
    def remote(self) -> RemoteModel | RemoteVAE:
        raise NotImplementedError

    def is_dynamic(self) -> bool:
        return False

    def is_clone(self, other: Any) -> bool:
        """Also where another MODEL has the same weights: ComfyUI's list then has them once."""
        return super().is_clone(other) or (isinstance(other, WeightsElsewhere) and _same(self.remote, other.remote))

    def memory_required(self, input_shape: Any) -> int:
        return 0

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
        if self._is_here():
            interruptible(self.remote.ensure_loaded)
        self._note_loaded(device_to)
        for callback in self.get_all_callbacks(comfy.patcher_extension.CallbacksMP.ON_LOAD):
            callback(self, device_to, lowvram_model_memory, force_patch_weights, full_load)

    def detach(self, unpatch_all: bool = True) -> Any:
        """Called with `unpatch_all` by ComfyUI where it wants the room."""
        leaves = unpatch_all and self._is_here() and self.loaded_size() > 0
        model = super().detach(unpatch_all)
        if leaves:
            interruptible(self.remote.leave)
        return model

    def pre_run(self) -> None:
        """Called before each sampling, when ComfyUI has put this into its list."""
        super().pre_run()
        _hold_on(self)

    def register(self) -> None:
        """In ComfyUI's list of loaded models, and loaded; there until ComfyUI wants the room."""
        mm.load_models_gpu([self])
        _hold_on(self)

    def note_held(self) -> None:
        """A backend has just loaded them: ComfyUI need not make room."""
        self._note_loaded(self.load_device)

    def _note_loaded(self, device: Any) -> None:
        self.model.device = device
        self.model.model_loaded_weight_memory = self.model_size()
        self.model.model_lowvram = False
        self.model.current_weight_patches_uuid = self.patches_uuid

    def _is_here(self) -> bool:
        return self.model_size() > 1


def _same(one: RemoteModel | RemoteVAE, other: RemoteModel | RemoteVAE) -> bool:
    places = [(remote.backend.spec.name, remote.backend.spec.address, remote.name) for remote in (one, other)]
    return places[0] == places[1]


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


def bytes_here(backend: Backend, remote: RemoteModel | RemoteVAE) -> int:
    """What ranks on ComfyUI's own device hold of it; 1 where none does, since ComfyUI measures what has no size."""
    return max(1, sum(remote.loaded.resident_bytes[rank.rank] for rank in ranks_here(backend.status().ranks)))


def make_room(backend: Backend, rank_bytes: int, name: str) -> str:
    """ComfyUI's own models leave the GPU that they share with ranks, as far as those lack room for `rank_bytes` each.

    Args:
        name: of the file; what the backend holds already needs no room.
    Returns: what was done, for the node to show; empty where nothing was needed.
    """
    state = backend.status()
    here = [rank for rank in ranks_here(state.ranks) if rank.uuid]
    needed = (rank_bytes + ACTIVATION_BYTES) * len(here)
    if not here or name in [model.name for model in state.models] or free_here() >= needed:
        return ""
    mm.soft_empty_cache()
    free = free_here()
    if free >= needed or not _let_own_models_leave(needed):
        return ""
    places = ", ".join(f"rank {rank.rank} on {rank.device}" for rank in here)
    return f"unloaded models of ComfyUI's own: {needed / 2**20:.0f} MiB are needed for {places} ({free / 2**20:.0f} MiB free)"


def interruptible(request: Any, *args: Any, **kwargs: Any) -> Any:
    """request(*args, **kwargs), given up when ComfyUI is interrupted; then ComfyUI's own exception is raised.

    Where a rank lacks memory while ComfyUI's own models (a text encoder, perhaps on the same GPU) hold some, these leave and
    the request is made once more.
    """
    asked = partial(request, *args, should_cancel=mm.processing_interrupted, **kwargs)
    try:
        return _with_room(asked)
    except CancelledError:
        mm.throw_exception_if_processing_interrupted()
        raise


def _with_room(request: Callable[[], Any]) -> Any:
    try:
        return request()
    except OutOfMemoryError as error:
        if not _let_own_models_leave(ALL):
            raise
        say(f"unloaded ComfyUI's own models, and once more: {error.message}", log=True)
        return request()


def _let_own_models_leave(needed: float) -> bool:
    """ComfyUI frees `needed` bytes of each device that its own models are on; those in backends stay. Whether any left."""
    elsewhere = [loaded for loaded in mm.current_loaded_models if isinstance(loaded.model, WeightsElsewhere)]
    own = [loaded for loaded in mm.current_loaded_models if loaded not in elsewhere]
    for device in {loaded.device for loaded in own}:
        mm.free_memory(needed, device, keep_loaded=elsewhere)
    mm.soft_empty_cache()
    return len(mm.current_loaded_models) < len(own) + len(elsewhere)
