"""InstantX's IP-Adapter for SD3.5: the node's own code on both sides, and the ranks' part beside plain torch on one process."""

from __future__ import annotations

import gc
import re
import weakref
from dataclasses import replace
from operator import is_
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F
from comfyui.installation import ComfyInstallation
from comfyui.twin_run import run_twins
from rank_pool import RankPool
from served import POSITIVE
from test_control_packs import Pack
from test_extras import MMDIT_MESHES, predictor, rows_of
from torch import Tensor

from parallel_backend import Backend, MeshSpec, RemoteModel
from parallel_backend.config import SAMPLERS, SAMPLERS_BELOW_ONE, SamplerSpec
from parallel_backend.errors import InputError
from parallel_backend.extras.reading import Extras
from parallel_backend.extras.target import Target
from parallel_backend.models.families import SD3
from parallel_backend.models.mmdit import EPS, JointBlock
from parallel_backend.rpc.extras import JointImagePrompt
from parallel_backend.sampling.image import sample_latent
from parallel_backend.sampling.parameterization import Flow

PACK = Pack("ComfyUI-InstantX-IPAdapter-SD3", "INSTANTX_IPADAPTER_SD3_PATH", "joint_prompt_cases")
TOKENS, BLOCKS, WIDTH = 5, [1, 2, 3], 48
SIGMAS = (0.75, 0.5)


def drawn(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def asked(heads: int, sigmas: tuple[float, ...] = ()) -> JointImagePrompt[Tensor]:
    """Of two latents of cond, and one row for those of uncond."""
    blocks, steps = len(BLOCKS), max(len(sigmas), 1)
    return JointImagePrompt(
        blocks=BLOCKS,
        norms=list(1 + drawn(blocks, 3, 64, seed=1, scale=0.3)),
        matrices=list(drawn(blocks, 2, heads * 64, WIDTH, seed=2, scale=WIDTH**-0.5)),
        tokens={branch: drawn(steps, rows, TOKENS, WIDTH, seed=3 + branch) for branch, rows in ((0, 2), (1, 1))},
        modulation={branch: drawn(steps, rows, blocks, 2, WIDTH, seed=5 + branch) for branch, rows in ((0, 2), (1, 1))},
        sigmas=list(sigmas),
        weight=0.8,
    )


@torch.inference_mode()
def output_case(path: Path, mesh: MeshSpec, size: tuple[int, int]) -> list[Tensor]:
    """At whatever sigma, at the second of two, and in one block alone."""
    model, rows = predictor(path, mesh, SD3), rows_of(SD3, size)
    outputs, extras = [], Extras()
    heads = model.network.config.heads
    for spec in (asked(heads), asked(heads, SIGMAS), in_first(asked(heads))):
        tensors = spec.tensors()
        named = spec.each(lambda tensor, given=tensors: next(i for i, t in enumerate(given) if t is tensor))
        (made,) = extras.read([named], tensors, model, size, (0, 1))
        acting = AtSigma(made, SIGMAS[1]) if spec.sigmas else made
        outputs.append(model.output(replace(rows, extras=[acting], which=((0, 0), (0, 1), (1, 0)))))
    return outputs


def in_first(spec: JointImagePrompt[Tensor]) -> JointImagePrompt[Tensor]:
    modulation = {branch: both[:, :, :1] for branch, both in spec.modulation.items()}
    own = {"blocks": spec.blocks[:1], "norms": spec.norms[:1], "matrices": spec.matrices[:1]}
    return msgspec.structs.replace(spec, modulation=modulation, **own)


class AtSigma:
    """An extra at that sigma, in an evaluation that knows of none."""

    def __init__(self, extra: Any, sigma: float) -> None:
        self.extra, self.sigma = extra, sigma

    def of(self, rows: Any) -> AtSigma:
        return AtSigma(self.extra.of(rows), self.sigma)

    def at(self, sigma: float | None) -> Any:
        return self.extra.at(self.sigma)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.extra, name)


@torch.inference_mode()
def expected(
    path: Path, size: tuple[int, int], spec: JointImagePrompt[Tensor], monkeypatch: pytest.MonkeyPatch, step: int = 0
) -> Tensor:
    """On one process, with the attention beside written out."""
    model = predictor(path, MeshSpec(), SD3)
    kv = keys_values(spec, step)
    forward = JointBlock.forward

    def with_beside(self: JointBlock, c: Tensor, x: Tensor, c_mod: Any, x_mod: Any, attend: Any) -> Any:
        class Beside:
            def joint(self, text: Any, image: Any, eps: float) -> tuple[Tensor, Tensor]:
                of_text, of_image = attend.joint(text, image, eps)
                return of_text, of_image + plain(block, kv, image, spec)

            def __getattr__(self, name: str) -> Any:
                return getattr(attend, name)

        block = self.index
        return forward(self, c, x, c_mod, x_mod, Beside() if block in spec.blocks else attend)

    monkeypatch.setattr(JointBlock, "forward", with_beside)
    out = model.output(rows_of(SD3, size))
    monkeypatch.undo()
    return out


