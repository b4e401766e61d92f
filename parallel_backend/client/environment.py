"""What ranks are given of their starter's environment, and what else they are given.

A ComfyUI sets variables for itself, such as its allocator's; ranks that it starts are the same as those of `serve`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..config import BackendSpec, Hosts
from ..rpc import runtime_dir as files
from .gpu_environment import handed_on

PACKAGE_ROOT = Path(__file__).resolve().parents[2]

# fmt: off
_NAMES = frozenset((
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "TERM", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TMP", "TEMP", "VIRTUAL_ENV",
    "CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CPATH", "LIBRARY_PATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH",
    "http_proxy", "https_proxy", "no_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY",
    "REQUESTS_CA_BUNDLE", "DO_NOT_TRACK", "DBUS_SESSION_BUS_ADDRESS", "MAX_JOBS",
))
_PREFIXES = (
    "LC_", "LD_", "NIX_", "DYLD_", "XDG_", "SSL_", "CURL_CA_", "PYTHON", "CONDA_", "COVERAGE_", "COV_CORE_",
    "PARALLEL_MMDIT_", "TORCH", "PYTORCH_", "TRITON_", "HF_", "HUGGINGFACE_", "DIFFUSERS_", "SAFETENSORS_",
    "CUDA_", "CUBLAS", "CUDNN_", "NVIDIA_", "NVTX_", "HIP_", "HSA_", "ROCM_", "ROCR_", "AMD_", "MIOPEN_", "GPU_",
    "ROCBLAS_", "HIPBLASLT_", "TENSILE_", "AMDGPU_", "FLASH_ATTENTION_", "NVCC_", "NVSHMEM_",
    "NCCL_", "RCCL_", "GLOO_", "UCX_", "FI_", "OFI_", "RDMAV_", "IBV_", "MLX5_",
    "OMP_", "GOMP_", "KMP_", "MKL_", "DNNL_", "ONEDNN_", "OPENBLAS_", "MALLOC_", "MIMALLOC_", "GLIBC_TUNABLES",
)
# fmt: on
# glibc hands large freed blocks back to the kernel at once; to fault them in again takes up to a fifth of a step.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
# NCCL says why it fails, and what each rank waited for is written when it has waited too long.
NCCL_TELLS = {"NCCL_DEBUG": "WARN", "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
# Connections are made with a communicator, not at its first large message: what is free once a model is loaded stays so.
NCCL_CONNECTS = {"NCCL_RUNTIME_CONNECT": "0"}
# A CUDA graph's messages go through NCCL's own buffers, as all do: a rank without the graph takes part in them as ever.
NCCL_MIXES = {"NCCL_GRAPH_REGISTER": "0"}
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def environment(spec: BackendSpec, hosts: Hosts = Hosts()) -> dict[str, str]:  # noqa: B008 - frozen
    """What ranks start with: a part of this process's environment, and where its user has not said otherwise, our choices."""
    env = passed(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), env.get("PYTHONPATH", "")]))
    env["PARALLEL_MMDIT_RUNTIME_DIR"] = str(files.runtime_root())
    env |= handed_on(os.environ, spec.device)
    share = str(max(1, len(os.sched_getaffinity(0)) // spec.world_size))
    # Every rank compiles at once; left alone, each would start as many compilers as there are cores, half a GB apiece.
    chosen = {"TORCHINDUCTOR_COMPILE_THREADS": share, "OMP_NUM_THREADS": share}
    if spec.device == "cpu":
        chosen |= KEEP_FREED_MEMORY
    else:
        chosen |= NCCL_TELLS | NCCL_CONNECTS | NCCL_MIXES
        env |= _allocator(env)
    if hosts.interface:
        env |= dict.fromkeys(_INTERFACES, hosts.interface)
    elif hosts.count == 1 and (loopback := loopback_interface()):
        # No firewall, VPN or host name that leads nowhere is in the way of ranks that have one host in common.
        chosen |= dict.fromkeys(_INTERFACES, loopback)
    return chosen | env


def passed(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that mean something to a rank, its libraries or its compiler."""
    return {name: value for name, value in environ.items() if name in _NAMES or name.startswith(_PREFIXES)}


def _allocator(env: Mapping[str, str]) -> dict[str, str]:
    """torch's own allocator, whose segments grow: sizes change from prompt to prompt, and fixed ones leave gaps.

    ComfyUI chooses cudaMallocAsync for itself, which takes a call of the driver for each tensor of a step.
    """
    settings = {}
    for name in [name for name in _ALLOCATOR if name in env] or _ALLOCATOR[:1]:
        kept = [part for part in env.get(name, "").split(",") if part and not part.strip().startswith("backend:")]
        if not any(part.strip().startswith("expandable_segments:") for part in kept):
            kept.append("expandable_segments:True")
        settings[name] = ",".join(kept)
    return settings


def loopback_interface(folder: Path = Path("/sys/class/net")) -> str:
    """The name of the interface that leads back to this host, mostly "lo"; "" where none is found."""
    up, loopback = 0x1, 0x8  # IFF_UP, IFF_LOOPBACK of netdevice(7)
    for flags in sorted(folder.glob("*/flags")):
        if int(flags.read_text(), 16) & (up | loopback) == up | loopback:
            return flags.parent.name
    return ""
