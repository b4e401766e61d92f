"""Latents of odd and of the smallest sizes, and areas smaller than a band, for twins.py."""

import functools

import patch_cases
import torch
from twins import call

from nodes import ConditioningSetArea

MODELS = {name: patch_cases.MODELS[name] for name in ("sd3", "sd3.5-medium", "sdxl")}
# Height and width in cells.
SIZES = [(33, 17), (23, 24), (34, 60), (1, 1), (1, 9), (3, 5), (15, 16)]


def cases(twins):
    for name in ("sd3", "sd3.5-medium"):
        for rows, columns in SIZES:
            latent = torch.zeros(2, 16, rows, columns)
            yield name, f"size {rows}x{columns}", lambda model: model, {"latent": latent}
    for rows, columns in ((3, 5), (13, 40)):
        yield "sdxl", f"size {rows}x{columns}", lambda model: model, {"latent": torch.zeros(2, 4, rows, columns)}
    yield "sdxl", "an area of 32 pixels", lambda model: model, {"of": functools.partial(sampled, twins)}


def sampled(twins, model):
    """One prompt for all of the picture, another for an area of four rows."""
    area = call(ConditioningSetArea, twins.prompt(model, 3), width=32, height=32, x=8, y=16, strength=1.0)
    latent = torch.zeros(1, 4, 12, 10)
    return twins.sample(model, positive=[*twins.prompt(model, 1), *area], latent=latent)
