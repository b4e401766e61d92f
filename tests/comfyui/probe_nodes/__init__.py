"""Nodes that tests of workflows use in place of text encoders, and to hang refused things on conditioning."""

import copy
import json

import comfy.clip_model
import comfy.model_base
import comfy.model_management as mm
import comfy.ops
import torch

# As the tests' files of text encoders have: true widths, and few layers.
FEW_LAYERS = {"num_hidden_layers": 3}
_made = comfy.clip_model.CLIPTextModel.__init__


def _made_with_few_layers(self, config_dict, *args):
    _made(self, {**config_dict, **FEW_LAYERS}, *args)


comfy.clip_model.CLIPTextModel.__init__ = _made_with_few_layers


class RandomConditioning:
    """SD3 conditioning from a seed: `tokens` of context and the pooled prompt."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"seed": ("INT", {"default": 0}), "tokens": ("INT", {"default": 77})},
            "optional": {
                **{name: ("BOOLEAN", {"default": False}) for name in ("nan", "hooked")},
                **{
                    name: ("INT", {"default": width, "max": 10000})
                    for name, width in (("width", 4096), ("pooled", 2048))
                },
            },
        }

    def make(self, seed, tokens, nan=False, hooked=False, width=4096, pooled=2048):
        generator = torch.Generator().manual_seed(seed)
        context = torch.randn(1, tokens, width, generator=generator)
        pooled = torch.randn(1, pooled, generator=generator)
        if nan:
            context[0, 0, 0] = float("nan")
        extras = {"pooled_output": pooled, "width": 1024, "area": (64, 64, 0, 0), "hooks": object()} if hooked else {}
        return ([[context, {"pooled_output": pooled, **extras}]],)


class RandomLatent:
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "make"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        sizes = {name: ("INT", {"default": value}) for name, value in (("channels", 16), ("height", 16), ("width", 16))}
        return {"required": {"seed": ("INT", {"default": 0}), **sizes}}

    def make(self, seed, channels, height, width):
        generator = torch.Generator().manual_seed(seed)
        return ({"samples": torch.randn(1, channels, height, width, generator=generator)},)


class RandomImage(RandomLatent):
    RETURN_TYPES = ("IMAGE",)

    def make(self, seed, channels, height, width):
        return (torch.rand(1, height, width, channels, generator=torch.Generator().manual_seed(seed)),)


class AttentionPatch:
    """A MODEL with a patch inside its attention: what a parallel MODEL must refuse."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model):
        patched = model.clone()
        patched.set_model_attn1_patch(lambda q, k, v, extra: (q, k, v))
        return (patched,)


class ChangedModel(AttentionPatch):
    """A MODEL that ParallelizeModel can't take, of the named kind; the one that came in stays as it is."""

    @classmethod
    def INPUT_TYPES(cls):
        kinds = [
            "no file",
            "another loader",
            "own operations",
            "another family",
            "a replaced forward",
            "weights copied",
        ]
        return {"required": {"model": ("MODEL",), "how": (kinds,)}}

    def patch(self, model, how):
        changed = model.clone()
        # Left by the core on the patcher; on older ones by this pack, on the network.
        by_core = hasattr(model, "cached_patcher_init")
        left = getattr(model, "cached_patcher_init", None) or getattr(model.model, "parallel_mmdit_loaded_by", None)
        load, (path, _) = left or (None, (None, None))
        told = {
            "no file": None,
            "another loader": (json.loads, (path,)),
            "own operations": (load, (path, {"custom_operations": comfy.ops.manual_cast})),
        }
        if how in told and by_core:
            changed.cached_patcher_init = told[how]
        else:
            changed.model = copy.copy(model.model)
        if how in told and not by_core:
            changed.model.parallel_mmdit_loaded_by = told[how]
        if how == "another family":
            changed.model.__class__ = comfy.model_base.Flux
        elif how == "a replaced forward":
            # The attribute alone: the module's own __setattr__ would reach the MODEL that came in.
            changed.model._modules = {**model.model._modules, "diffusion_model": copy.copy(model.model.diffusion_model)}
            changed.model.diffusion_model.forward = lambda *args: args
        elif how == "weights copied":
            for layer in changed.model.diffusion_model.modules():
                for name, weight in layer._parameters.items():
                    if hasattr(weight, "tensor_type"):
                        copied = weight.as_subclass(torch.Tensor).clone().as_subclass(type(weight))
                        copied.tensor_type, copied.tensor_shape = weight.tensor_type, weight.tensor_shape
                        layer._parameters[name] = copied
        return (changed,)


class ModelClass:
    """What kind of MODEL came in."""

    RETURN_TYPES = ()
    FUNCTION = "ask"
    CATEGORY = "probe"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def ask(self, model):
        return {"ui": {"text": [type(model).__name__]}}


class CoreMemory:
    """What ComfyUI's memory manager believes to be loaded of parallel models, in MiB, before and after it wants all room."""

    RETURN_TYPES = ()
    FUNCTION = "ask"
    CATEGORY = "probe"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"how": (["look", "free_memory", "unload_all_models"],)}}

    @classmethod
    def IS_CHANGED(cls, how):
        return float("nan")

    def ask(self, how):
        before = self.loaded()
        if how == "free_memory":
            mm.free_memory(1e18, mm.get_torch_device())
        if how == "unload_all_models":
            mm.unload_all_models()
        return {"ui": {"text": [json.dumps([before, self.loaded()])]}}

    @staticmethod
    def loaded():
        ours = [m for m in mm.loaded_models() if type(m).__name__ in ("RemotePatcher", "VAEWeights")]
        return sorted((type(m).__name__, m.loaded_size() / 2**20) for m in ours)


NODE_CLASS_MAPPINGS = {
    f"Probe{cls.__name__}": cls
    for cls in (
        *(RandomConditioning, RandomLatent, RandomImage, AttentionPatch, CoreMemory),
        *(ChangedModel, ModelClass),
    )
}