def keys_values(spec: JointImagePrompt[Tensor], step: int) -> Tensor:
    """(3, blocks, T, 2, N, H), by the rows of the evaluation, block by block."""
    made = []
    for branch, row in ((0, 0), (0, 1), (1, 0)):
        tokens, modulation = spec.tokens[branch][step, row], spec.modulation[branch][step, row]
        normed = (tokens - tokens.mean(1, keepdim=True)) / (tokens.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
        for (shift, scale), own, norm in zip(modulation, spec.matrices, spec.norms, strict=True):
            taken = normed * (1 + scale) + shift
            k, v = ((taken @ matrix.T).unflatten(1, (-1, 64)) for matrix in own)
            made.append(torch.stack([F.rms_norm(k, (64,), norm[2], EPS), v], dim=1))
    return torch.stack(made).unflatten(0, (3, -1))


def plain(block: int, kv: Tensor, image: Any, spec: JointImagePrompt[Tensor]) -> Tensor:
    place = spec.blocks.index(block)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (image.heads, 64)).transpose(1, 2)

    def normed(x: Tensor, own: Tensor, further: Tensor) -> Tensor:
        return F.rms_norm(F.rms_norm(heads(x), (64,), own, EPS), (64,), further, EPS)

    own, further = image.norms_H, spec.norms[place]
    q, k = (normed(x, own[i], further[i]) for i, x in enumerate(image.qkv_BLF[:2]))
    of_prompt = [kv[:, place, :, part].transpose(1, 2) for part in (0, 1)]
    keys = torch.cat([k, of_prompt[0]], dim=2)
    values = torch.cat([heads(image.v_BLF), of_prompt[1]], dim=2)
    out = F.scaled_dot_product_attention(q, keys, values)
    return out.transpose(1, 2).flatten(-2) * spec.weight


