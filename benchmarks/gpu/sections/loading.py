"""Reading a checkpoint of SD3.5-Large's size onto the card: as it is, and cast to what the mesh asks for."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from parallel_backend.bench.device_time import synchronize
from parallel_backend.config import MeshSpec
from parallel_backend.distributed.mesh import build_mesh
from parallel_backend.models.checkpoint import load_parameters
from parallel_backend.models.families import open_model
from parallel_backend.models.mmdit import MMDiTConfig

from ..checkpoint_on_disk import bytes_of, write_tensors
from ..options import Options
from ..report import Report
from ..sizes import sizes_of
from ..weights import mmdit_tensors

FILE = "sd35.safetensors"
GB = 1e9


@torch.inference_mode()
def run(report: Report, options: Options) -> None:
    device = torch.device(options.device)
    path = write_sd35(options, device)
    size = path.stat().st_size
    report.table(f"Loading a float16 file of {size / GB:.2f} GB onto {device.type}", "how", "s", "GB/s")
    # What was read once is in the page cache from here on, for all alike.
    cases: dict[str, Callable[[], object]] = {
        "safetensors' load_file, float16": lambda: load_file(path, device=options.device),
        "ours, as bfloat16": lambda: _load(path, device, torch.bfloat16),
        "ours, as float16": lambda: _load(path, device, torch.float16),
    }
    for name, load in cases.items():
        begun = time.perf_counter()
        kept = load()
        synchronize(device)
        spent = time.perf_counter() - begun
        report.row(name, spent, size / spent / GB)
        del kept
        if device.type == "cuda":
            torch.cuda.empty_cache()


def write_sd35(options: Options, device: torch.device) -> Path:
    """A float16 file with random weights, of as many blocks as the disk has room for; the one that is there, if any."""
    path = options.scratch / FILE
    if not path.exists():
        config = _that_fits(sizes_of(options).mmdit, shutil.disk_usage(options.scratch).free)
        part = path.with_suffix(".part")
        write_tensors(part, mmdit_tensors(config, device, torch.float16))
        part.rename(path)
    return path


def _that_fits(config: MMDiTConfig, free: int) -> MMDiTConfig:
    while bytes_of(config, torch.float16) > 0.8 * free and config.depth > 1:
        config = replace(config, depth=config.depth // 2)
    return config


def _load(path: Path, device: torch.device, dtype: torch.dtype) -> object:
    opened = open_model(path)
    with torch.device("meta"):
        model = opened.build(build_mesh(MeshSpec()), "native")
    load_parameters(model, opened.source, device=device, dtype=dtype, unread=opened.unread(model))
    return model
