"""Which mesh a model gets whose steps are to be displaced: one that has them, wherever the degrees leave room for it."""

from __future__ import annotations

import pytest

from parallel_backend.config import AXES
from parallel_backend.errors import ConfigError
from parallel_backend.mesh_choice.displaced import can_displace, displaced_mesh

OPEN = {"dp": 0, "cfg": 0, "pp": 1, "patch": 0, "ring": 1, "ulysses": 0, "tp": 1}


@pytest.mark.parametrize(
    ("kind", "world_size", "degrees", "expected"),
    [
        ("mmdit", 2, {}, "pp=2"),  # in place of cfg 2, which has nothing to displace
        ("mmdit", 3, {}, "pp=3"),
        ("mmdit", 4, {}, "cfg=2 pp=2"),
        ("mmdit", 8, {}, "cfg=2 pp=4"),
        ("mmdit", 4, {"ring": 2}, "cfg=2 ring=2"),
        ("mmdit", 8, {"ring": 2}, "cfg=2 ring=2 ulysses=2"),
        ("mmdit", 8, {"pp": 2}, "cfg=2 pp=2 ulysses=2"),
        ("mmdit", 4, {"pp": 4}, "pp=4"),
        ("mmdit", 4, {"tp": 2}, "pp=2 tp=2"),
        ("mmdit", 8, {"ulysses": 2}, "cfg=2 pp=2 ulysses=2"),
        ("mmdit", 4, {"ulysses": 2}, "pp=2 ulysses=2"),
        ("mmdit", 8, {"dp": 2}, "dp=2 cfg=2 pp=2"),
        ("unet", 2, {}, "patch=2"),
        ("unet", 4, {}, "cfg=2 patch=2"),
        ("unet", 8, {"patch": 4}, "cfg=2 patch=4"),
        ("unet", 4, {"cfg": 1}, "patch=4"),
    ],
)
def test_an_axis_that_has_displaced_steps_takes_what_is_left(
    kind: str, world_size: int, degrees: dict[str, int], expected: str
) -> None:
    choice = displaced_mesh(world_size, kind, OPEN | degrees)
    assert choice.mesh.describe() == expected
    assert can_displace(choice.mesh, kind) and choice.mesh.world_size == world_size
    said = kind == "mmdit" and not {"pp", "ring"} & degrees.keys()
    assert ("displaced steps on pp" in choice.note) == said


@pytest.mark.parametrize(
    ("kind", "world_size", "degrees", "expected"),
    [
        ("mmdit", 1, {}, "one rank"),
        ("mmdit", 2, {"cfg": 2}, "cfg=2"),
        ("mmdit", 2, {"patch": 2}, "patch=2"),
        ("mmdit", 4, {"cfg": 2, "ulysses": 2}, "cfg=2 ulysses=2"),
        ("unet", 2, {"cfg": 2}, "cfg=2"),
        ("unet", 2, {"pp": 2}, "pp=2"),
    ],
)
def test_degrees_that_leave_no_room_for_one_are_taken_as_they_are(
    kind: str, world_size: int, degrees: dict[str, int], expected: str
) -> None:
    choice = displaced_mesh(world_size, kind, OPEN | degrees)
    assert choice.mesh.describe() == expected and not can_displace(choice.mesh, kind) and not choice.note


def test_degrees_that_do_not_fit_are_refused_as_ever() -> None:
    with pytest.raises(ConfigError, match=r"ulysses=3 .* but the backend has 4 ranks"):
        displaced_mesh(4, "mmdit", OPEN | {"ulysses": 3})
    assert OPEN.keys() == set(AXES)
