"""Meshes and settings: what fits, what doesn't, and what is said about it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from parallel_backend import MeshSpec, SamplerSpec
from parallel_backend.__main__ import main
from parallel_backend.config import (
    AXES,
    BackendSpec,
    ContinuousSampling,
    DiscreteSampling,
    FlowSampling,
    ModelSampling,
    ServeSpec,
    gpu_numbers,
)
from parallel_backend.errors import BackendError, ConfigError, error_from_code


def test_the_product_equation_names_every_term() -> None:
    with pytest.raises(ConfigError) as caught:
        MeshSpec(cfg=2, ulysses=3).check_world(4)
    assert "dp=1 * cfg=2 * pp=1 * patch=1 * ring=1 * ulysses=3 * tp=1 = 6, but the backend has 4 ranks." in str(
        caught.value
    )


@pytest.mark.parametrize("mesh", MeshSpec.all_of(8), ids=MeshSpec.describe)
def test_groups_partition_the_world_on_every_axis(mesh: MeshSpec) -> None:
    for axis in AXES:
        groups = mesh.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(8))
        assert all(len(group) == getattr(mesh, axis) for group in groups)
        for group in groups:
            assert [mesh.coordinates(rank)[axis] for rank in group] == list(range(len(group)))


def test_axes_form_on_2x4_gives_the_published_submeshes() -> None:
    """((2, 1), (2, 0), (2, 1)): cfg halves the columns, sp goes down the rows, tp along what is left of the columns."""
    mesh = MeshSpec.from_axes((2, 1), (2, 0), (2, 1), mesh_shape=(2, 4))
    assert mesh.groups("cfg") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert mesh.groups("ring") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert mesh.groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_axes_form_on_4x8() -> None:
    mesh = MeshSpec.from_axes((2, 1), (4, 0), (4, 1), mesh_shape=(4, 8), sp_method="ulysses")
    assert (mesh.cfg, mesh.ulysses, mesh.tp, mesh.world_size) == (2, 4, 4, 32)
    assert mesh.groups("tp")[0] == [0, 1, 2, 3]
    assert mesh.groups("ulysses")[0] == [0, 8, 16, 24]
    assert mesh.groups("cfg")[0] == [0, 4]


def test_axes_form_that_leaves_part_of_the_mesh_empty_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cfg=2 does not fill axis 1 of the 2x4 mesh, which has 4"):
        MeshSpec.from_axes((2, 1), (2, 0), (1, 0), mesh_shape=(2, 4))
    with pytest.raises(ConfigError, match="axis 2"):
        MeshSpec.from_axes((2, 2), (2, 0), (1, 0), mesh_shape=(2, 4))


@pytest.mark.parametrize(
    ("world_size", "expected"),
    [(1, (1, 1)), (2, (2, 1)), (3, (1, 3)), (4, (2, 2)), (6, (2, 3)), (8, (2, 4))],
)
def test_default_is_cfg_first_then_ulysses(world_size: int, expected: tuple[int, int]) -> None:
    mesh = MeshSpec.exact_default(world_size)
    assert (mesh.cfg, mesh.ulysses) == expected
    assert mesh.world_size == world_size


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"tp": 2}, (2, 2, 1, 2)),
        ({"ulysses": 4}, (2, 1, 4, 1)),
        ({"cfg": 1}, (1, 1, 8, 1)),
        ({"ring": 8}, (1, 8, 1, 1)),
        ({"cfg": 2, "ring": 2}, (2, 2, 2, 1)),
    ],
)
def test_zeros_take_what_is_left_of_eight(given: dict[str, int], expected: tuple[int, ...]) -> None:
    mesh = MeshSpec.filled(8, **{"dp": 1, "cfg": 0, "ring": 1, "ulysses": 0, "tp": 1} | given)
    if given == {"tp": 2}:
        assert (mesh.cfg, mesh.ulysses, mesh.ring, mesh.tp) == expected
    else:
        assert (mesh.cfg, mesh.ring, mesh.ulysses, mesh.tp) == expected


@pytest.mark.parametrize("bad", [{"tp": 0}, {"ring": -1}, {"cfg": 3}, {"dp": True}, {"order": ("dp",)}])
def test_meshes_that_cant_be(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        MeshSpec(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"sampler": "dpmpp_2m_sde_gpu"}, "euler_ancestral"),
        ({"scheduler": "turbo"}, "kl_optimal"),
        ({"steps": 0}, "steps=0"),
        ({"denoise": -0.1}, "denoise=-0.1"),
        ({"denoise": 1.5}, "denoise=1.5"),
        ({"cfg_scale": float("nan")}, "cfg_scale=nan"),
        ({"seed": -1}, "seed=-1"),
        ({"shift": 0.0}, "shift=0.0"),
        ({"rescale_cfg": 1.5}, "rescale_cfg=1.5"),
        ({"differential": float("nan")}, "differential=nan"),
    ],
)
def test_sampler_settings_that_cant_be_name_value_and_remedy(bad: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SamplerSpec(**bad)  # type: ignore[arg-type]
    assert word in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("kind", "bad", "word"),
    [
        (FlowSampling, {"shift": 0.0}, "shift=0.0"),
        (FlowSampling, {"multiplier": float("inf")}, "multiplier=inf"),
        (FlowSampling, {"sigmas": 1}, "1 sigmas"),
        (DiscreteSampling, {"prediction": "edm"}, "'edm' is not known"),
        (ContinuousSampling, {"prediction": "lcm"}, "'lcm' is not known"),
        (ContinuousSampling, {"sigma_min": 0.0}, "sigma_min=0.0"),
        (ContinuousSampling, {"sigma_min": 5.0, "sigma_max": 5.0}, "sigma_max=5.0"),
        (ContinuousSampling, {"sigma_data": -1.0}, "sigma_data=-1.0"),
    ],
)
def test_model_samplings_that_cant_be_name_value_and_remedy(
    kind: type[ModelSampling], bad: dict[str, Any], word: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**bad)
    assert word in str(caught.value) and caught.value.remedy


@pytest.mark.parametrize(
    "sampling",
    [None, FlowSampling(1.7, 1.0, 10_000), DiscreteSampling("lcm", True), ContinuousSampling("edm", "arctan")],
)
def test_a_sampler_spec_with_each_model_sampling_travels(sampling: ModelSampling | None) -> None:
    spec = SamplerSpec(sampler="er_sde", model_sampling=sampling)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=SamplerSpec) == spec


@pytest.mark.parametrize(
    "bad",
    [
        {"name": "../x"},
        {"name": ""},
        {"device": "tpu"},
        {"world_size": 0},
        {"devices": (0,)},
        {"idle_seconds": 0},
        {"idle_seconds": float("nan")},
        {"idle_seconds": float("inf")},
    ],
)
def test_backend_settings_that_cant_be(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        BackendSpec(**bad)  # type: ignore[arg-type]


def test_gpus_named_for_cpu_ranks_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"devices=0,0 name GPUs, but the ranks are to run on the CPU\. Leave devices"
    ):
        BackendSpec(device="cpu", devices=(0, 0))
    assert BackendSpec(device="cuda", devices=(0, 0)).devices == (0, 0)


def test_gpu_numbers_are_read_as_people_write_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_numbers("0, 1,3,") == (0, 1, 3) and gpu_numbers(" ") == ()
    for device in ("cpu", "cuda"):
        assert main(["serve", "--name", "never", "--device", device, "--devices", "0,one"]) == 1
        assert "devices '0,one' is not a list of GPU numbers. Write it like 0,1,3" in capsys.readouterr().err


@pytest.mark.parametrize("listen", ["tcp://0.0.0.0", "ipc://x", "tcp://host:port", "5555"])
def test_addresses_that_cant_be_listened_on(listen: str) -> None:
    with pytest.raises(ConfigError, match="Write it like tcp://"):
        ServeSpec(("models",), listen, "keys")


def test_every_error_survives_the_wire_as_its_own_class() -> None:
    for cls in BackendError.__subclasses__():
        error = error_from_code(cls.code, "what.", "remedy")
        assert type(error) is cls
        assert str(error) == "what. remedy"
