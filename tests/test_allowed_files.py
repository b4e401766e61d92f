"""Which files a backend opens: those below its model folders, and the very ones that were asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel_backend.checkpoint_files.content import content_key
from parallel_backend.errors import CheckpointError
from parallel_backend.rank.allowed_files import AllowedFiles
from parallel_backend.small_checkpoints.mmdit import small_config, write_mmdit


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_mmdit(tmp_path / "models" / "a.safetensors", small_config("sd3.5-large", 1))


def test_a_file_below_a_folder_is_found_by_its_name_or_path(file: Path) -> None:
    allowed, key = AllowedFiles((file.parent.parent / "none", file.parent)), content_key(file)
    assert allowed.checked("a.safetensors", key) == allowed.checked(str(file), key) == file.resolve()


def test_of_several_files_of_a_name_the_one_that_was_meant_is_found(file: Path, tmp_path: Path) -> None:
    other = write_mmdit(tmp_path / "others" / "a.safetensors", small_config("sd3.5-large", 1), seed=3)
    allowed = AllowedFiles((file.parent, other.parent))
    assert allowed.checked("a.safetensors", content_key(other)) == other
    assert allowed.checked("a.safetensors", content_key(file)) == file


def test_a_copy_on_another_host_has_the_key_without_times(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(file.read_bytes())
    assert AllowedFiles().checked(str(copy), content_key(file, timed=False)) == copy
    with pytest.raises(CheckpointError, match="content has changed"):
        AllowedFiles().checked(str(copy), content_key(file))


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "link.safetensors", "sub/../../outside.safetensors"]
)
def test_what_lies_outside_is_refused_by_whatever_way(name: str, file: Path) -> None:
    outside = file.parent.parent / "outside.safetensors"
    outside.write_bytes(file.read_bytes())
    (file.parent / "link.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match="outside this backend's model folders"):
        AllowedFiles((file.parent,)).checked(name, content_key(file))


def test_a_missing_and_a_changed_file_are_told_apart(file: Path) -> None:
    key = content_key(file)
    with pytest.raises(CheckpointError, match="is not there"):
        AllowedFiles((file.parent,)).checked("b.safetensors", key)
    write_mmdit(file, small_config("sd3.5-large", 1), seed=5)
    with pytest.raises(CheckpointError, match="content has changed"):
        AllowedFiles((file.parent,)).checked("a.safetensors", key)


def test_a_link_is_opened_by_its_own_name_where_both_ends_lie_inside(file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "blobs" / "0123abcd"
    cache.parent.mkdir(parents=True)
    file.rename(cache)
    file.symlink_to(cache)
    assert AllowedFiles((file.parent, cache.parent.parent)).checked("a.safetensors", content_key(file)) == file
    with pytest.raises(CheckpointError, match=r"'a.safetensors' is outside this backend's model folders"):
        AllowedFiles((file.parent,)).checked("a.safetensors", content_key(file))


def test_no_file_of_a_folder_leads_outside(file: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    file.rename(outside)
    folder = file.parent / "transformer"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match=r"model.safetensors leads outside this backend's model folders"):
        AllowedFiles((file.parent,)).checked("transformer", content_key(folder))
