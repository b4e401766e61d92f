"""SD3.5-Large's step with quantised weights on one GPU: dequantised layer by layer, or multiplied in fp8."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from parallel_backend.bench.device_time import timed
from parallel_backend.checkpoint_files.gguf_file import gguf_package
from parallel_backend.models.fp8_source import scaled_by_row
from parallel_backend.models.network import TokenNetwork
from parallel_backend.models.prediction import Predictor
from parallel_backend.quantized.forms import GGUF, ScaledFP8
from parallel_backend.quantized.weight import Part, QuantizedWeight, multiply_in_fp8

from ..options import Options
from ..report import Report, Value
from ..sizes import Sizes, sizes_of
from ..weights import mmdit_predictor, mmdit_tensors, relative_error
from .sd35 import evaluation

E4M3 = torch.float8_e4m3fn
Quantise = Callable[[Tensor], QuantizedWeight]


@torch.inference_mode()
def run(report: Report, options: Options) -> None:
    device, sizes = torch.device(options.device), sizes_of(options)
    dtype = sizes.dtypes[0]
    tensors = mmdit_tensors(sizes.mmdit, device, dtype)
    forms: dict[str, Quantise] = {
        "fp8, a scale a row": lambda weight: scaled_by_row(weight, None),
        "fp8, one scale": scaled,
        "fp8, one scale, products in fp8": multiplied,
        "Q8_0": partial(random_gguf, "Q8_0"),
        "Q4_0": partial(random_gguf, "Q4_0"),
    }
    plain = mmdit_predictor(tensors, sizes.mmdit, device, dtype)
    call = same_evaluation(sizes, plain)
    expected, base = torch.cat(call()), timed(call, device, sizes.warm_up, sizes.repeats)
    report.table(
        f"SD3.5-Large, {sizes.side} px, guidance, weights quantised",
        "weights",
        "MiB",
        "ms a step",
        "of the host",
        "times as long",
        "image differs",
    )
    report.row("as computed", held(plain), base.whole, base.host, 1.0, 0.0)

    def row(name: str, quantise: Quantise) -> None:
        predictor = mmdit_predictor(tensors, sizes.mmdit, device, dtype)
        replace_matrices(predictor, quantise)
        call = same_evaluation(sizes, predictor)
        differs: Value = "random bytes" if name.startswith("Q") else relative_error(torch.cat(call()), expected)
        spent = timed(call, device, sizes.warm_up, sizes.repeats)
        report.row(name, held(predictor), spent.whole, spent.host, spent.whole / base.whole, differs)

    for name, quantise in forms.items():
        report.attempt(name, partial(row, name, quantise))


def same_evaluation(sizes: Sizes, predictor: Predictor) -> Callable[[], list[Tensor]]:
    """Of one latent, whatever the predictor."""
    torch.manual_seed(3)
    return evaluation(sizes, predictor)


def scaled(weight: Tensor) -> QuantizedWeight:
    scale = weight.float().abs().max() / torch.finfo(E4M3).max
    part = Part(ScaledFP8(), ((weight.float() / scale).to(E4M3), scale), (0, weight.shape[0]))
    return QuantizedWeight([part], weight.shape, torch.float32)


def multiplied(weight: Tensor) -> QuantizedWeight:
    """Raises: UnsupportedError: comfy-kitchen is not there."""
    quantised = scaled(weight)
    multiply_in_fp8(quantised, bare=False)
    return quantised


def random_gguf(kind: str, weight: Tensor) -> QuantizedWeight:
    """Of that type, with any bytes: what dequantising takes doesn't depend on them."""
    gguf = gguf_package()
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rows, columns = weight.shape
    data = torch.randint(0, 60, (rows, columns // block * size), dtype=torch.uint8, device=weight.device)
    return QuantizedWeight([Part(GGUF(kind), (data,), (0, rows))], weight.shape, torch.float32)


def replace_matrices(predictor: Predictor, quantise: Quantise) -> None:
    """Those of the blocks, which are nearly all of the model; a form of blocks leaves rows that aren't whole ones."""
    assert isinstance(predictor.network, TokenNetwork)
    model = predictor.network.model
    for name, parameter in list(model.named_parameters()):
        if parameter.ndim == 2 and name.startswith("joint_blocks.") and parameter.shape[1] % 32 == 0:
            module, _, leaf = name.rpartition(".")
            quantised = quantise(parameter).placed(lambda tensor, _: tensor, predictor.dtype)
            setattr(model.get_submodule(module), leaf, quantised)


def held(predictor: Predictor) -> float:
    assert isinstance(predictor.network, TokenNetwork)
    weights = predictor.network.model.parameters()
    return sum(w.held_bytes if isinstance(w, QuantizedWeight) else w.nbytes for w in weights) / 2**20
