"""A ComfyUI MODEL whose weights live in a backend: one request per model evaluation.

Stock samplers and guiders run on it as on any MODEL. What can't be sent is refused by its name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import comfy.model_management as mm
import torch

from ..parallel_backend import RemoteModel
from ..parallel_backend.errors import UnsupportedError
from .core_memory import WeightsElsewhere
from .core_model import base_model
from .hung.compute import compute_patches
from .hung.guidance import patching_functions
from .hung.layers import network_changes
from .hung.refusal import ELSEWHERE, IN_MESH_CONFIG, RELOAD, refuse
from .hung.weights import weight_patches


class RemotePatcher(WeightsElsewhere):
    """Refuses what would change weights."""

    @property
    def remote(self) -> RemoteModel:
        return self.model.as_made.network.remote  # also where a node has put something else in its place

    def model_dtype(self) -> torch.dtype:
        return self.model.as_made.network.dtype

    def partially_load(self, device_to: Any, extra_memory: int = 0, force_patch_weights: bool = False) -> Any:
        # Runs before every sampling, where `load` runs only after a change.
        self.refuse_patches()
        return super().partially_load(device_to, extra_memory, force_patch_weights)

    def pre_run(self) -> None:
        self.refuse_patches()  # once more: what wraps the sampling has begun by now
        self.model.as_made.unseen = True
        super().pre_run()

    def refuse_patches(self) -> None:
        """Raises UnsupportedError that names what hangs on this MODEL, or was done to its network, and ranks can't honour."""
        refuse(compute_patches(self), "A parallel MODEL", IN_MESH_CONFIG)
        refuse(weight_patches(self), "A parallel MODEL", ELSEWHERE)
        refuse(patching_functions(self), "A parallel MODEL", ELSEWHERE)
        refuse(network_changes(self.model), "A parallel MODEL", RELOAD)

    def add_patches(self, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0) -> NoReturn:
        self._refuse(f"a LoRA or weight patch on {len(patches)} weights")

    def get_key_patches(self, filter_prefix: str | None = None) -> NoReturn:
        self._refuse("merging models")

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("saving the model")

    def model_state_dict_for_saving(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("saving the model")

    def deepclone_multigpu(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("ComfyUI's own MultiGPU")

    def set_injections(self, key: str, injections: Any) -> NoReturn:
        self._refuse(f"injections ({key})")

    def patch_weight_to_device(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("patching a weight")

    def add_hook_patches(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("weight hooks")

    def patch_hooks(self, hooks: Any) -> None:
        if hooks is not None:
            self._refuse("hooks in the conditioning")
        self.current_hooks = None

    def unpatch_hooks(self, whitelist_keys_set: Any = None) -> None:
        self.current_hooks = None

    @staticmethod
    def _refuse(what: str) -> NoReturn:
        raise UnsupportedError(f"A parallel MODEL can't honour {what}.", ELSEWHERE)


def remote_patcher(remote: RemoteModel, path: Path, held_here: int) -> RemotePatcher:
    """The MODEL of a model that is loaded in a backend, in ComfyUI's list of loaded models.

    Args:
        held_here: bytes, as of `bytes_here`.
    Raises: CheckpointError: ComfyUI doesn't recognise the file.
    """
    model = base_model(remote, path)
    devices = {"load_device": mm.get_torch_device(), "offload_device": mm.unet_offload_device()}
    patcher = RemotePatcher(model, size=held_here, **devices)
    activations = patcher.memory_required()
    model.memory_required = lambda input_shape, cond_shapes=None: activations
    patcher.note_held()
    patcher.register()
    return patcher
