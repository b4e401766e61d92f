"""What ComfyUI and its nodes find in a parallel MODEL: network.py COMFYUI PACK FOLDER; prints what happened, as JSON.

FOLDER has small checkpoints. The backend is invented: it answers with what a local MODEL of the same file computes, so that a
sampling is ComfyUI's own on both sides.
"""

import copy
import functools
import gc
import importlib.util
import json
import logging
import sys
import weakref
from pathlib import Path
from types import FunctionType, MethodType, SimpleNamespace

import shims
import torch
from network_sides import (
    FAMILIES,
    GUIDANCE,
    MMDIT,
    UNET,
    alike,
    difference,
    from_diffusers,
    lazy,
    local_model,
    parallel_model,
    patched,
    sample,
    saved,
)


def main(comfy_folder, pack, folder):
    shims.start_core(comfy_folder)
    import comfy.model_management as mm

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("pack", f"{pack}/__init__.py", submodule_search_locations=[pack])
    sys.modules["pack"] = importlib.util.module_from_spec(spec)
    ours = SimpleNamespace(
        remote=importlib.import_module("pack.parallel_backend").RemoteModel,
        errors=importlib.import_module("pack.parallel_backend.errors"),
        patcher=importlib.import_module("pack.nodes.remote_model").remote_patcher,
        core=importlib.import_module("pack.nodes.core_model"),
        network=importlib.import_module("pack.nodes.remote_network"),
        layers=importlib.import_module("pack.nodes.hung.layers"),
        folder=Path(folder),
    )
    own = {name: local_model(ours, name) for name in FAMILIES}
    sides = {name: (local, parallel_model(ours, name, local)) for name, local in own.items()}
    outcomes = {"alike": {name: alike(*sides[name]) for name in FAMILIES}}
    outcomes["diffusers"] = {name: from_diffusers(ours, name) for name in FAMILIES}
    outcomes["told"] = told(ours, sides[MMDIT][1])
    outcomes["kept"] = kept(mm, ours, sides[MMDIT][1])
    outcomes["kept"]["gone with its MODEL"] = gone(copy.deepcopy(sides[UNET][1]))
    outcomes["differences"] = {name: difference(ours, sides[MMDIT], name) for name in GUIDANCE}
    outcomes["refused"] = {name: refused(ours, sides, name) for name in CHANGES}
    outcomes["refused later"] = {name: refused(ours, sides, name, LATER) for name in LATER}
    outcomes["refused again"] = refused_again(sides[UNET][1])
    outcomes["saved"] = {name: saved(*sides[name]) for name in (MMDIT, UNET)}
    outcomes["lazy"] = lazy(ours, own[MMDIT])
    print(json.dumps(outcomes))


def told(ours, parallel):
    """What stands on the node, each time that it changes, of a sampling whose evaluations have something to tell."""
    found, say, forward, remote = [], ours.network.say, parallel.remote.forward, parallel.remote
    news = iter([([], ""), (["a graph"], ""), (["a graph"], "NaN in step 2"), (["a kernel"], "NaN in step 3")])

    def telling(*args, **more):
        notes, remote.not_finite = next(news)
        remote.last = SimpleNamespace(notes=notes)
        return forward(*args, **more)

    ours.network.say, remote.forward = lambda text, **_: found.append(text.split("\n")), telling
    try:
        sample(parallel, steps=4, cfg=1.0)
    finally:
        ours.network.say, remote.forward, remote.last, remote.not_finite = say, forward, None, ""
    return found


def kept(mm, ours, parallel):
    """What is held to be changed after all that ComfyUI does by itself to a MODEL that nobody has changed."""
    found = {}

    def look(what, patcher=parallel):
        found[what] = list(ours.layers.network_changes(patcher.model))

    clone = parallel.clone()
    clone.add_object_patch("extra_conds", clone.model.extra_conds)
    sample(clone)
    sample(parallel)
    look("sampled")
    clone.patch_model()
    clone.unpatch_model(torch.device("cpu"))
    look("patched and unpatched")
    parallel.model.to("cpu").half()
    look("moved")
    mm.unload_all_models()
    parallel.detach()
    look("unloaded")
    twin = copy.deepcopy(parallel)
    look("copied", twin)
    found["shared"] = [] if twin.remote is parallel.remote and twin.model is not parallel.model else ["not shared"]
    found["owners"] = [1 for each in (twin, parallel) if each.network.owner.model() is not each.model]
    return found


def gone(parallel):
    """Whether a model goes with its last MODEL: ComfyUI takes what stays, until Python looks for it, for a leak."""
    model = weakref.ref(parallel.model)
    gc.disable()
    del parallel
    gc.enable()
    return [] if model() is None else ["still there"]


# -- changes ------------------------------------------------------------------------------------------------------------


