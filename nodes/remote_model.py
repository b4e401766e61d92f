"""A ComfyUI MODEL whose weights live in a backend: one request per model evaluation.

Stock samplers and guiders run on it as on any MODEL. What can't be sent is refused by its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import comfy.latent_formats
import comfy.model_detection
import comfy.model_management as mm
import comfy.patcher_extension
import comfy.supported_models
import torch
from torch import Tensor

from ..parallel_backend import RemoteModel
from ..parallel_backend.checkpoint_files.diffusion_part import diffusion_entries
from ..parallel_backend.errors import CheckpointError, UnsupportedError
from .core_memory import WeightsElsewhere, interruptible
from .hung.attention_patches import transformer_patches
from .hung.refusal import ELSEWHERE, refuse
from .hung.weights import weight_patches

FROM_SCRATCH, SDXL = "sd3-from-scratch", "sdxl"
# Beside an SDXL model in its file: they tell ComfyUI what its output means.
_OUTPUT_MARKS = ("v_pred", "ztsnr")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def meta_state_dict(path: Path) -> dict[str, Tensor]:
    """The diffusion model's tensors without their values: what ComfyUI recognises a model by."""
    return {
        name: torch.empty(entry["shape"], dtype=_DTYPES.get(entry["dtype"], torch.float32), device="meta")
        for name, entry in diffusion_entries(path, _OUTPUT_MARKS).items()
    }


class RemoteDiffusionModel(torch.nn.Module):
    """Stands where ComfyUI expects the network; has its names and shapes, and no weights."""

    def __init__(self, remote: RemoteModel, meta: dict[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.remote, self.meta, self.dtype = remote, meta, dtype

    def __getattr__(self, name: str) -> Any:
        # Only names found nowhere else come here. Somebody who reaches for a layer would patch it without effect.
        if any(key.split(".", 1)[0] == name for key in self.__dict__.get("meta", ())):
            raise UnsupportedError(f"A node reaches for the layer {name!r} of a parallel MODEL.", ELSEWHERE)
        return super().__getattr__(name)

    def state_dict(  # type: ignore[override]
        self, *args: Any, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        destination = {} if destination is None else destination
        destination.update({prefix + key: value for key, value in self.meta.items()})
        return destination

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options = transformer_options or {}
        # Checked here too: some guiders add their patches while they sample.
        refuse(_unsendable(control, options, kwargs), "A parallel MODEL", ELSEWHERE)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self._remote_forward,
            self,
            comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options),
        )
        return executor.execute(x, timesteps, context, y, control, options)

    def _remote_forward(self, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor, *_: Any, **__: Any) -> Tensor:
        out = interruptible(self.remote.backend, self.remote.forward, x, timesteps, context, y)
        return out.to(device=x.device, dtype=x.dtype)


def _unsendable(control: Any, options: dict[str, Any], kwargs: dict[str, Any]) -> Iterator[str]:
    if control is not None:
        yield "a ControlNet"
    yield from transformer_patches(options)
    yield from (f"the model argument {name!r}" for name, value in kwargs.items() if value is not None)


class RemotePatcher(WeightsElsewhere):
    """Refuses what would change weights."""

    @property
    def remote(self) -> RemoteModel:
        return self.model.diffusion_model.remote

    def partially_load(self, device_to: Any, extra_memory: int = 0, force_patch_weights: bool = False) -> Any:
        # Runs before every sampling, where `load` runs only after a change.
        refuse(weight_patches(self), "A parallel MODEL", ELSEWHERE)
        return super().partially_load(device_to, extra_memory, force_patch_weights)

    def add_patches(self, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0) -> NoReturn:
        self._refuse(f"a LoRA or weight patch on {len(patches)} weights")

    def get_key_patches(self, filter_prefix: str | None = None) -> NoReturn:
        self._refuse("merging models")

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("saving the model")

    def model_state_dict_for_saving(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("saving the model")

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("force_deepcopy"):
            self._refuse("training: a copy with weights of its own")
        return super().clone(*args, **kwargs)

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
    if remote.family == FROM_SCRATCH:
        meta, config = {}, from_scratch_config()
    else:
        meta = meta_state_dict(path)
        config = comfy.model_detection.model_config_from_unet(meta, "")
        config = config or comfy.model_detection.model_config_from_diffusers_unet(meta)
        if config is None and remote.family == SDXL:
            config = narrow_sdxl_config()
    if config is None:
        raise CheckpointError(f"ComfyUI doesn't recognise the model in {path.name}.", "Update ComfyUI.")
    dtype = getattr(torch, remote.load.dtype)
    config.set_inference_dtype(dtype, None)
    config.unet_config["disable_unet_model_creation"] = True
    model = config.get_model(meta, "")
    model.diffusion_model = RemoteDiffusionModel(remote, meta, dtype)
    devices = {"load_device": mm.get_torch_device(), "offload_device": mm.unet_offload_device()}
    patcher = RemotePatcher(model, size=held_here, **devices)
    activations = patcher.memory_required()
    model.memory_required = lambda input_shape, cond_shapes=None: activations
    patcher.note_held()
    patcher.register()
    return patcher


class FromScratchLatent(comfy.latent_formats.Flux):
    """FLUX's VAE as the from-scratch models were trained with it: the shift is added after the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.shift_factor: float = -0.1159 / self.scale_factor


def from_scratch_config() -> Any:
    """SD3's class of sampling, at shift 1, for a family that ComfyUI has no detection for."""
    config = comfy.supported_models.SD3({"in_channels": 16})
    config.latent_format = FromScratchLatent()
    config.sampling_settings = {"shift": 1.0}
    return config


def narrow_sdxl_config() -> Any:
    """SDXL's class of sampling, for a UNet of its layout at widths that ComfyUI has no detection for."""
    return comfy.supported_models.SDXL({"in_channels": 4, "adm_in_channels": 2816})
