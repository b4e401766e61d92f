"""IP-Adapter, InstantID and PuLID, their packs' own nodes on a local MODEL and on its parallel twin, for twins.py.

Adapters are small and random, of the places of SDXL's layout; faces are not looked for.
"""

import functools
import importlib
import os
from types import FunctionType, SimpleNamespace
from unittest.mock import MagicMock

import comfy.model_patcher
import comfy_extras.nodes_mahiro as mahiro
import stand_ins
import torch
from packs import part_of_pack
from refusals import named
from twins import call

import nodes

WORLD = int(os.environ["TWINS_WORLD"])
MESHES = {
    1: {"sdxl": {}},
    2: {"sdxl": {"patch": 2}, "sdxl, cfg": {"cfg": 2}},
    3: {"sdxl": {"patch": 3}},
    4: {"sdxl": {"cfg": 2, "patch": 2}},
}
FILE = "unet-layers.safetensors"
MODELS = {name: (FILE, mesh) for name, mesh in MESHES[WORLD].items()}
HALVES = "sdxl, halves"
if WORLD == 2:
    MODELS[HALVES] = FILE, {"patch": 2}, {"dtype": torch.float16}
# As the packs count SDXL's transformer blocks: the first of each layer, which is all that the small model has.
FIRST_OF_LAYERS = (0, 2, 4, 14, 24, 34, 44, 54, 56, 58)
WIDTHS, CONTEXT, CLIP = (128,) * len(FIRST_OF_LAYERS), 2048, 32
# On meshes beside the first, and other numbers of ranks: of each kind the case that asks the most of it.
FEW = ("mask, an odd size, a batch", "two, one masked, some steps", "batch of its own weights", "fidelity, masked, odd")