def refused(ours, sides, name, changes=None):
    """What is said of a changed MODEL when it is sampled, and how many requests have been made by then."""
    kind, change = (changes or CHANGES)[name]
    model = copy.deepcopy(sides[kind][1])
    before = model.remote.requests
    sizes = {} if kind == MMDIT else {"width": 2048, "pooled": 1280, "channels": 4}
    try:
        sample(change(model) or model, **sizes)
    except ours.errors.UnsupportedError as error:
        return [str(error), model.remote.requests - before]
    finally:
        for owner, function in PUT_BACK:
            owner.forward = function
        PUT_BACK.clear()
    return ["nothing", model.remote.requests - before]


def refused_again(parallel):
    """What is said of a layer's hook at two evaluations, the first of which was refused."""
    model = copy.deepcopy(parallel)
    block(model).register_forward_hook(print)
    model.model.as_made.forget_comparison()
    return [list(model.model.as_made.changes_since()) for _ in range(2)]


PUT_BACK, KEPT = [], {}


def seamless_tile(model):
    for layer in model.model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.padding_mode = "circular"


def asymmetric_tiling(model):
    def conv_forward(self, x, weight, bias):
        return torch.nn.functional.conv2d(x, weight, bias)

    for layer in model.model.diffusion_model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer._conv_forward = MethodType(conv_forward, layer)


def gated(model):
    for name, layers in model.model.named_modules():
        if name.endswith("transformer_blocks"):
            for layer in layers:
                layer._forward = MethodType(lambda self, x, **_: x, layer)


def negative_keys(model):
    for name, layer in model.model.named_modules():
        if name.endswith("attn2.to_k"):
            layer(torch.zeros(1, 7, 2048)) * 2


def whole_class(model):
    kind = type(block(model))
    PUT_BACK.append((kind, kind.forward))
    kind.forward = lambda self, x, *_: x


def made_with_changed_class(model):
    """As if a pack had done that before the MODEL was made."""
    whole_class(model)
    network = model.model.diffusion_model
    network.as_made = model.model.as_made = type(network.as_made)(network, network.as_made.is_known)


def transformers(*around, before=False):
    """What puts one function around the other around the forward of all transformer blocks, as packs do when ComfyUI imports them."""

    def change(model):
        network = model.model.diffusion_model
        kind = type(network.input_blocks[3][1].transformer_blocks[0])
        PUT_BACK.append((kind, kind.forward))
        for make in around:
            kind.forward = make(kind.forward)
        if before:
            network.as_made = model.model.as_made = type(network.as_made)(network, network.as_made.is_known)

    return change


def keeping_options(function):
    """LayerDiffuse's."""

    @functools.wraps(function)
    def forward(self, x, context=None, transformer_options=None):
        KEPT["options"] = transformer_options
        return function(self, x, context, transformer_options)

    return forward


def with_whatever_comes(function):
    def of_another_name(*args, **kwargs):
        return function(*args, **kwargs)

    return of_another_name


def by_a_name_of_the_module(function):
    global core_forward
    core_forward = function
    return lambda self, x, **options: core_forward(self, x, **options)


def without_options(function):
    return lambda self, x, context=None, transformer_options={}: function(self, x, context)


def twice(function):
    return lambda *args, **kwargs: (function(*args, **kwargs), function(*args, **kwargs))[1]


def doubled(function):
    return lambda *args, **kwargs: function(*args, **kwargs) * 2


def where_it_is_small(function):
    return lambda self, x, **options: x if x.shape[1] < 9 else function(self, x, **options)


def of_tensors(function):
    return lambda self, x, **options: function(self, x * 2 if isinstance(x, torch.Tensor) else x, **options)


def by_a_flag(function):
    """That nobody has set yet."""
    return lambda self, x, **options: function(self, x * 2 if KEPT.get("on") else x, **options)


def whatever_fails(function):
    def forward(self, x, **options):
        try:
            x = x * 2
        except TypeError:
            KEPT["failed"] = True
        return function(self, x, **options)

    return forward


def torchs_own(model):
    kind = type(model.model.diffusion_model.time_embed[0])
    PUT_BACK.append((kind, kind.forward))
    kind.forward = torch.nn.Linear.forward


def round_and_round(function):
    """Two that hold each other, and neither the class's own."""

    def first(*args, **kwargs):
        return second(*args, **kwargs)

    def second(*args, **kwargs):
        return first(*args, **kwargs)

    return first


def put_back(model):
    made_with_changed_class(model)
    kind, function = PUT_BACK.pop()
    kind.forward = function


def between(change):
    """What a function changes after the first evaluation."""
    return lambda model: model.set_model_sampler_post_cfg_function(lambda args: change(model) or args["denoised"])


def made_of_text(model):
    """As exec makes one of text: of no module, and of no file."""
    code = (lambda x: x).__code__.replace(co_filename="<string>")
    block(model).forward = FunctionType(code, {}, "forward")


def block(model):
    return model.model.diffusion_model.input_blocks[1][0]


def new_class(model):
    layer = block(model)
    layer.__class__ = type("Other", (type(layer),), {})


