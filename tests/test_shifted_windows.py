"""Self-attentions in shifted windows, on bands and on rows of several ranks, against windows that are cut out of the whole picture."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rank_pool import RankPool
from recordings import Recorder
from test_attention_patches import COARSE, FILE, FINE, assert_alike, attended, results_case, rows_of
from test_extras import MIDDLE, SDXL, predictor
from torch import Tensor

from parallel_backend import MeshSpec
from parallel_backend.extras.reading import Extras
from parallel_backend.models.captured import CapturedNetwork
from parallel_backend.models.unet import attention_places
from parallel_backend.rpc.extras import AnyExtra, ShiftedWindows
from parallel_backend.small_checkpoints.unet import CONFIGS, random_unet

Size = tuple[int, int]
MESHES = [*(MeshSpec(patch=degree) for degree in (1, 2, 3)), MeshSpec(cfg=2, patch=2)]
GAINS = (0.9, 1.2, 1.1, 0.8)
# Of the latent's sides, a half and a quarter of which the places have, how resized, and shifts of each place's windows.
CASES: dict[str, tuple[Size, tuple[str, str], list[Size]]] = {
    "even": ((16, 12), ("nearest", "nearest"), [(2, 1), (0, 0), (1, 2)]),
    "odd": ((42, 26), ("nearest-exact", "nearest-exact"), [(5, 3), (0, 0), (2, 1)]),
    "odd, by other methods": ((21, 13), ("bicubic", "bislerp"), [(0, 0), (1, 1), (2, 3)]),
}
PLACES = [FINE, MIDDLE, COARSE]


def sides_of(place: Any, size: Size) -> Size:
    unit = 2 if place == FINE else 4
    return -(-size[0] // unit), -(-size[1] // unit)


def asked_for(case: str) -> ShiftedWindows:
    size, (method, back), shifts = CASES[case]
    windows = [(*sides_of(place, size), *shift) for place, shift in zip(PLACES, shifts, strict=True)]
    return ShiftedWindows(places=PLACES, windows=windows, method=method, back=back, gains=GAINS)


class InWindows:
    """diffusers' self-attention, of each of four windows by itself."""

    def __init__(self, sides: Size, shift: Size, methods: tuple[str, str]) -> None:
        self.sides, self.shift, self.methods = sides, shift, methods

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        before, cut, joined, after = GAINS
        even = tuple(side + side % 2 for side in self.sides)
        x = self.resized(hidden_states * before, self.sides, even, self.methods[0])
        x = x.unflatten(1, even).roll([-by for by in self.shift], (1, 2))
        out = torch.empty_like(x)
        for rows in x.new_tensor(range(even[0])).long().chunk(2):
            for columns in x.new_tensor(range(even[1])).long().chunk(2):
                window = x[:, rows][:, :, columns].flatten(1, 2) * cut
                qkv = (project(window) for project in (attn.to_q, attn.to_k, attn.to_v))
                found = attn.to_out[0](attended(*qkv, attn.heads)).unflatten(1, (len(rows), len(columns)))
                out[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = found * joined
        out = out.roll(self.shift, (1, 2)).flatten(1, 2)
        return self.resized(out, even, self.sides, self.methods[1]) * after

    def resized(self, x: Tensor, sides: Any, wanted: Any, method: str) -> Tensor:
        if sides == wanted:
            return x
        image = x.transpose(1, 2).unflatten(2, sides)
        if method == "bislerp":  # tried by itself elsewhere
            from parallel_backend.distributed.resize import resized

            return resized(image, *wanted, method).flatten(2).transpose(1, 2)
        return F.interpolate(image, size=wanted, mode=method).flatten(2).transpose(1, 2)


@cache
def expected(case: str) -> Tensor:
    size, methods, shifts = CASES[case]
    model, rows = random_unet(CONFIGS["tiny"]), rows_of(size)
    for place, shift in zip(PLACES, shifts, strict=True):
        attention_places(model)[place].attn1.processor = InWindows(sides_of(place, size), shift, methods)  # type: ignore[assignment]
    with torch.inference_mode():
        return model(rows.x, rows.timesteps, rows.prompt.context, class_labels=rows.prompt.pooled).sample


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mesh", MESHES, ids=MeshSpec.describe)
def test_equals_windows_of_the_whole_picture(mesh: MeshSpec, case: str, ranks: RankPool, unets: Path) -> None:
    size, asked = CASES[case][0], asked_for(case)
    (plain,) = ranks(1, results_case, unets / FILE, MeshSpec(), size, [])[0]
    assert (expected(case) - plain).abs().max() > 1e-2 * plain.abs().max()
    for (out,) in ranks(mesh.world_size, results_case, unets / FILE, mesh, size, [asked]):
        assert_alike(out, expected(case))


def test_what_is_drawn_anew_is_not_recorded(unets: Path) -> None:
    """Graphs of it would be made at every step, and done again at none."""
    plain = predictor(unets / FILE, MeshSpec(), SDXL)
    model, recorder = replace(plain), Recorder()
    model.captured = CapturedNetwork(plain.network, plain.mesh, recorder)
    size, asked = CASES["even"][0], [asked_for("even")]
    extras: list[AnyExtra] = list(asked)
    with torch.inference_mode():
        rows = replace(rows_of(size), extras=Extras().read(extras, [], plain, size, (0, 1)))
        for _ in range(3):
            assert_alike(model.output(rows), expected("even"))
    assert (recorder.recorded_ones, recorder.done_again) == (0, 0)
