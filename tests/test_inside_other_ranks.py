"""What hangs inside a model gives one latent on one, three and four ranks as well: core's nodes and packs' in one process for each."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_gate_pack as gate
import test_guidance_comfyui as guidance
import test_guidance_packs as of_guidance
import test_hidiffusion_pack as hidiffusion
import test_nag_pack as nag
import test_perturbed_pack as perturbed
import test_region_packs as regions
import test_style_packs as style
from comfyui.installation import ComfyInstallation
from comfyui.twin_run import run_twins
from test_control_packs import PYTHONPATH, Outcomes, wrong

from parallel_backend import Backend

OF_CORE = ("inside_cases", "cache_cases", "block_cases", "attention_cases", "guidance_cases")
PACKS = (perturbed.PERTURBED, hidiffusion.HIDIFFUSION, nag.NAG, gate.TGATE, of_guidance.PPM, *style.PACKS)


def run(comfy: ComfyInstallation, backend: Backend, files: Path) -> Outcomes:
    """Packs that aren't there are left out: their own tests say so."""
    packs = [pack for pack in (*regions.COMPUTED, *PACKS) if not pack.missing(comfy)]
    cases = [*OF_CORE, *dict.fromkeys(pack.cases for pack in packs)]
    environment = PYTHONPATH | {pack.variable: str(pack.folder) for pack in packs}
    world = str(backend.world_size)
    found = run_twins(comfy, backend, files, *cases, seconds=500, TWINS_WORLD=world, **environment)
    return {f"{model}, {case}": outcome for model, of_model in found.items() for case, outcome in of_model.items()}


def check(found: Outcomes) -> None:
    computed = {
        name: outcome for name, outcome in regions.computed(found).items() if name not in perturbed.refused(found)
    }
    assert len(computed) > 20 and not wrong(computed), wrong(computed)
    assert not guidance.not_as_named({name: o for name, o in computed.items() if "step by step: " in name}), (
        "the backend runs what was to go step by step"
    )


@pytest.mark.parametrize("world", [1, 3])
def test_each_gives_one_latent_on_both(world: int, comfy: ComfyInstallation, unets: Path, runtime_folder: Path) -> None:
    backend = Backend(world, "cpu", f"inside{world}", idle_seconds=300)
    try:
        check(run(comfy, backend, unets))
    finally:
        backend.stop()


def test_each_gives_one_latent_on_four_ranks(comfy: ComfyInstallation, unets: Path, backend4: Backend) -> None:
    check(run(comfy, backend4, unets))
