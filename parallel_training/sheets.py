"""What a run shows of itself: sheets of pictures, and the loss as a curve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

GAP = 4
SMOOTHED = 25


def tile(images_BCYX: Tensor, columns: int) -> Image.Image:
    """Pictures (B, 3, Y, X) in 0..1 in rows of `columns`."""
    count, _, height, width = images_BCYX.shape
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), "white")
    for index, image in enumerate(images_BCYX.clamp(0, 1).mul(255).round().to(torch.uint8)):
        place = (GAP + index % columns * (width + GAP), GAP + index // columns * (height + GAP))
        sheet.paste(Image.fromarray(image.permute(1, 2, 0).numpy()), place)
    return sheet


def plot_losses(losses: Sequence[float], path: Path, title: str) -> None:
    """The loss of each step, and its mean over the last few, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    values = torch.tensor(losses)
    axes.plot(values, color="0.8", linewidth=0.7)
    if len(losses) > SMOOTHED:
        axes.plot(range(SMOOTHED - 1, len(losses)), values.unfold(0, SMOOTHED, 1).mean(1), color="C0")
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