@pytest.mark.parametrize("size", [(16, 12), (13, 9)], ids=str)
@pytest.mark.parametrize(
    "mesh", [*MMDIT_MESHES, MeshSpec(ulysses=2, ring=2), MeshSpec(tp=2, ulysses=2)], ids=MeshSpec.describe
)
def test_ranks_give_what_one_process_gives(
    mesh: MeshSpec, size: tuple[int, int], ranks: RankPool, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = predictor(large, MeshSpec(), SD3).network.config.heads
    specs = [(asked(heads), 0), (asked(heads, SIGMAS), 1), (in_first(asked(heads)), 0)]
    wanted = [expected(large, size, spec, monkeypatch, step) for spec, step in specs]
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3 * wanted[0].abs().max()
    for outputs in ranks(mesh.world_size, output_case, large, mesh, size):
        for out, own in zip(outputs, wanted, strict=True):
            assert (out - own).abs().max() <= 1e-5 * own.abs().max()


WRONG = [
    ({"blocks": [1, 2, 99]}, "Joint block 99 is named"),
    ({"norms": [torch.ones(2, 64)] * 3}, r"norms have shape \[2, 64\]; for 3 blocks of this model .* it is \[3, 64\]"),
    ({"norms": [torch.ones(3, 64)] * 2}, r"norms of 2 and matrices of 3 blocks, and names 3"),
    ({"matrices": [torch.zeros(2, 2432, WIDTH)] * 3}, r"matrices have shape \[2, 2432, 48\]"),
    (
        {"tokens": {0: torch.zeros(2, 1, 5, WIDTH)}, "modulation": {0: asked(4).modulation[0]}},
        "tokens of branch 0 have shape",
    ),
    ({"modulation": {0: asked(4).modulation[0]}}, r"tokens of branches \[0, 1\] and shifts and scales of \[0\]"),
    ({"tokens": {1: asked(4).tokens[1]}, "modulation": {1: asked(4).modulation[1]}}, "without tokens of branch 0"),
]


@pytest.mark.parametrize(("change", "words"), WRONG, ids=[words[:24] for _, words in WRONG])
def test_what_does_not_fit_is_named(change: dict[str, Any], words: str, model: RemoteModel) -> None:
    spec = msgspec.structs.replace(asked(4), **change)
    with pytest.raises(InputError, match=words):
        model.forward(torch.zeros(1, 16, 8, 8), torch.ones(1), POSITIVE.context, POSITIVE.pooled, extras=[spec])


def test_an_evaluation_of_sd35_large_sends_little() -> None:
    """The published adapter's sizes, two prompts, in halves."""
    blocks, width, tokens, heads = 38, 2432, 64, 38

    def of(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    spec = JointImagePrompt(
        blocks=list(range(blocks)),
        norms=[of(3, 64)] * blocks,
        matrices=[of(2, heads * 64, width)] * blocks,
        tokens={branch: of(1, 1, tokens, width) for branch in (0, 1)},
        modulation={branch: of(1, 1, blocks, 2, width) for branch in (0, 1)},
    )
    once, fresh = list[Tensor](), list[Tensor]()
    spec.each(once.append, fresh=fresh.append)
    mib = [sum(tensor.nbytes for tensor in tensors) / 2**20 for tensors in (once, fresh)]
    assert [round(size, 1) for size in mib] == [857.4, 1.3]


def test_matrices_are_made_once_as_long_as_they_are_kept(large: Path) -> None:
    """Tokens are others at each evaluation."""
    model, extras = predictor(large, MeshSpec(), SD3), Extras()
    spec = asked(model.network.config.heads)

    def read(spec: JointImagePrompt[Tensor]) -> Any:
        tensors = spec.tensors()
        named = spec.each(lambda tensor: next(i for i, t in enumerate(tensors) if t is tensor))
        return extras.read([named], tensors, model, (8, 8), (0, 1))[0]

    def later(spec: JointImagePrompt[Tensor]) -> JointImagePrompt[Tensor]:
        return msgspec.structs.replace(spec, tokens={b: t.clone() for b, t in spec.tokens.items()})

    first, second = read(spec), read(later(spec))
    assert first is not second and all(map(is_, first.matrices, second.matrices))
    gone = weakref.ref(first.matrices[0])
    fresh = msgspec.structs.replace(spec, matrices=[matrices.clone() for matrices in spec.matrices])
    del spec, first, second
    third = read(fresh)
    assert third.matrices[0] is not gone() is None


class Left:
    """A model, as far as what is made for it looks at it."""


def test_what_was_made_for_a_model_leaves_with_it() -> None:
    extras, model, tensor = Extras(), Left(), torch.ones(3)
    Target(model, 8, 8, extras._samplings, extras._parts).once(tensor, torch.clone)  # type: ignore[arg-type]
    assert not extras.prune() and len(extras._parts[tensor]) == 1
    del model
    gc.collect()
    assert extras.prune() and extras._parts[tensor] == [] and not extras.prune()


def run(comfy: ComfyInstallation, backend: Backend, files: Path) -> dict[str, dict[str, Any]]:
    if why := PACK.missing(comfy):
        pytest.skip(why)
    environment = {"TWINS_WORLD": str(backend.world_size), PACK.variable: str(PACK.folder)}
    found = run_twins(comfy, backend, files, PACK.cases, seconds=300, **environment)
    return {f"{model}, {case}": outcome for model, of_model in found.items() for case, outcome in of_model.items()}


WIDER = "sd3.5-large, SD3 IP-Adapter, of a wider model"


def check(found: dict[str, dict[str, Any]]) -> None:
    computed = {name: outcome for name, outcome in found.items() if name != WIDER}
    wrong = {name: o.get("error", o.get("far")) for name, o in computed.items() if not o.get("far", 1) <= 1e-4}
    assert computed and not wrong, wrong
    assert all(outcome["effect"] > 1e-2 for outcome in computed.values())
    # Of an adapter of four blocks of a small model; a node that leaves one of them out sends no more.
    sent = r"[12]\.\d MiB, sent once; 0\.0 MiB an evaluation"
    assert all(re.search(sent, outcome["said"]) for outcome in computed.values()), computed
    by_steps = {name for name, outcome in computed.items() if outcome["said"].startswith("step by step")}
    assert by_steps == {name for name in computed if "step by step" in name}


def test_the_nodes_own_code_gives_one_latent_on_both(comfy: ComfyInstallation, unets: Path, backend2: Backend) -> None:
    found = run(comfy, backend2, unets)
    check(found)
    assert "error" not in found[WIDER], found[WIDER]


def test_so_it_does_on_three_ranks(comfy: ComfyInstallation, unets: Path, runtime_folder: Path) -> None:
    backend = Backend(3, "cpu", "joint3", idle_seconds=300)
    check(run(comfy, backend, unets))
    backend.stop()


def test_so_it_does_on_four_ranks(comfy: ComfyInstallation, unets: Path, backend4: Backend) -> None:
    check(run(comfy, backend4, unets))


def test_a_rank_without_rows_waits_for_the_others(backend2: Backend, large: Path) -> None:
    given = (torch.ones(1, 16, 8, 8), torch.ones(1), POSITIVE.context, POSITIVE.pooled)
    alone, spread = (
        backend2.load_model(large, mesh, "float32").forward(*given, extras=[asked(4)])
        for mesh in (MeshSpec(tp=2), MeshSpec(cfg=2))
    )
    assert (alone - spread).abs().max() <= 1e-5 * alone.abs().max()


def test_samplers_that_begin_below_sigma_one_are_known() -> None:
    """What is asked at the schedule's sigmas alone would not be there at theirs."""
    for sampler in sorted({*SAMPLERS} - {"dpm_adaptive", "euler_stochastic"}):
        seen: list[float] = []

        def outputs(x: Tensor, timestep: Tensor, step: int, sigma: Tensor, seen: list[float] = seen) -> list[Tensor]:
            seen.append(float(sigma))
            return [x * 0.5, x * 0.25]

        spec = SamplerSpec(sampler=sampler, steps=4)
        sample_latent(outputs, spec, Flow(3.0), latent=torch.zeros(1, 16, 8, 8))
        assert (seen[0] < 1) == (sampler in SAMPLERS_BELOW_ONE), sampler
