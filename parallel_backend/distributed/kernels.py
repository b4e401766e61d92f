"""The attention kernels there are, what each needs, and which come first on which card.

They are diffusers' (of other packages, where these are installed) and torch's; none is written here.
Shapes: B batch, L tokens, N heads, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..errors import ConfigError
from .kernel_packages import BROKEN, PACKAGES  # before diffusers
from .ring import LseKernel

# isort: split
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch.nn.attention import SDPBackend

HALF = (torch.float16, torch.bfloat16)
_AMPERE, _HOPPER, _BLACKWELL = (8, 0), (9, 0), (10, 0)


@dataclass(frozen=True)
class Use:
    """What a model asks of its kernel on this rank: `heads` of `head_dim`; with log-sum-exp too where it is for `ring`."""

    device: torch.device
    dtype: torch.dtype
    ring: bool
    heads: int
    head_dim: int


@dataclass(frozen=True)
class Kernel:
    """What a kernel is and needs.

    Args:
        function: what diffusers has of its package where that is installed, fits torch and is new enough; "" is torch's own.
        least, below: the compute capabilities of the cards that it is made for.
        any_dtype: it takes float32 too.
        lse: (q, k, v) -> (out BLNH, log-sum-exp BLN in fp32); None where it has none.
        coarse: it computes in 8 bits.
    """

    dispatch: AttentionBackendName
    function: str = ""
    least: tuple[int, int] = (0, 0)
    below: tuple[int, int] = (99, 0)
    any_dtype: bool = False
    most_head_dim: int = 256
    lse: LseKernel | None = None
    coarse: bool = False


def _dispatched_with_lse(backend: AttentionBackendName, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = dispatch_attention_fn(q, k, v, backend=backend, attention_kwargs={"return_lse": True})
    if backend is AttentionBackendName.FLASH:  # gives B, N, L; the others' is turned already
        lse = lse.transpose(1, 2)
    return out, lse.float()


def _cudnn_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))  # other layouts have given wrong numbers
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    return out.transpose(1, 2), lse.reshape(q.shape[:3]).transpose(1, 2)  # torch 2.9 has put a fourth axis of 1 there


def _efficient_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, compute_log_sumexp=True)[:2]
    lse = lse.narrow(2, 0, q.shape[2])  # this kernel pads the queries of its log-sum-exp to its block size
    return out.transpose(1, 2), lse.transpose(1, 2)


def _native_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    on_cpu = q.device.type == "cpu"
    if not on_cpu and (q.dtype == torch.float32 or torch.cuda.get_device_capability(q.device) < _AMPERE):
        return _efficient_with_lse(q, k, v)
    aten = torch.ops.aten
    kernel = aten._scaled_dot_product_flash_attention_for_cpu if on_cpu else aten._scaled_dot_product_flash_attention
    out, lse = kernel(*(x.transpose(1, 2) for x in (q, k, v)))[:2]
    return out.transpose(1, 2), lse.transpose(1, 2)


_NAMES = AttentionBackendName
_FLASH_LSE, _FLASH3_LSE = (partial(_dispatched_with_lse, name) for name in (_NAMES.FLASH, _NAMES._FLASH_3))
KERNELS = {
    "native": Kernel(_NAMES.NATIVE, any_dtype=True, most_head_dim=2**16, lse=_native_with_lse),
    "flash": Kernel(_NAMES.FLASH, "flash_attn_func", _AMPERE, lse=_FLASH_LSE),
    "flash3": Kernel(_NAMES._FLASH_3, "flash_attn_3_func", _HOPPER, _BLACKWELL, lse=_FLASH3_LSE),
    "sage": Kernel(_NAMES.SAGE, "sageattn", _AMPERE, most_head_dim=128, coarse=True),
    "cudnn": Kernel(_NAMES._NATIVE_CUDNN, "", _AMPERE, lse=_cudnn_with_lse),
    "efficient": Kernel(_NAMES._NATIVE_EFFICIENT, any_dtype=True, most_head_dim=2**16, lse=_efficient_with_lse),
}


def attend(kernel: str, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
    """(B, L, N, H): attention of all queries to all keys given."""
    return dispatch_attention_fn(q_BLNH, k_BLNH, v_BLNH, backend=KERNELS[kernel].dispatch)


def resolve_kernel(name: str, use: Use) -> list[str]:
    """The kernels that `name` stands for here, the one to be preferred first; "auto" ends with torch's own.

    Raises: ConfigError: the one that is named can't compute this here.
    """
    if name == "auto":
        return [kernel for kernel in _preferred(use) if refusal(kernel, use) is None]
    if (error := refusal(name, use)) is not None:
        raise error
    return [name]


def _preferred(use: Use) -> list[str]:
    """For any card of this kind, whatever is installed.

    flash-attn 2 and torch's own are the same on Ampere, Ada and small Blackwells. On Hopper and large Blackwells cuDNN's and
    flash-attn 3 are about a third faster than both.
    """
    if use.device.type != "cuda":
        return ["native"]
    capability = _capability(use.device)
    if capability is not None and _HOPPER <= capability < (11, 0):
        first = "native" if not use.ring and native_is_cudnn(use) else "cudnn"
        return list(dict.fromkeys([first, "flash3", "native", "efficient"]))
    return ["flash", "native", "efficient"]


def native_is_cudnn(use: Use) -> bool:
    """Whether torch itself takes cuDNN's kernel here; then it needs no copies of queries, keys and values."""
    x = torch.empty(1, use.heads, 64, use.head_dim, device=use.device, dtype=use.dtype)
    return torch._fused_sdp_choice(x, x, x) == SDPBackend.CUDNN_ATTENTION.value


