"""Small checkpoints in every quantised form, written by the quantisers' own packages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

FP8_MOST = 448.0
Tensors = Mapping[str, Tensor]


def is_matrix(name: str, tensor: Tensor) -> bool:
    """What quantisers take: not the layers by which a model takes in and gives out."""
    outside = ("embedder", "final_layer", "pos_embed", "time_embed", "label_emb", "input_blocks.0.", "out.")
    return tensor.ndim == 2 and name.endswith("weight") and not any(part in name for part in outside)


def bare_fp8(tensors: Tensors, dtype: torch.dtype = torch.float8_e4m3fn) -> dict[str, Tensor]:
    """All of it, as `weight.to(fp8)` makes such files."""
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def in_place_of(
    tensors: Tensors, quantised: Callable[[str, Tensor], Tensors], quantises: Callable[[str, Tensor], bool] = is_matrix
) -> dict[str, Tensor]:
    """The tensors, and in place of each that is quantised what `quantised` makes of it."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found |= quantised(name, tensor) if quantises(name, tensor) else {name: tensor}
    return found


def scaled_fp8(tensors: Tensors) -> dict[str, Tensor]:
    """ComfyUI's older form, as its SD3.5-large has it: a mark of two elements says that products are not in fp8."""

    def scaled(name: str, tensor: Tensor) -> Tensors:
        scale, layer = tensor.abs().max() / FP8_MOST, name.removesuffix(".weight")
        beside = {f"{layer}.scale_weight": scale, f"{layer}.scale_input": torch.tensor(1.0)}
        return {name: (tensor / scale).to(torch.float8_e4m3fn), **beside}

    return {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)} | in_place_of(tensors, scaled)


def comfy_quant(
    tensors: Tensors, layout: str, form: str, options: Mapping[str, Any] | None = None, **quantiser: Any
) -> dict[str, Tensor]:
    """ComfyUI's newer form, in which each layer says how it is quantised."""
    from comfy_kitchen.tensor import QuantizedTensor

    text = torch.tensor(list(json.dumps({"format": form, **(options or {})}).encode()), dtype=torch.uint8)

    def said(name: str, tensor: Tensor) -> Tensors:
        parts = QuantizedTensor.from_float(tensor, layout, **quantiser).state_dict(name)
        return {**parts, f"{name.removesuffix('.weight')}.comfy_quant": text.clone()}

    return in_place_of(tensors, said)


def bitsandbytes(
    tensors: Tensors,
    kind: str = "nf4",
    nested: bool = False,
    block: int = 64,
    quantises: Callable[[str, Tensor], bool] = is_matrix,
) -> dict[str, Tensor]:
    """As diffusers saves a model that it has quantised by bitsandbytes, matrices as bytes with their state beside."""
    import bitsandbytes.functional as bnb

    given = {"blocksize": block, "compress_statistics": nested, "quant_type": kind}

    def in_4_bits(name: str, tensor: Tensor) -> Tensors:
        data, state = bnb.quantize_4bit(tensor.to(torch.bfloat16), **given)
        return {name: data} | {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}

    return in_place_of(tensors, in_4_bits, quantises)


def mixed(tensors: Tensors) -> dict[str, Tensor]:
    """Every other matrix in another form, some in none."""
    forms = [COMFY_QUANT[name] for name in ("fp8 with scales", "int8 by rows", "nvfp4")]
    found: dict[str, Tensor] = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        found |= forms[number % 4]({name: tensor}) if number % 4 < 3 else {name: tensor}
    return found


