"""InstantX's IP-Adapter for SD3.5: the node's own code on both sides, and the ranks' part beside plain torch on one process."""

from __future__ import annotations

from dataclasses import replace
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
from parallel_backend.errors import InputError
from parallel_backend.extras.reading import Extras
from parallel_backend.models.families import SD3
from parallel_backend.models.mmdit import EPS, JointBlock
from parallel_backend.rpc.extras import JointImagePrompt

PACK = Pack("ComfyUI-InstantX-IPAdapter-SD3", "INSTANTX_IPADAPTER_SD3_PATH", "joint_prompt_cases")
TOKENS, BLOCKS = 5, [1, 2, 3]


def asked(heads: int) -> JointImagePrompt[Tensor]:
    generator = torch.Generator().manual_seed(1)
    norms = 1 + 0.3 * torch.randn(len(BLOCKS), 2, 64, generator=generator)
    kv = [torch.randn(rows, len(BLOCKS), TOKENS, 2, heads, 64, generator=generator) for rows in (2, 1)]
    return JointImagePrompt(blocks=BLOCKS, norms=norms, keys_values=dict(enumerate(kv)), weight=0.8)


@torch.inference_mode()
def output_case(path: Path, mesh: MeshSpec, size: tuple[int, int]) -> Tensor:
    model, rows = predictor(path, mesh, SD3), rows_of(SD3, size)
    spec = asked(model.network.config.heads)
    tensors = spec.tensors()
    named = spec.each(lambda tensor: next(i for i, t in enumerate(tensors) if t is tensor))
    extras = Extras().read([named], tensors, model, size, (0, 1))
    return model.output(replace(rows, extras=extras, which=((0, 0), (0, 1), (1, 0))))


@torch.inference_mode()
def expected(path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """On one process, with the attention beside written out."""
    model = predictor(path, MeshSpec(), SD3)
    spec = asked(model.network.config.heads)
    kv = torch.cat([spec.keys_values[0], spec.keys_values[1]])  # by the three rows
    forward = JointBlock.forward

    def with_beside(self: JointBlock, c: Tensor, x: Tensor, c_mod: Any, x_mod: Any, attend: Any) -> Any:
        class Beside:
            def joint(self, text: Any, image: Any, eps: float) -> tuple[Tensor, Tensor]:
                of_text, of_image = attend.joint(text, image, eps)
                return of_text, of_image + plain(block, kv, image, spec)

            def __getattr__(self, name: str) -> Any:
                return getattr(attend, name)

        block = self.index
        return forward(self, c, x, c_mod, x_mod, Beside() if block in BLOCKS else attend)

    monkeypatch.setattr(JointBlock, "forward", with_beside)
    out = model.output(rows_of(SD3, size))
    monkeypatch.undo()
    return out


def plain(block: int, kv: Tensor, image: Any, spec: JointImagePrompt[Tensor]) -> Tensor:
    place = BLOCKS.index(block)

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
    wanted = expected(large, size, monkeypatch)
    for out in ranks(mesh.world_size, output_case, large, mesh, size):
        assert (out - wanted).abs().max() <= 1e-5 * wanted.abs().max()


WRONG = [
    ({"blocks": [1, 2, 99]}, "Joint block 99 is named"),
    ({"norms": torch.ones(3, 2, 32)}, r"Norms of shape \[3, 2, 32\] came for 3 blocks"),
    (
        {"keys_values": {0: torch.zeros(1, 3, 5, 2, 38, 64)}},
        r"have shape \[1, 3, 5, 2, 38, 64\]; 3 blocks of this model need",
    ),
    ({"keys_values": {1: asked(4).keys_values[1]}}, "without keys and values of branch 0"),
]


@pytest.mark.parametrize(("change", "words"), WRONG, ids=[words[:30] for _, words in WRONG])
def test_what_does_not_fit_is_named(change: dict[str, Any], words: str, model: RemoteModel) -> None:
    spec = msgspec.structs.replace(asked(4), **change)
    with pytest.raises(InputError, match=words):
        model.forward(torch.zeros(1, 16, 8, 8), torch.ones(1), POSITIVE.context, POSITIVE.pooled, extras=[spec])


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
    # Sent at each evaluation, since they change with the timestep.
    assert all("MiB an evaluation" in outcome["said"] for outcome in computed.values())


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
