"""Whether a MODEL is of SD3 or SDXL, as far as names tell it: of its file, of its loader, of the nodes that it meets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from .graph import Node

Verdict = Literal["ours", "another", "unknown"]

_NAMES_OF_OTHERS = re.compile(
    r"flux|\bwan[-_. \d]|wan[-_.]?[2v]|hunyuan|hyvid|ltx|qwen|z[-_]?image|chroma|hidream|lumina|cosmos|mochi|ace[-_]?step|audio|"
    r"svd(?!q)|stable[-_. ]?video|cascade|stage_[abc]\b|pixart|\bsana|kandinsky|omnigen|aura[-_]?flow|kolors|cogvideo|krea|ernie|"
    r"longcat|\bovis|newbie|joyai|capybara|\bpid[-_]|zero123|sv3d|lotus|\bsam[23]|sdpose|depth[-_]?anything|seedvr|animatediff|"
    r"deepfloyd|anima[-_]|triposplat|trellis|neta[-_ ]?yume",
    re.I,
)
_NAMES_OF_OURS = re.compile(
    r"XL|(?i:sd[-_. ]?xl|xl(?![a-z])|sd[-_. ]?3|stable[-_. ]?diffusion[-_. ]?3|pony|illustrious|noob[-_]?ai|animagine|segmind|"
    r"ssd[-_]?1b|koala|playground|proteus)"
)
# Asked last: versions and names of SDXL models look like those of SD1 and SD2, and have an XL.
_NAMES_OF_SD1_AND_SD2 = re.compile(
    r"sd[-_. ]?v?[12]([-_. ]?[0-9]|\b)|\bv1[-_.]?5|\bv[12]-[0-9]|stable[-_. ]?diffusion[-_. ]?v?[12]|\bmm_|sdxs|dreamshaper_?[1-8]|"
    r"absolute[-_]?reality|realistic[-_ ]?vision|epicrealism|deliberate|rev[-_]?animated|majicmix|counterfeit|meinamix|chilloutmix|"
    r"anything[-_ ]?v|juggernaut_(reborn|final)",
    re.I,
)
_CLASSES_OF_OTHERS = re.compile(
    r"Flux|Wan|LTX|Hunyuan|HyVideo|Qwen|Cosmos|Mochi|AceStep|Audio|SVD_|SV3D|Zero123|Cascade|PixArt|HiDream|Lumina|Kandinsky|"
    r"OmniGen|Chroma|ZImage|CogVideo|Lotus|Trellis|ImageOnlyCheckpoint|ImageToVideo|SD_4XUpscale|Kolors|AuraFlow|Krea|"
    r"Splat|SAM3|SDPose|RTDETR|QuadrupleCLIP"
)
_CLASSES_OF_OURS = frozenset(
    (
        "CLIPTextEncodeSDXL",
        "CLIPTextEncodeSDXLRefiner",
        "CLIPTextEncodeSD3",
        "TripleCLIPLoader",
        "SkipLayerGuidanceSD3",
        "ControlNetApplySD3",
        "ModelMergeSDXL",
        "ModelMergeSD3_2B",
        "ModelMergeSD35_Large",
    )
)
_CLIP_LOADERS = frozenset({"CLIPLoader", "DualCLIPLoader", "CLIPLoaderGGUF", "DualCLIPLoaderGGUF"})
_CLIP_TYPES_OF_OURS, _CLIP_TYPES_OF_ANY = frozenset({"sd3", "sdxl"}), frozenset({"stable_diffusion", "default", "cpu"})


def family_of(loader: Node, met: Sequence[Node]) -> Verdict:
    """A name that says another family wins over one that says ours; the file's over those of nodes.

    Args:
        met: what the MODEL gets to, and what gives prompts to these.
    """
    name = loader.file.replace("\\", "/")
    if _NAMES_OF_OTHERS.search(name):
        return "another"
    if _NAMES_OF_OURS.search(name):
        return "ours"
    if _NAMES_OF_SD1_AND_SD2.search(name):
        return "another"
    classes = {loader.class_type, *(node.class_type for node in met)}
    types = {text for node in met if node.class_type in _CLIP_LOADERS for text in _types(node)}
    if any(map(_CLASSES_OF_OTHERS.search, classes)) or types - _CLIP_TYPES_OF_OURS:
        return "another"
    return "ours" if types or classes & _CLASSES_OF_OURS else "unknown"


def _types(clip_loader: Node) -> set[str]:
    return set(clip_loader.texts) - set(clip_loader.files) - _CLIP_TYPES_OF_ANY
