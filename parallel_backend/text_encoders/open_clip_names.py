"""OpenCLIP's names of a text encoder, as SDXL's single files have them, in transformers' words."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

MARK = "positional_embedding"
_TOP = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_LAYER = "transformer.resblocks."
_PARTS = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_JOINED = ("q_proj", "k_proj", "v_proj")


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under transformers' names; what has none there keeps its own."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "text_projection":  # there it stands on the right of the product
            found["text_projection.weight"] = tensor.T.contiguous()
        elif name.startswith(_LAYER):
            found |= _of_layer(name.removeprefix(_LAYER), tensor)
        else:
            found[_TOP.get(name, name)] = tensor
    return found


def _of_layer(name: str, tensor: Tensor) -> dict[str, Tensor]:
    number, _, rest = name.partition(".")
    layer = f"text_model.encoder.layers.{number}"
    if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = rest.rpartition("_")[2]
        pieces = zip(_JOINED, tensor.chunk(3), strict=True)
        return {f"{layer}.self_attn.{part}.{kind}": piece for part, piece in pieces}
    part, _, kind = rest.rpartition(".")
    return {f"{layer}.{_PARTS.get(part, part)}.{kind}": tensor}
