"""A ComfyUI MODEL whose weights live in a backend: one request a sampling, or one an evaluation.

Stock samplers and guiders run on it as on any MODEL. What can't be sent is refused by its name.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import comfy.model_management as mm
import comfy.utils
import torch
from comfy.hooks import HookGroup
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..parallel_backend import RemoteControl, RemoteModel, WeightPatches
from ..parallel_backend.errors import BackendError, UnsupportedError
from ..parallel_backend.rpc.messages import Forget, LoadControl
from .base_weights import BaseWeights
from .core_memory import WeightsElsewhere, interruptible, make_room
from .core_model import base_model
from .hung.controlnet import ControlCost
from .hung.extra_cost import ExtraCost
from .hung.later_evaluations import hung_by_functions
from .hung.layers import network_changes
from .hung.loop_patches import OWN
from .hung.patcher import check_patcher
from .hung.patches import FORWARD
from .hung.rau_net import is_forward
from .hung.refusal import ELSEWHERE, RELOAD, refuse
from .hung.weights import PREFIX, PatchedWeights, all_patches, weight_patches
from .model_files import name_elsewhere
from .node_text import say
from .whole_loop import sample_in_backend

# Sets of weight patches that are kept ready, with the tensors that they are made of: those of hooks take turns in a sampling.
KEPT_SETS = 4


class RemotePatcher(WeightsElsewhere):
    """Its patches of weights go to the backend; what would change its network otherwise is refused."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sets: OrderedDict[Any, WeightPatches] = OrderedDict()
        self.sample_in_backend()

    def sample_in_backend(self) -> None:
        """Stock samplers hand their whole loop over where the backend knows all of it."""
        self.wrappers.setdefault(WrappersMP.OUTER_SAMPLE, {})[OWN] = [sample_in_backend]

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("force_deepcopy"):
            self._refuse("training: a copy with weights of its own")
        copy = super().clone(*args, **kwargs)
        copy._sets = self._sets
        return copy

    def add_object_patch(self, name: str, obj: Any) -> None:
        """A layer here computes nothing: what is put in the place of its forward, where the ranks know it, hangs with the other patches."""
        block = re.fullmatch(r"diffusion_model\.(input|output)_blocks\.(\d+)\.\d+\.forward", name)
        if block is not None and is_forward(obj):
            self.set_model_patch_replace(obj, FORWARD, block[1], int(block[2]))
        else:
            super().add_object_patch(name, obj)

    @property
    def network(self) -> Any:
        """The one that it was made with, also where a node has put another in its place."""
        return self.model.as_made.network

    @property
    def remote(self) -> RemoteModel:
        return self.network.remote

    def model_dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def base(self) -> BaseWeights:
        return self.model.base_weights

    def check(self) -> None:
        """Raises: UnsupportedError: what no path to the backend can honour hangs on it."""
        check_patcher(self)
        refuse(network_changes(self.model), "A parallel MODEL", RELOAD)

    def partially_load(self, device_to: Any, extra_memory: int = 0, force_patch_weights: bool = False) -> Any:
        # Runs before every sampling, where `load` runs only after a change.
        self.check()
        self._wear(self.current_hooks)
        if force_patch_weights and not hasattr(ModelPatcher, "state_dict_for_saving"):
            # Older cores load a MODEL so, and then ask not the patcher but its model what to save.
            self.model.state_dict_for_saving = partial(_saved_by_older_cores, self)
        return super().partially_load(device_to, extra_memory, force_patch_weights)

    def pre_run(self) -> None:
        self.check()  # once more: what wraps the sampling has begun by now
        self.model.as_made.forget_comparison()
        self.network.told, self.network.control_cost, self.network.extra_cost = {}, ControlCost(), ExtraCost()
        self.network.untried = hung_by_functions(self.model_options)
        self._wear(self.current_hooks)
        super().pre_run()

    def cleanup(self) -> None:
        """After a sampling, however it ended."""
        super().cleanup()
        if names := list(self.network.of_sampling):
            self.network.of_sampling.clear()
            with suppress(BackendError):  # one that has ended keeps nothing
                self.remote.backend.request(Forget(names))

    def patch_hooks(self, hooks: HookGroup | None) -> None:
        self.current_hooks = hooks
        self._wear(hooks)

    def unpatch_hooks(self, whitelist_keys_set: Any = None) -> None:
        self.patch_hooks(None)

    def _wear(self, hooks: HookGroup | None) -> None:
        """The evaluations that follow are of weights with these hooks' patches on them."""
        self.network.worn = self.patches_with(hooks)

    def patches_with(self, hooks: HookGroup | None) -> WeightPatches:
        """What lies on the weights: the MODEL's own patches, and those of the hooks at their present strengths."""
        of_hooks = [(hook.hook_ref, hook.strength) for hook in hooks.hooks] if hooks is not None else []
        key = (self.patches_uuid, *(held for held in of_hooks if held[0] in self.hook_patches))
        if key not in self._sets:
            shapes = {name: tensor.shape for name, tensor in self.network.state_dict().items()}
            place = (mm.get_torch_device(), self.network.dtype)
            self._sets[key] = weight_patches(all_patches(self, hooks), shapes, self.base, *place)
        self._sets.move_to_end(key)
        while len(self._sets) > KEPT_SETS:
            self._sets.popitem(last=False)
        return self._sets[key]

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, list[Any]]:
        """Of each weight the checkpoint's own, mapped, and the patches on it: what merges start from."""
        keys = [key for key in self.model_state_dict() if filter_prefix is None or key.startswith(filter_prefix)]
        return {key: [(self._weight(key), _as_it_is), *self.patches.get(key, [])] for key in keys}

    def _weight(self, key: str) -> Tensor:
        return self.base[key.removeprefix(PREFIX)] if key.startswith(PREFIX) else comfy.utils.get_attr(self.model, key)

    def control_net(self, path: Path) -> RemoteControl:
        """The ControlNet of that file, computed by the ranks.

        Raises: CheckpointError, UnsupportedError: they know no such ControlNet, or none for this model.
        """
        backend = self.remote.backend
        load = LoadControl(str(path), backend.key(path), self.remote.name)
        if room := make_room(backend, path.stat().st_size, load.held_as):
            say(room, log=True)
        return interruptible(backend, backend.load_control, path, self.remote, name_elsewhere(path))

    def patched_weights(self) -> Mapping[str, Tensor]:
        """The weights with all that lies on them, by their names in the network; each is made when it is asked for."""
        patched = {key.removeprefix(PREFIX): entries for key, entries in all_patches(self, None).items()}
        return PatchedWeights(self.base, patched, mm.get_torch_device(), self.network.dtype)

    def model_state_dict_for_saving(self, model: Any = None, prefix: str = "") -> dict[str, Tensor]:
        """The patched weights, in the dtype in which ComfyUI would hold them itself.

        Raises: UnsupportedError: of a family that ComfyUI has no network for.
        """
        if not self.base:
            self._refuse("saving: ComfyUI has no file layout for it")
        if self.base.is_quantised:
            self._refuse("saving: its file is quantised, and saved weights are not")
        patched = {key.removeprefix(PREFIX): entries for key, entries in self.patches.items()}
        weights = PatchedWeights(self.base, patched, mm.get_torch_device(), self._own_dtype())
        saved = {name: weights[name] for name in self.network.state_dict()}
        return saved if prefix else {PREFIX + name: tensor for name, tensor in saved.items()}

    def _own_dtype(self) -> Any:
        return mm.unet_dtype(
            model_params=sum(tensor.numel() for tensor in self.network.state_dict().values()),
            supported_dtypes=list(self.model.model_config.supported_inference_dtypes),
            weight_dtype=comfy.utils.weight_dtype(self.base),
        )

    def deepclone_multigpu(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("ComfyUI's own MultiGPU")

    def patch_weight_to_device(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("patching a weight in place")

    @staticmethod
    def _refuse(what: str) -> NoReturn:
        raise UnsupportedError(f"A parallel MODEL can't honour {what}.", ELSEWHERE)


def _saved_by_older_cores(patcher: RemotePatcher, *parts: Any) -> dict[str, Tensor]:
    """As their models give it, with the patched weights where those have their network's own."""
    saved, model = patcher.model_state_dict_for_saving(prefix=PREFIX), patcher.model
    network = SimpleNamespace(state_dict=lambda: saved)
    like = SimpleNamespace(diffusion_model=network, model_config=model.model_config, model_type=model.model_type)
    return type(model).state_dict_for_saving(like, *parts)


def _as_it_is(weight: Tensor, **_: Any) -> Tensor:
    return weight


def remote_patcher(remote: RemoteModel, path: Path, held_here: int) -> RemotePatcher:
    """The MODEL of a model that is loaded in a backend, in ComfyUI's list of loaded models.

    Args:
        held_here: bytes, as of `bytes_here`.
    Raises: CheckpointError: ComfyUI doesn't recognise the file.
    """
    model = base_model(remote, path)
    model.base_weights = BaseWeights(path, model.model_config.unet_config)
    devices = {"load_device": mm.get_torch_device(), "offload_device": mm.unet_offload_device()}
    patcher = RemotePatcher(model, size=held_here, **devices)
    activations = patcher.memory_required()
    model.memory_required = lambda input_shape, cond_shapes=None: activations
    patcher.note_held()
    patcher.register()
    return patcher