def drawn(*shape, seed, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers(seed, widths=WIDTHS, context=CONTEXT, numbers=FIRST_OF_LAYERS):
    """An adapter's keys and values of each layer, by the packs' names; and one that tells SDXL's layout by its count of layers."""
    found = {}
    for number, width in zip(numbers, widths, strict=False):
        for turn, kind in enumerate("kv"):
            weight = drawn(width, context, seed=100 * seed + 2 * number + turn, scale=context**-0.5)
            found[f"{2 * number + 1}.to_{kind}_ip.weight"] = weight
    return found | {f"101.to_{kind}_ip.weight": drawn(8, context, seed=seed) for kind in "kv"}


def ipadapter(seed=1, **of_layers):
    """Of four tokens a picture, as the pack's loader gives it."""
    width = of_layers.get("context", CONTEXT)
    projection = {"proj.weight": drawn(4 * width, CLIP, seed=seed), "proj.bias": drawn(4 * width, seed=seed + 1)}
    norm = {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    return {"image_proj": projection | norm, "ip_adapter": layers(seed, **of_layers)}


class Vision(torch.nn.Module):
    """In place of CLIP's: random, of a picture's coarse colours."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(drawn(CLIP, 3 * 16, seed=7), requires_grad=False)

    def forward(self, pixel_values, intermediate_output):
        seen = torch.nn.functional.adaptive_avg_pool2d(pixel_values, 4).flatten(1) @ self.weight.T
        return seen[:, None], seen[:, None], seen


def clip_vision():
    cpu = torch.device("cpu")
    model = Vision()
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
    return SimpleNamespace(model=model, patcher=patcher, load_device=cpu)


def image(seed, count=1, rows=64, columns=64):
    return torch.rand(count, rows, columns, 3, generator=torch.Generator().manual_seed(seed))


def mask(count=1, rows=40, columns=36, seed=4):
    return torch.rand(count, rows, columns, generator=torch.Generator().manual_seed(seed))


def part(pack, name):
    stand_ins.stand_in("insightface", "facexlib", "cv2", "timm", "ftfy")
    return part_of_pack(os.environ[pack], name)


def stepwise(change):
    """And something that only ComfyUI's own loop can heed: one request for each evaluation."""
    return lambda model: call(mahiro.Mahiro, model=change(model))


def cases(twins):
    packs = {"IPADAPTER_PLUS": of_ipadapter, "INSTANTID": of_instantid, "PULID": of_pulid}
    for name in MODELS:
        for pack, of_pack in ({"FACESWAP": of_faceswap} if name == HALVES else packs).items():
            if pack in os.environ:
                is_first = WORLD == 2 and name in ("sdxl", HALVES)
                found = (case for case in of_pack(twins) if is_first or case[0] in FEW)
                yield from ((name, f"{pack}: {case}", *rest) for case, *rest in found)


def of_ipadapter(twins):
    plus = part("IPADAPTER_PLUS", "IPAdapterPlus")

    def by_embeds(model, *, seed=1, node=plus.IPAdapterEmbeds, count=1, adapter=None, **given):
        embeds = {"pos_embed": drawn(count, CLIP, seed=seed), "neg_embed": drawn(1, CLIP, seed=seed + 50)}
        settings = {"weight": 0.8, "weight_type": "linear", "start_at": 0.0, "end_at": 1.0, "embeds_scaling": "V only"}
        return call(node, model=model, ipadapter=adapter or ipadapter(seed), **embeds, **(settings | given))

    def hung(**given):
        return functools.partial(by_embeds, **given)

    def two(model):
        model = by_embeds(model, start_at=0.3, end_at=0.9)
        return by_embeds(model, seed=2, attn_mask=mask(), weight_type="ease out", weight=-0.6)

    odd = {"latent": drawn(2, 4, 13, 7, seed=3)}
    if (folder := os.environ.get("PERTURBED_ATTENTION_PATH")) is not None:
        guided = part_of_pack(folder, "nag_nodes").NormalizedAttentionGuidance
        negative = [[drawn(1, 30, CONTEXT, seed=8), {}]]
        yield "under NAG", lambda model: call(guided, model=two(model), negative=negative, unet_block_list="u0,m0"), odd
    yield "mask, an odd size, a batch", hung(attn_mask=mask()), odd
    yield "two, one masked, some steps", two, {"steps": 4}
    batch = {"node": plus.IPAdapterEmbedsBatch, "weight": [0.4, 1.2], "count": 2, "attn_mask": mask(2)}
    yield "batch of its own weights", hung(**batch), odd
    yield "batch of its own weights, step by step", stepwise(hung(**batch)), odd
    yield "two, one masked, step by step", stepwise(two), {"steps": 4}
    yield "cfg 1", hung(), {"cfg": 1.0}
    yield "two pictures", hung(count=2), {}
    yield "a latent far from square", hung(attn_mask=mask(1, 200, 30)), {"latent": drawn(1, 4, 9, 32, seed=3)}
    area = lambda model: call(nodes.ConditioningSetArea, twins.prompt(model, 1), 32, 48, 0, 0, 0.9)  # noqa: E731
    yield (
        "an area beside the whole",
        hung(attn_mask=mask()),
        {"of": lambda model: twins.sample(model, positive=area(model) + twins.prompt(model, 3))},
    )
    for kind in plus.WEIGHT_TYPES[1:]:
        yield kind, hung(weight_type=kind), {}
    for scaling in ("K+V", "K+V w/ C penalty", "K+mean(V) w/ C penalty"):
        yield scaling, hung(embeds_scaling=scaling), {}
    yield from by_pictures(plus)
    sd15 = ipadapter(widths=(320, 320, 640, 640, 1280, 1280, 1280, 1280, 1280, 640), context=768)
    refused = functools.partial(named, twins, ["at input 4 0: keys 320 wide come to an attention of 128"], twins.sample)
    yield "of SD1.5", hung(adapter=sd15), {"of": refused}
    words = ["is of a version that is not known", "comfyui_ipadapter_plus 2."]
    refused = functools.partial(named, twins, words, twins.sample)
    others = {
        "what it adds bends": _bent,
        "so it does in output blocks": _bent_late,
        "its attention has a mask": _masked,
    }
    for name, of_theirs in others.items():
        yield f"an unknown version: {name}", functools.partial(of_another_version, hung(), of_theirs), {"of": refused}


def by_pictures(plus):
    """Nodes that see pictures through CLIP, which here is a stand-in."""

    def hung(node, *, adapter=None, **given):
        settings = {"start_at": 0.0, "end_at": 1.0, "clip_vision": clip_vision(), "combine_embeds": "concat"}
        return lambda model: call(node, model=model, ipadapter=adapter or ipadapter(), **(settings | given))

    weighted = {"weight": 0.8, "weight_type": "linear"}
    styled = {"image_style": image(1), "image_composition": image(2), "weight_style": 0.9, "weight_composition": 0.6}
    yield "StyleComposition", hung(plus.IPAdapterStyleComposition, **styled, expand_style=False), {}
    both = styled | {"image_style": image(1, 2)}
    yield (
        "StyleCompositionBatch",
        hung(plus.IPAdapterStyleCompositionBatch, **both, expand_style=True),
        {"latent": drawn(2, 4, 8, 6, seed=3)},
    )
    boosted = {"image": image(1), "weight": 0.8, "style_boost": 1.4}
    yield "PreciseStyleTransfer", hung(plus.IPAdapterPreciseStyleTransfer, **boosted), {}
    boosted = {"image": image(1), "weight": 0.8, "composition_boost": 0.3}
    yield "PreciseComposition", hung(plus.IPAdapterPreciseComposition, **boosted), {}
    tiled = {"image": image(3, rows=64, columns=160), "sharpening": 0.1} | weighted
    yield "Tiled", hung(plus.IPAdapterTiled, **tiled), {}
    by_layer = {"image": image(1), "layer_weights": "0:0.3, 3:-0.5, 6:1.2"}
    yield "MS", hung(plus.IPAdapterMS, weight_faceidv2=1.0, **by_layer, **weighted), {}
    face = faceid(plus)
    of_face = {"image": image(5), "insightface": faces(), "weight_faceidv2": 1.0} | weighted
    yield "FaceID", hung(plus.IPAdapterFaceID, adapter=face, **of_face), {}


def faceid(plus):
    torch.manual_seed(11)
    projection = importlib.import_module(plus.__name__.replace("IPAdapterPlus", "image_proj_models")).MLPProjModelFaceId
    adapter = {"image_proj": projection(cross_attention_dim=CONTEXT).state_dict(), "ip_adapter": layers(6)}
    adapter["ip_adapter"]["0.to_q_lora.down.weight"] = drawn(4, 4, seed=1)
    return adapter


def faces():
    """In place of what finds them: one, of random features."""
    face = SimpleNamespace(normed_embedding=drawn(512, seed=9).numpy(), kps=None)
    importlib.import_module("insightface.utils").face_align.norm_crop = lambda *_, image_size, **__: (
        (255 * image(6, rows=image_size, columns=image_size)[0]).byte().numpy()
    )
    return SimpleNamespace(det_model=SimpleNamespace(input_size=None), get=lambda picture: [face])


def of_another_version(change, function, model):
    """Its patches do what no attention to a picture does, as if the pack said so."""
    model = change(model)
    for patch in model.model_options["transformer_options"]["patches_replace"]["attn2"].values():
        theirs = patch.callback[0]
        names = theirs.__globals__ | {"pictured": pictured}
        patch.callback = [FunctionType(function.__code__, names, theirs.__name__)]
    return model


def pictured(q, extra_options, ipadapter, module_key, cond, uncond, **kwargs):
    order = extra_options["cond_or_uncond"]
    pictures = torch.cat([(cond, uncond)[i].repeat(len(q) // len(order), 1, 1) for i in order])
    return [ipadapter.ip_layers.to_kvs[f"{module_key}_to_{kind}_ip"](pictures) for kind in "kv"]


def _bent(out, q, k, v, extra_options, **kwargs):
    attended = optimized_attention(q, *pictured(q, extra_options, **kwargs), extra_options["n_heads"])  # noqa: F821 - the pack's
    return torch.tanh(attended)


def _bent_late(out, q, k, v, extra_options, **kwargs):
    attended = optimized_attention(q, *pictured(q, extra_options, **kwargs), extra_options["n_heads"])  # noqa: F821 - the pack's
    return torch.tanh(attended) if extra_options["block"][0] == "output" else attended


def _masked(out, q, k, v, extra_options, **kwargs):
    keys, values = pictured(q, extra_options, **kwargs)
    mask = torch.zeros(q.shape[1], keys.shape[1])
    return optimized_attention(q, keys, values, extra_options["n_heads"], mask=mask)  # noqa: F821 - the pack's


def of_instantid(twins):
    instantid = part("INSTANTID", "InstantID")
    # Features of a face, and the picture of its points, for the ControlNet, which is left out here.
    instantid.extractFeatures = lambda _, seen, extract_kps=False: (
        torch.zeros_like(seen) if extract_kps else drawn(len(seen), 512, seed=8)
    )

    class Adapter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.ip_layers = instantid.To_KV(layers(3))

        def get_image_embeds(self, *embeds):
            return [drawn(1, 16, CONTEXT, seed=1, scale=float(x.abs().mean())) for x in embeds]

    control = MagicMock()
    control.copy().set_cond_hint().cond_hint_original = torch.zeros(1)

    def hung(**given):
        settings = {"ip_weight": 0.8, "cn_strength": 0.0, "start_at": 0.0, "end_at": 1.0, "noise": 0.3}
        settings |= {"insightface": None, "control_net": control, "image": image(1), "combine_embeds": "average"}
        conditioning = {"positive": [[torch.zeros(1), {}]], "negative": [[torch.zeros(1), {}]]}
        return lambda model: call(
            instantid.ApplyInstantIDAdvanced, instantid=Adapter(), model=model, **conditioning, **(settings | given)
        )

    yield "plain", hung(), {}
    yield "mask, an odd size, a batch", hung(mask=mask()), {"latent": drawn(2, 4, 13, 7, seed=3)}
    yield "some steps", hung(start_at=0.2, end_at=0.7), {"steps": 4}


def of_pulid(twins):
    pulid = part("PULID", "pulid")

    class Faces(MagicMock):
        cropped_faces = ((255 * image(2, rows=512, columns=512)[0]).byte().numpy(),)

        def face_parse(self, picture):
            return (drawn(1, 19, 512, 512, seed=4),)

    pulid.FaceRestoreHelper, pulid.init_parsing_model = Faces, lambda **_: Faces().face_parse

    class Adapter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.ip_layers = pulid.To_KV(layers(4))

        def get_image_embeds(self, face, hidden):
            return drawn(1, 5, CONTEXT, seed=2 + int(face.count_nonzero() > 0))

    class Vision(torch.nn.Module):
        image_size, image_mean, image_std = 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

        def forward(self, picture, **_):
            return drawn(1, 768, seed=3), [drawn(1, 4, 8, seed=3)]

    face = SimpleNamespace(bbox=(0, 0, 1, 1), embedding=drawn(512, seed=9).numpy())
    found = SimpleNamespace(det_model=SimpleNamespace(input_size=None), get=lambda picture: [face])

    def hung(method, **given):
        settings = {"weight": 0.8, "start_at": 0.0, "end_at": 1.0, "image": image(3), "face_analysis": found}
        models = {"pulid": Adapter(), "eva_clip": Vision()}
        return lambda model: call(pulid.ApplyPulid, model=model, method=method, **models, **(settings | given))

    odd = {"latent": drawn(2, 4, 13, 7, seed=3)}
    yield "fidelity, masked, odd", hung("fidelity", attn_mask=mask()), odd
    yield "fidelity", hung("fidelity"), {}
    yield "style", hung("style"), {}
    yield "style, step by step", stepwise(hung("style", start_at=0.2, end_at=0.8)), {"steps": 4}
    yield "neutral", hung("neutral", attn_mask=mask()), {}
    words = ["Displaced steps can't honour an image prompt's part that is orthogonal"]
    refused = functools.partial(named, twins, words, functools.partial(twins.sample, steps=4))
    yield "displaced", lambda model: displaced(hung("style")(model)), {"of": refused}


def displaced(model):
    steps = importlib.import_module("pack.nodes.hung.displaced_steps")
    return steps.with_displaced(model, steps.Displaced(1))


def of_faceswap(twins):
    """Its patch gives halves, which a MODEL that computes in halves alone can take: ComfyUI's on a CPU does where it is told to. It
    counts blocks in an order of its own."""
    stand_ins.server_instance()
    own = part("FACESWAP", "nodes")
    adapter = part("FACESWAP", "ip_adapter.instantId").InstantId(layers(5, numbers=(0, 2, 4, 6, 8, 28)))

    def hung(model):
        model = model.clone()
        model.set_model_compute_dtype(torch.float16)
        return call(
            own.InstantIdAdapterApply,
            model=model,
            instantId_adapter=adapter,
            face_conditioning=drawn(1, 16, CONTEXT, seed=6),
            strength=0.8,
        )

    yield "plain", hung, {}
    yield "step by step", stepwise(hung), {}
    yield "a batch, cfg 1", hung, {"latent": drawn(2, 4, 13, 7, seed=3), "cfg": 1.0}
