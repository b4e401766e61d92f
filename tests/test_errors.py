"""Errors as people and programs meet them: what happened, what helps, then details; a type that is short in ComfyUI."""

from __future__ import annotations

import pickle
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from parallel_backend import Backend, errors
from parallel_backend.__main__ import main
from parallel_backend.distributed.control import Control
from parallel_backend.errors import BackendError, CheckpointError, ConfigError, RankError, StartError, error_from_code


def test_what_helps_comes_before_the_details() -> None:
    error = StartError("It ended.", "Look here.", "Its log ends:\nline 1\nline 2")
    assert (
        str(error) == "It ended. Look here.\n\nIts log ends:\nline 1\nline 2" and error.brief == "It ended. Look here."
    )
    parts = {"code": "start", "message": "It ended.", "remedy": "Look here.", "details": error.details}
    assert error.parts() == parts and error_from_code(**parts).parts() == parts
    assert str(StartError("It ended.")) == "It ended." and str(StartError("It ended.", "", "log")) == "It ended.\n\nlog"


def test_in_a_pack_that_comfyui_has_loaded_its_type_is_short_and_its_own() -> None:
    spec = spec_from_file_location("/where/ever/custom_nodes/parallel-mmdit.parallel_backend.errors", errors.__file__)
    assert spec is not None and spec.loader is not None
    loaded = module_from_spec(spec)
    spec.loader.exec_module(loaded)
    kinds = [loaded.BackendError, *loaded.BackendError.__subclasses__(), type("Newer", (loaded.ConfigError,), {})]
    assert {kind.__module__ for kind in kinds} == {"parallel_mmdit"} and len(kinds) > 15
    assert type(loaded.error_from_code("config", "what", "remedy")) is loaded.ConfigError


def test_in_python_it_is_where_it_is_imported_from() -> None:
    assert {kind.__module__ for kind in (BackendError, *BackendError.__subclasses__())} == {"parallel_backend.errors"}
    again = pickle.loads(pickle.dumps(ConfigError("what", "remedy", "details")))
    assert type(again) is ConfigError and again.parts() == ConfigError("what", "remedy", "details").parts()


def test_a_ranks_details_come_over_the_wire(backend2: Backend, large: Path, tmp_path: Path) -> None:
    tensors = load_file(large)
    left_out = [name for name in tensors if name.endswith("fc2.bias")]
    damaged = tmp_path / "damaged.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if name not in left_out}, damaged)
    with pytest.raises(CheckpointError) as caught:
        backend2.load_model(damaged, dtype="float32")
    assert f"({len(left_out)} missing)" in caught.value.message and "damaged" in caught.value.remedy
    assert caught.value.details.startswith("missing: joint_blocks.") and "joint_blocks." not in caught.value.message


def test_another_librarys_long_error_is_a_line_and_details() -> None:
    named = Control().named(RuntimeError("shapes don't fit\n" + "frame\n" * 30))
    assert isinstance(named, RankError) and named.message == "Rank 0 failed: RuntimeError: shapes don't fit"
    assert named.details.count("frame") == 30 and Control().named(ValueError("short")).details == ""


def test_a_shell_is_told_in_the_same_order(
    runtime_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise StartError("It ended.", "Look here.", "line 1")

    monkeypatch.setattr("parallel_backend.__main__.meant", fails)
    assert main(["stop"]) == 1
    assert capsys.readouterr().err == "parallel-mmdit: It ended. Look here.\n\nline 1\n"
