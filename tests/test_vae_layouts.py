"""VAE files in every layout hold the weights that diffusers reads of the plain one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_vae import FILES, reference
from torch import Tensor

from parallel_backend import Backend
from parallel_backend.distributed.mesh import BandAxes
from parallel_backend.errors import CheckpointError
from parallel_backend.models.vae_checkpoint import VAECheckpoint, open_vae

KINDS = {"kl-16": FILES["kl-16"][0], "kl-4": FILES["kl-4"][0]}
Tensors = dict[str, Tensor]
OF_ATTENTION = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}


def renamed(tensors: Tensors, names: dict[str, str], flat: bool = False) -> Tensors:
    """LDM's tensors with other names of the attention's parts, as matrices if `flat`."""

    def name(old: str) -> str:
        return re.sub(r"(attn_1\.)(\w+)(\.\w+)$", lambda m: m[1] + names.get(m[2], m[2]) + m[3], old)

    return {
        name(old): tensor.squeeze().clone() if flat and "attn_1" in old and tensor.ndim == 4 else tensor
        for old, tensor in tensors.items()
    }


def diffusers_tensors(models: Path, kind: str) -> Tensors:
    return {name: tensor.contiguous() for name, tensor in reference(models, kind).state_dict().items()}


def of_old_diffusers(tensors: Tensors) -> Tensors:
    parts = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pattern = re.compile(r"(attentions\.0\.)(to_[qkv]|to_out\.0)")
    return {pattern.sub(lambda m: m[1] + parts[m[2]], name): tensor for name, tensor in tensors.items()}


def below(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


OTHERS = {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}
TO_NAMES = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
# How (LDM's tensors, diffusers' tensors) are written below a folder.
LAYOUTS: dict[str, Callable[[Tensors, Tensors], Tensors]] = {
    "ldm.safetensors": lambda ldm, _: ldm | OTHERS,
    "ldm_to_q.safetensors": lambda ldm, _: renamed(ldm, TO_NAMES, flat=True),
    "ldm_query.safetensors": lambda ldm, _: renamed(ldm, OF_ATTENTION),
    "diffusers.safetensors": lambda _, theirs: theirs,
    "old_diffusers.safetensors": lambda _, theirs: of_old_diffusers(theirs),
    "whole.safetensors": lambda ldm, _: below("first_stage_model.", ldm) | {"model.diffusion_model.x": torch.zeros(1)},
    "ldm.pt": lambda ldm, _: ldm | OTHERS,
    "whole.ckpt": lambda ldm, _: below("first_stage_model.", ldm) | OTHERS,
}


def written(path: Path, tensors: Tensors) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors, "global_step": 7}, path)
    return path


def assert_whole(opened: VAECheckpoint, expected: Tensors) -> None:
    """Banded layers have names of their own, in the order of those that they stand for."""
    weights = opened.build(torch.device("cpu"), torch.float32, BandAxes()).model.state_dict()
    assert len(weights) == len(expected)
    assert all(map(torch.equal, weights.values(), expected.values()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_diffusers_weights(layout: str, kind: str, models: Path, tmp_path: Path) -> None:
    expected = diffusers_tensors(models, kind)
    path = written(tmp_path / layout, LAYOUTS[layout](load_file(models / KINDS[kind]), expected))
    opened = open_vae([path])
    assert opened.family == kind
    assert ("loss.logvar, model_ema.decay" in opened.note) == (layout in ("ldm.safetensors", "ldm.pt"))
    assert_whole(opened, expected)


def test_a_vae_in_bfloat16_inside_a_checkpoint_is_loaded(models: Path, tmp_path: Path) -> None:
    half = {name: tensor.bfloat16() for name, tensor in load_file(models / KINDS["kl-4"]).items()}
    path = written(tmp_path / "whole.safetensors", below("first_stage_model.", half))
    expected = {name: tensor.bfloat16().float() for name, tensor in reference(models, "kl-4").state_dict().items()}
    assert_whole(open_vae([path]), expected)


def test_a_pipelines_vae_folder_decodes_as_diffusers(models: Path, tmp_path: Path, backend2: Backend) -> None:
    model = reference(models, "kl-16")
    model.save_pretrained(tmp_path / "pipeline" / "vae")
    latent = torch.randn(1, 16, 12, 10, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = ((model.decode(latent).sample + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)
    decoded = backend2.load_vae(tmp_path / "pipeline", "float32").decode(latent)
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-4)


def test_a_link_of_taesd_counts_by_its_own_name(models: Path, tmp_path: Path, backend2: Backend) -> None:
    links = []
    for number, part in enumerate(("encoder", "decoder")):
        blob = tmp_path / "blobs" / f"{number:040x}"
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes((models / "vae_approx" / f"taesdxl_{part}.safetensors").read_bytes())
        links.append(tmp_path / f"taesdxl_{part}.safetensors")
        links[-1].symlink_to(blob)
    assert backend2.load_vae(links, "float32").loaded.family == "taesdxl"


def test_a_missing_and_a_misshapen_tensor_are_refused_by_name(models: Path, tmp_path: Path) -> None:
    tensors = load_file(models / KINDS["kl-16"])
    bias = tensors.pop("decoder.mid.attn_1.q.bias")
    with pytest.raises(CheckpointError, match=r"(?s)1 missing.*missing: decoder.mid_block.attentions.0.to_q.bias"):
        open_vae([written(tmp_path / "missing.safetensors", tensors)])
    tensors["decoder.mid.attn_1.q.bias"] = bias[:3].clone()
    with pytest.raises(CheckpointError, match=r"to_q.bias has shape \[3\], the model needs"):
        open_vae([written(tmp_path / "misshapen.safetensors", tensors)])