ROTATED = {"convrot": True, "convrot_groupsize": 64}
COMFY_QUANT: dict[str, Callable[[Tensors], dict[str, Tensor]]] = {
    "fp8 with scales": partial(comfy_quant, layout="TensorCoreFP8Layout", form="float8_e4m3fn"),
    "int8": partial(comfy_quant, layout="TensorWiseINT8Layout", form="int8_tensorwise"),
    "int8 by rows": partial(comfy_quant, layout="TensorWiseINT8Layout", form="int8_tensorwise", per_channel=True),
    "int8 rotated": partial(
        comfy_quant,
        layout="TensorWiseINT8Layout",
        form="int8_tensorwise",
        options=ROTATED,
        per_channel=True,
        **ROTATED,
    ),
    "nvfp4": partial(comfy_quant, layout="TensorCoreNVFP4Layout", form="nvfp4"),
    "mxfp8": partial(comfy_quant, layout="TensorCoreMXFP8Layout", form="mxfp8"),
}
SAFETENSORS: dict[str, Callable[[Tensors], dict[str, Tensor]]] = {
    "bare fp8": bare_fp8,
    "bare fp8, e5m2": partial(bare_fp8, dtype=torch.float8_e5m2),
    "scaled fp8": scaled_fp8,
    **COMFY_QUANT,
    "mixed": mixed,
}
# What ComfyUI doesn't read.
BITSANDBYTES: dict[str, Callable[[Tensors], dict[str, Tensor]]] = {
    "nf4": bitsandbytes,
    "nf4, double": partial(bitsandbytes, nested=True),
    "nf4, blocks of 512": partial(bitsandbytes, block=512),
    "fp4, double": partial(bitsandbytes, kind="fp4", nested=True, block=128),
}
# Types that the gguf package writes, and one that only it reads.
GGUF = (
    "Q8_0",
    "Q5_1",
    "Q5_0",
    "Q4_1",
    "Q4_0",
    "BF16",
    "Q6_K",
    "Q5_K",
    "Q4_K",
    "Q3_K",
    "Q2_K",
    "IQ4_NL",
    "IQ4_XS",
    "TQ1_0",
)


def write_quantised(path: Path, tensors: Tensors, form: str) -> Path:
    """A file of that form below the folder `path`: its name is the form's."""
    name = form.replace(" ", "_").replace(",", "")
    if form in GGUF:
        return write_gguf(path / f"{name}.gguf", tensors, form)
    file = path / f"{name}.safetensors"
    quantise = {**SAFETENSORS, **BITSANDBYTES}[form]
    save_file({name: tensor.contiguous() for name, tensor in quantise(tensors).items()}, file)
    return file


def write_gguf(path: Path, tensors: Tensors, kind: str, architecture: str = "sd3") -> Path:
    """Matrices in that type where their rows are whole blocks of it; kernels folded to rows that are, as for SDXL's K types."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    quantisation = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quantisation]
    for name, tensor in tensors.items():
        folds = architecture == "sdxl" and tensor.ndim == 4 and tensor.numel() % block == 0 and tensor.shape[0] > 4
        if not (folds or (is_matrix(name, tensor) and tensor.shape[1] % block == 0)):
            writer.add_tensor(name, tensor.numpy())
            continue
        if folds:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
            tensor = tensor.reshape(-1, block)
        rows, columns = tensor.shape
        try:
            data = gguf.quants.quantize(tensor.numpy(), quantisation)
        except NotImplementedError:  # a type that it only reads: any bytes are values, if their factors are small
            data = blocks_of(kind, rows * columns // block, size).reshape(rows, -1)
        writer.add_tensor(name, data, raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Where a block's factors stand, two bytes each, as half precision, and a size that suits a model's weights.
FACTORS = {
    "Q6_K": ((208,), 4e-5),
    "Q5_K": ((0, 2), 1e-4),
    "Q4_K": ((0, 2), 2e-4),
    "Q3_K": ((108,), 1e-3),
    "Q2_K": ((80, 82), 2e-3),
    "IQ4_NL": ((0,), 5e-4),
    "IQ4_XS": ((0,), 4e-5),
}


def blocks_of(kind: str, count: int, size: int) -> Any:
    """Random blocks of values near a hundredth."""
    generator = torch.Generator().manual_seed(count)
    blocks = torch.randint(0, 256, (count, size), dtype=torch.uint8, generator=generator)
    places, value = FACTORS[kind]
    factor = torch.tensor([value], dtype=torch.float16).view(torch.uint8)
    for place in places:
        blocks[:, place : place + 2] = factor
    return blocks.numpy()