def refusal(name: str, use: Use) -> ConfigError | None:
    """Why this kernel can't compute that here, as far as it can be known without trying."""
    kernel, package = KERNELS[name], PACKAGES.get(name, "")
    what = f"Attention kernel {name!r}"
    if name == "native":
        return None
    if use.device.type != "cuda":
        return ConfigError(f"{what} needs a GPU, and the ranks compute on {use.device.type}.", "Use 'auto'.")
    capability = _capability(use.device)
    if capability is not None and not kernel.least <= capability < kernel.below:
        cards = f"{_dotted(kernel.least)} or more" + (
            f", below {_dotted(kernel.below)}" if kernel.below[0] < 99 else ""
        )
        return ConfigError(
            f"{what} is made for compute capability {cards}; {torch.cuda.get_device_name(use.device)} has "
            f"{_dotted(capability)}.",
            "Use 'auto'.",
        )
    if package in BROKEN:
        return ConfigError(
            f"{what} needs the package {package}, which can't be imported here: {BROKEN[package]}.",
            f"Install a build of it for torch {torch.__version__}, or use 'auto'.",
        )
    if package and getattr(attention_dispatch, kernel.function, None) is None:
        return ConfigError(
            f"{what} needs the package {package}, built for this torch and not too old.", "Install it, or use 'auto'."
        )
    if not kernel.any_dtype and use.dtype not in HALF:
        return ConfigError(
            f"{what} can't compute in {str(use.dtype).removeprefix('torch.')}.", "Use float16, bfloat16 or 'native'."
        )
    if use.head_dim > kernel.most_head_dim:
        return ConfigError(
            f"{what} takes heads of up to {kernel.most_head_dim} values; this model's have {use.head_dim}.",
            "Use 'auto'.",
        )
    if use.ring and kernel.lse is None:
        return ConfigError(
            f"{what} gives no log-sum-exp, which ring attention needs.",
            "Use 'auto', 'native' or 'flash' with ring, or ulysses in its place.",
        )
    return None


def _capability(device: torch.device) -> tuple[int, int] | None:
    """None where the numbers are another maker's, whose cards don't follow these rules."""
    return None if torch.version.hip else torch.cuda.get_device_capability(device)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
