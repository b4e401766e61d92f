"""The kernels become machine code for the cards: what Triton's interpreter runs, its compiler may still refuse.

No GPU is needed for that: what a launch would be given is written down, and compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from parallel_backend.fused.all import FUSED
from parallel_backend.fused.group_norm import NORM
from parallel_backend.fused.joint_heads import JOIN, PART
from parallel_backend.fused.modulated_norm import MODULATED_NORM
from parallel_backend.fused.operation import Fused

CPU, ROOT = torch.device("cpu"), Path(__file__).parents[1]
# Hopper; with half precision also Ampere and consumer Blackwell.
HOPPER, OTHERS = 90, (80, 120)
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def in_dtype(fused: Fused, dtype: torch.dtype) -> list[Any]:
    """The trial's arguments, half precision in `dtype`."""
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.dtype == torch.float16 else x, list(fused.trial(CPU)))


def variants() -> Iterator[tuple[Fused, list[Any]]]:
    """All that makes other code of a kernel than its trial."""
    x, every, shares, fresh, rank, weight, bias, eps, _, _, _, row, _ = NORM.trial(CPU)
    for top, bottom in ((None, None), (None, row), (row, row)):
        yield NORM, [x, every, shares, fresh, rank, weight, bias, eps, True, 1, 1, top, bottom]
    yield NORM, [x, every, shares, None, rank, None, None, eps, False, 0, 0, None, None]
    yield NORM, [x[:1], every[:1, :, :1], shares[:1], None, 0, weight, bias, eps, True, 0, 1, None, row[:1]]
    q, others, (one, _, _, two, _, _), *sizes = JOIN.trial(CPU)
    for first, second in ((None, None), (None, two), (one, two)):
        yield JOIN, [q, others, [first, first, None, second, second, None], *sizes]
    yield JOIN, [q[:1], [x[:1] for x in others], [None] * 6, sizes[0], 1, None]
    # One token of each stream, of one row: counts are constants then.
    yield JOIN, [q[:1, :1], [x[:1, :1] for x in others], *JOIN.trial(CPU)[2:]]
    yield PART, [torch.randn(5 * 64).half(), 1, 0, 5, 64, 2]
    yield PART, [torch.randn(2, 5, 7, 64).half().transpose(1, 2), 2, 3, 5, 64, 1]
    x, shifts, scales, eps = MODULATED_NORM.trial(CPU)
    yield MODULATED_NORM, [x, shifts[:1], scales[:1], eps]


def compile_all() -> None:
    """In a process of its own, whose launches of kernels are written down in place of done."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    launched: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []

    def run(self: Any, *args: Any, grid: object, warmup: bool, **named: Any) -> None:
        options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
        launched.append((self, dict(zip(self.arg_names, args, strict=False)) | named, options))

    JITFunction.run = run
    for dtype in TYPES:
        for fused in FUSED:
            fused.launch(*in_dtype(fused, dtype))
    for fused, arguments in variants():
        fused.launch(*arguments)
    done = set()
    for number, (kernel, values, options) in enumerate(launched):
        constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr or is_one(values[p.name])}
        signature = {name: "constexpr" if name in constants else kind_of(value) for name, value in values.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        for card in (HOPPER, *(OTHERS if number < len(FUSED) else ())):
            if (key := (kernel.__name__, str(signature), str(constants), card)) not in done:
                done.add(key)
                triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)
    assert {name for name, *_ in done} == {kernel.__name__ for kernel, *_ in launched}
    print(f"{len(done)} compiled: {sorted({name for name, *_ in done})}")


def is_one(value: object) -> bool:
    """Triton takes such a number as a constant."""
    return isinstance(value, int) and not isinstance(value, bool) and value == 1


def kind_of(value: object) -> str:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    return "i1" if isinstance(value, bool) else "i32" if isinstance(value, int) else "fp32"


def test_every_kernel_compiles_for_every_card(tmp_path: Path) -> None:
    if find_spec("triton") is None:
        pytest.skip("no Triton on this machine")
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "TRITON_CACHE_DIR": str(tmp_path)}
    code = "import test_fused_compiled; test_fused_compiled.compile_all()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.split("[")[1].split(",")) == len(FUSED), done.stdout
