"""Meshes for twins of each number of ranks, which a run's environment names."""

import os

WORLD = int(os.environ.get("TWINS_WORLD", "2"))
_SD3 = {1: [{}], 2: [{"cfg": 2}, {"tp": 2}], 3: [{"ulysses": 3}], 4: [{"cfg": 2, "ring": 2}, {"pp": 2, "ulysses": 2}]}
_SDXL = {
    1: [{}],
    2: [{"patch": 2}, {"cfg": 2}],
    3: [{"patch": 3}],
    4: [{"cfg": 2, "patch": 2}, {"patch": 4, "sliced": True}],
}


def models():
    """Files and meshes by name: the first of each family has the plain name."""
    found = {}
    for family, file, meshes in (
        ("sd3.5-large", "sd3.5-large.safetensors", _SD3[WORLD]),
        ("sdxl", "unet-tiny.safetensors", _SDXL[WORLD]),
    ):
        for number, mesh in enumerate(meshes):
            named = " ".join(f"{axis}={degree}" for axis, degree in mesh.items())
            found[f"{family}, {named}" if number else family] = file, mesh
    return found
