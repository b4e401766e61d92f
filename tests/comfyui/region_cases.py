"""Regional prompts and NegPiP by the packs' own nodes, for twins.py: each pack's folder stands in an environment variable."""

import importlib
import os
import sys
import types

import comfy.ldm.cosmos.predict2 as predict2
import meshes
import torch
from twins import call

MODELS = {name: files for name, files in meshes.models().items() if name.startswith("sdxl")}
# At the second scale 11 x 7 tokens, at the third 6 x 4.
ODD = (21, 13)


def part(variable, name, **constants):
    """A module of the pack in that folder, without all that the pack's own first file imports; None where no folder is named."""
    folder = os.environ.get(variable)
    if folder is None:
        return None
    pack = os.path.abspath(folder).replace(".", "_x_")
    if pack not in sys.modules:
        sys.modules[pack] = types.ModuleType(pack)
        vars(sys.modules[pack]).update(constants, __path__=[folder])
    return importlib.import_module(f"{pack}.{name}")


def packs():
    """cgem156's, ComfyUI-ppm's two and prompt-control's modules; None of those that aren't there."""
    # ComfyUI-ppm imports it for models of another family; newer cores haven't it.
    vars(predict2).setdefault("apply_rotary_pos_emb", None)
    names = {"SYMBOL": "", "NODE_SURFIX": "", "ROOT_NAME": ""}
    cgem = part("CGEM156_PATH", "scripts.attention_couple.node", **names)
    ppm = part("PPM_PATH", "src.nodes_ppm.attention_couple_ppm")
    negpip = part("PPM_PATH", "src.negpip.unet_negpip")
    return cgem, ppm, negpip, part("PROMPT_CONTROL_PATH", "prompt_control.attention_couple_ppm")


def cases(twins):
    """On the first mesh each kind, on others two."""
    cgem, ppm, negpip, control = packs()
    for number, name in enumerate(MODELS):
        is_first = number == 0
        if cgem is not None:
            coupled = cgem_coupled(twins, cgem, (128, 96))
            yield name, "AttentionCouple of cgem156", coupled, {"of": sized(twins, 16, 12)}
        if ppm is not None:
            yield name, "AttentionCouplePPM", ppm_coupled(twins, ppm), {"of": sized(twins, *ODD)}
            if is_first:
                yield from ((name, *case) for case in negpip_cases(twins, ppm, negpip))
        if control is not None and is_first:
            yield name, "prompt-control's masks", lambda model: model, {"of": masked(twins, control)}


def negpip_cases(twins, ppm, negpip):
    """With regional prompts, and what isn't known of the two."""
    split, coupled = with_negpip(negpip), ppm_coupled(twins, ppm)
    yield "CLIPNegPip", split, {"of": doubled(twins)}
    yield "CLIPNegPip and AttentionCouplePPM", ppm_coupled(twins, ppm, of=split), {"of": doubled(twins)}
    yield "the other way round", lambda model: split(coupled(model)), {"of": doubled(twins)}
    yield "two AttentionCouplePPM", lambda model: coupled(coupled(model)), {"of": parallel_alone(twins)}


def masks(sides):
    """Three that overlap, over the whole picture."""
    drawn = torch.rand(3, 1, *sides, generator=torch.Generator().manual_seed(4))
    drawn[0, 0, : sides[0] // 2] = 0.0
    drawn[1, 0, :, : sides[1] // 3] = 0.0
    return [*(drawn + torch.tensor([0.0, 0.0, 0.05])[:, None, None, None])]


def regions(twins, model):
    """Two prompts, of other lengths than each other and the picture's own."""
    return [twins.prompt(model, seed, tokens, strength=s) for seed, tokens, s in ((3, 12, 1.0), (4, 36, 0.8))]


def cgem_coupled(twins, node, sides):
    base, one, two = masks(sides)

    def change(model):
        first, second = regions(twins, model)
        given = {"cond_1": first, "mask_1": one, "cond_2": second, "mask_2": two}
        return call(node.AttentionCouple, model=model, base_mask=base, **given)

    return change


def ppm_coupled(twins, node, of=lambda model: model):
    base, one, two = masks(ODD)

    def change(model):
        first, second = regions(twins, model)
        base_cond = twins.prompt(model, 1, strength=0.9)
        given = {"base_cond": base_cond, "cond_1": first, "mask_1": one, "cond_2": second, "mask_2": two}
        return call(node.AttentionCouplePPM, model=of(model), base_mask=base, **given)

    return change


def with_negpip(module):
    """What the pack's node does with a MODEL; text encoders, which it changes too, there are none here."""

    def change(model):
        changed = model.clone()
        changed.model_options["ppm_negpip"] = True
        changed.set_model_attn2_patch(module.sdxl_attn2_negpip)
        return changed

    return change


def sized(twins, rows, columns):
    def run(model, **settings):
        return twins.sample(model, latent=twins.latent(model, rows, columns), **settings)

    return run


def doubled(twins):
    """Prompts as NegPiP's encoders make them, keys and values in turn."""

    def run(model, **settings):
        positive, negative = twins.prompt(model, 1, 48), twins.prompt(model, 2, 48)
        latent = twins.latent(model, *ODD)
        return twins.sample(model, latent=latent, positive=positive, negative=negative, **settings)

    return run


def masked(twins, module):
    """The prompt's masks as a hook on it."""

    def run(model, latent=None, **settings):
        _, one, two = masks(ODD)
        first, second = (
            [c, o | {"mask": m, "mask_strength": 1.0}] for [[c, o]], m in zip(regions(twins, model), (one, two))
        )
        positive = module.set_cond_attnmask(twins.prompt(model, 1), [first, second], fill=True)
        latent = twins.latent(model, *ODD) if latent is None else latent
        return twins.sample(model, latent=latent, positive=positive, **settings)

    return run


def parallel_alone(twins, run=None, **given):
    """The parallel MODEL's latent; of the local one, which what hangs on it can break, nothing is asked."""

    def sampled(model, **settings):
        wanted = {"latent": twins.latent(model, *ODD)} | given | settings
        if not isinstance(model, twins.remote_model.RemotePatcher):
            return wanted["latent"]
        return (run or twins.sample)(model, **wanted)

    return sampled
