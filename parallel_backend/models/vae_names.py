"""Names of a VAE's tensors in the layouts that files have: LDM's, diffusers' of today and of before 0.17, TAESD's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

Held = TypeVar("Held")

_ATTENTION = {
    "norm": "group_norm",
    **dict.fromkeys(("q", "query"), "to_q"),
    **dict.fromkeys(("k", "key"), "to_k"),
    **dict.fromkeys(("v", "value"), "to_v"),
    **dict.fromkeys(("proj_out", "proj_attn"), "to_out.0"),
}
_LDM = tuple(
    (re.compile(pattern), theirs)
    for pattern, theirs in (
        (r"^encoder\.down\.(\d+)\.block\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
        (r"^encoder\.down\.(\d+)\.downsample\.conv\.", r"encoder.down_blocks.\1.downsamplers.0.conv."),
        (r"^(encoder|decoder)\.mid\.block_1\.", r"\1.mid_block.resnets.0."),
        (r"^(encoder|decoder)\.mid\.block_2\.", r"\1.mid_block.resnets.1."),
        (r"^(encoder|decoder)\.mid\.attn_1\.", r"\1.mid_block.attentions.0."),
        (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
    )
)
_UP = re.compile(r"^decoder\.up\.(\d+)\.(block\.(\d+)|upsample\.conv)\.")
_IN_ATTENTION = re.compile(r"(mid_block\.attentions\.0)\.(\w+)\.(weight|bias)$")


def kl_module_names(names: Iterable[str]) -> dict[str, str]:
    """The file's names of an AutoencoderKL's tensors by those of diffusers' class; a name of neither is kept."""
    found = list(names)
    levels = 1 + max((int(match[1]) for name in found if (match := _UP.match(name))), default=-1)
    return {_kl_name(name, levels): name for name in found}


def _kl_name(name: str, levels: int) -> str:
    for pattern, theirs in _LDM:
        name = pattern.sub(theirs, name)
    if match := _UP.match(name):  # LDM counts them from the picture's side
        inner = f"resnets.{match[3]}" if match[3] else "upsamplers.0.conv"
        name = f"decoder.up_blocks.{levels - 1 - int(match[1])}.{inner}.{name[match.end() :]}"
    return _IN_ATTENTION.sub(lambda match: f"{match[1]}.{_ATTENTION.get(match[2], match[2])}.{match[3]}", name)


def taesd_module_names(part: str, held: Mapping[str, Held]) -> dict[str, Held]:
    """What TAESD's file holds under the names of diffusers' EncoderTiny or DecoderTiny; `part` is encoder or decoder."""
    # TAESD's decoder counts its first step, a clamp, as a layer; diffusers keeps that in forward.
    shift = 1 if part == "decoder" else 0
    split = {name: name.partition(".") for name in held}
    return {
        f"layers.{int(number) - shift}.{rest}" if number.isdigit() else name: held[name]
        for name, (number, _, rest) in split.items()
    }
