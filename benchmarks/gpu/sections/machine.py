"""What is measured on: device, driver, versions, attention packages, and the two ceilings."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from parallel_backend.bench.device_time import timed

from ..options import Options
from ..report import NO_GPU, Report

PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "flash-attn",
    "flash-attn-3",
    "sageattention",
    "safetensors",
    "nvidia-nccl-cu13",
)
PRODUCT, COPY_BYTES = 8192, 4 * 2**30


def run(report: Report, options: Options) -> None:
    device = torch.device(options.device)
    report.table("Machine", "what", "")
    report.row("Python", platform.python_version())
    for package in PACKAGES:
        report.row(package, _version(package))
    if device.type != "cuda":
        report.row("GPU", NO_GPU)
        return
    properties = torch.cuda.get_device_properties(device)
    report.row(
        "GPU", f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.1f} GiB"
    )
    report.row(
        "driver", _said(["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.limit", "--format=csv,noheader"])
    )
    report.row(
        "torch's CUDA, cuDNN, NCCL",
        f"{torch.version.cuda}, {torch.backends.cudnn.version()}, {torch.cuda.nccl.version()}",
    )
    report.table("Ceilings", "what", "")
    product = timed(_product(device), device, 3, 10).whole / 1000
    report.row("bf16 product of 8192, TFLOP/s", 2 * PRODUCT**3 / product / 1e12)
    copy = timed(_copy(device), device, 3, 10).whole / 1000
    report.row("copy on the device, TB/s read and written", 2 * COPY_BYTES / copy / 1e12)


def _product(device: torch.device) -> Callable[[], object]:
    a, b = (torch.randn(PRODUCT, PRODUCT, device=device, dtype=torch.bfloat16) for _ in range(2))
    return lambda: a @ b


def _copy(device: torch.device) -> Callable[[], object]:
    source, target = (torch.empty(COPY_BYTES, device=device, dtype=torch.uint8) for _ in range(2))
    return lambda: target.copy_(source)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _said(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"not known: {error}"
