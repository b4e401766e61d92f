"""What a parallel MODEL can't honour, by node class and by file name: one table, in the words that a user is told."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .graph import Node
from .known import RUN

ATTENTION = "this patch of attention and blocks isn't honoured on a parallel MODEL"
CACHE = "this cache of steps lives inside the model: EasyCache, LazyCache and Step Cache (Parallel) work on a parallel MODEL"
LAYERS = "it changes the network's own layers, and those of a parallel MODEL live in the backend"
CHANNELS = "it gives the model more input channels than its file has"
COMPILE = "the weights live in the backend: set `compile` of Mesh Config instead"
DEVICES = "it copies the weights to other GPUs; a parallel MODEL has them there already"
TRAINING = "a parallel MODEL can't be trained"

_CLASSES = {
    ATTENTION: (
        "HypernetworkLoader GLIGENTextBoxApply ModelAttentionBackend ScaleROPE "
        "TGateApply NegPip INPAINT_ApplyFooocusInpaint"
    ),
    CACHE: "TeaCache DeepCache ApplyFBCacheOnModel ApplyTeaCachePatch ApplyTeaCachePatchAdvanced",
    LAYERS: "SeamlessTile LoraLoaderBypass LoraLoaderBypassModelOnly LoadAndApplyICLightUnet BrushNet PowerPaint RAUNet",
    COMPILE: "TorchCompileModel",
    DEVICES: "MultiGPU_WorkUnits SelectModelDevice",
    TRAINING: "TrainLoraNode",
}  # fmt: skip
_BY_CLASS = {name: why for why, names in _CLASSES.items() for name in names.split()}
# Packs name their nodes in families; the first that fits tells.
_BY_PATTERN = tuple(
    (re.compile(pattern), why)
    for pattern, why in (
        (r"LLLite|^ACN_Reference", ATTENTION),
        (r"^ADE_|AnimateDiff", LAYERS),
        (r"(?i)brushnet|powerpaint", LAYERS),
        (r"LayeredDiffusion.*(Cond|Joint|Diff)", CHANNELS),
        (r"^SUPIR|(?i:ic[-_]?light)", LAYERS),
        (r"(?i)fooocus.?inpaint", ATTENTION),
        (r"(?i)seamless|asymmetric.*tiled|circular.*(vae|pad)", LAYERS),
        (r"(?i)reference.*attention|prompt[-_ ]?to[-_ ]?prompt|attention[-_ ]?couple|cross.?attention", ATTENTION),
        (r"(?i)\bNAG|automatic[-_ ]?cfg|pladis|token[-_ ]?merg", ATTENTION),
    )
)  # fmt: skip
_BY_FILE = tuple(
    (re.compile(pattern, re.I), why)
    for pattern, why in (
        (r"svdq|int4", "SVDQuant and int4 files aren't taken: take the fp8, GGUF or fp16 one"),
        (r"ic[-_]?light", LAYERS),
    )
)
_BY_LOADER = (
    (
        re.compile(r"NF4|bnb", re.I),
        "that loader computes in its own way: Load Parallel Checkpoint, MMDiT and UNet read NF4 files",
    ),
    (re.compile(r"Nunchaku|SVDQ"), "SVDQuant and int4 files aren't taken: take the fp8, GGUF or fp16 one"),
)


def why_refused(node: Node) -> str:
    """Why a parallel MODEL would refuse what this node hangs on it, "" if it isn't known to."""
    return next(filter(None, map(_why_class, (node.class_type, *node.members))), "")


def why_file_refused(loader: Node) -> str:
    """Why the model that this loader loads can't be made parallel, "" if it is not known that it can't."""
    return _first(_BY_LOADER, loader.class_type) or _first(_BY_FILE, loader.file)


def _why_class(name: str) -> str:
    return _BY_CLASS.get(name) or ("" if name in RUN else _first(_BY_PATTERN, name))


def _first(table: Sequence[tuple[re.Pattern[str], str]], name: str) -> str:
    return next((why for pattern, why in table if pattern.search(name)), "")
