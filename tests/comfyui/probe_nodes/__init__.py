"""Nodes that tests of workflows use in place of text encoders, and to hang refused things on conditioning."""

import comfy.clip_model
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


class WeightPatch(AttentionPatch):
    def patch(self, model):
        patched = model.clone()
        key = "diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"
        patched.add_patches({key: ("diff", (torch.zeros(768, 256),))}, 1.0)
        return (patched,)


NODE_CLASS_MAPPINGS = {
    f"Probe{cls.__name__}": cls for cls in (RandomConditioning, RandomLatent, RandomImage, AttentionPatch, WeightPatch)
}
