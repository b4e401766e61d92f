"""What ComfyUI's own functions compute in, by card, file and family; the cards are invented, the functions are the real ones."""

from types import SimpleNamespace

import torch

# Name, capability, GiB: from Maxwell to Blackwell.
CARDS = [
    ("NVIDIA GeForce GTX 980", (5, 2), 4),
    ("NVIDIA GeForce GTX 1080 Ti", (6, 1), 11),
    ("Tesla P100-PCIE-16GB", (6, 0), 16),
    ("Quadro P2000", (6, 1), 5),
    ("Tesla V100-SXM2-32GB", (7, 0), 32),
    ("Tesla T4", (7, 5), 15),
    ("NVIDIA GeForce GTX 1660 SUPER", (7, 5), 6),
    ("NVIDIA GeForce RTX 2080 Ti", (7, 5), 11),
    ("NVIDIA A100-SXM4-80GB", (8, 0), 80),
    ("NVIDIA GeForce RTX 3090", (8, 6), 24),
    ("NVIDIA GeForce RTX 4090", (8, 9), 24),
    ("NVIDIA H100 80GB HBM3", (9, 0), 80),
    ("NVIDIA B200", (10, 0), 180),
    ("NVIDIA GeForce RTX 5090", (12, 0), 32),
]
# Parameters of the families that ranks hold, in billions.
SIZES = {"SDXL": 2.6, "SD3": 8.1}
FILES = ("float16", "bfloat16", "float32")


def choices(mm, supported_models):
    """By card: what is computed in for each family and file, and for a VAE."""
    mm.cpu_state, mm.is_nvidia = mm.CPUState.GPU, lambda: True
    device = torch.device("cuda:0")
    table = []
    for name, (major, minor), gib in CARDS:
        card = SimpleNamespace(name=name, major=major, minor=minor, total_memory=gib * 2**30)
        torch.cuda.get_device_properties = lambda *_, card=card: card
        torch.cuda.is_bf16_supported = lambda *_, **__: True  # torch emulates it on older cards
        mm.get_total_memory = lambda *_, card=card: card.total_memory
        found = {
            f"{family} {file}": str(computed(mm, device, getattr(supported_models, family), billions, file))[6:]
            for family, billions in SIZES.items()
            for file in FILES
        }
        vae = str(mm.vae_dtype(device, [torch.bfloat16, torch.float32]))[6:]
        table.append({"name": name, "capability": [major, minor], "models": found, "vae": vae})
    return table


def computed(mm, device, family, billions, file):
    supported = family.supported_inference_dtypes
    kept = mm.unet_dtype(
        model_params=int(billions * 1e9), supported_dtypes=list(supported), weight_dtype=getattr(torch, file)
    )
    return mm.unet_manual_cast(kept, device, supported) or kept