def scaled(model):
    layer = model.model.diffusion_model.out[2]
    layer.weight = torch.nn.Parameter(layer.weight * 2)


class Guided:
    """A pack's function: what patches is a method of its object, and is called from some step on."""

    def __call__(self, args):
        return self.perturbed(args) if args["sigma"][0] < 0.01 else args["denoised"]

    def perturbed(self, args):
        options = {**args["model_options"], "transformer_options": {"patches_replace": {"attn1": {}}}}
        return args["model"](args["input"], args["sigma"], **options)


class AnotherPerturbation:
    """Of the name and module of core's, as another version might be, and not what that does."""

    def __call__(self, q, k, v, extra_options):
        return v * 2


AnotherPerturbation.__module__ = "comfy_extras.nodes_pag"
AnotherPerturbation.__qualname__ = "PerturbedAttentionGuidance.execute.<locals>.perturbed_attention"


def by_wrapper(kind):
    """The padding is changed by a wrapper of the sampling."""

    def change(model):
        def wrapper(executor, *args, **kwargs):
            seamless_tile(model)
            return executor(*args, **kwargs)

        model.add_wrapper_with_key(kind, "test", wrapper)

    return change


CHANGING = (without_options, twice, doubled, where_it_is_small, of_tensors, by_a_flag, whatever_fails)
CHANGES = {
    "SeamlessTile": (UNET, seamless_tile),
    "Asymmetric Tiled KSampler": (UNET, asymmetric_tiling),
    "TGate": (UNET, gated),
    "NAG": (UNET, negative_keys),
    "forward": (UNET, lambda model: setattr(model.model.diffusion_model, "forward", lambda *_, **__: 0)),
    "layer's forward": (UNET, lambda model: setattr(block(model), "forward", lambda *_, **__: 0)),
    "made of text": (UNET, made_of_text),
    "hook": (UNET, lambda model: block(model).register_forward_hook(print) and None),
    "pre-hook": (MMDIT, lambda model: model.model.diffusion_model.register_forward_pre_hook(print) and None),
    "class": (UNET, new_class),
    "all of a class": (UNET, whole_class),
    "all of a class, before": (UNET, made_with_changed_class),
    **{f"all blocks, {make.__name__}": (UNET, transformers(make, before=True)) for make in CHANGING},
    "all blocks, a change within": (UNET, transformers(doubled, keeping_options)),
    "all blocks, round_and_round": (UNET, transformers(round_and_round)),
    "all of a class, of what it is made from": (UNET, torchs_own),
    "layer": (UNET, lambda model: model.model.diffusion_model.input_blocks.__setitem__(1, torch.nn.Identity())),
    "weight": (UNET, scaled),
    "network": (UNET, lambda model: setattr(model.model, "diffusion_model", torch.nn.Identity())),
    "apply_model": (MMDIT, lambda model: setattr(model.model, "apply_model", lambda x, *_, **__: x)),
    "object patch": (MMDIT, lambda model: model.add_object_patch("apply_model", lambda x, *_, **__: x)),
    **{f"by {kind}": (MMDIT, by_wrapper(kind)) for kind in ("outer_sample", "sampler_sample")},
    "by diffusion_model": (UNET, by_wrapper("diffusion_model")),  # which SD3's network doesn't call
    "compute dtype": (MMDIT, lambda model: patched("nodes_model_advanced.ModelComputeDtype", model, dtype="bf16")),
    "compiled": (MMDIT, lambda model: patched("nodes_torch_compile.TorchCompileModel", model, backend="inductor")),
    "SLG": (MMDIT, lambda model: patched("nodes_sd3.SkipLayerGuidanceSD3", model, layers="1, 99", start_percent=0.9)),
    "SLG of DiT": (MMDIT, lambda model: patched("nodes_slg.SkipLayerGuidanceDiTSimple", model, double_layers="99")),
    "named as PAG's": (UNET, lambda model: model.set_model_attn1_replace(AnotherPerturbation(), "middle", 0)),
    "a pack's": (MMDIT, lambda model: model.set_model_sampler_post_cfg_function(Guided())),
}
# Requests are made until then.
LATER = {
    "layer's forward": (UNET, between(lambda model: setattr(block(model), "forward", lambda *_, **__: 0))),
    "hook": (UNET, between(lambda model: block(model).register_forward_hook(print) and None)),
    "pre-hook": (
        MMDIT,
        between(lambda model: model.model.diffusion_model.x_embedder.register_forward_pre_hook(print) and None),
    ),
    "all of a class": (UNET, between(whole_class)),
    "nothing": (UNET, put_back),
    "nothing, by LayerDiffuse": (UNET, transformers(keeping_options, before=True)),
    "nothing, by several": (UNET, transformers(keeping_options, with_whatever_comes, keeping_options)),
    "nothing, by name": (UNET, transformers(by_a_name_of_the_module, before=True)),
    "nothing, between": (UNET, between(transformers(keeping_options))),
}


if __name__ == "__main__":
    main(*sys.argv[1:])
