"""Files and folders are replaced whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from rfsr_ext import files

ERRORS = [ValueError("bad"), OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_new_file_in_new_folder(tmp_path):
    with files.replace_file(tmp_path / "a" / "b.txt") as aside:
        assert aside.parent == tmp_path / "a"  # on the same file system, or the rename could not be atomic
        aside.write_text("new")
    assert (tmp_path / "a" / "b.txt").read_text() == "new"
    assert (tmp_path / "a" / "b.txt").stat().st_mode & 0o777 == 0o644
    assert names(tmp_path) == {"a", "a/b.txt"}


def test_file_is_old_until_the_block_ends(tmp_path):
    path = tmp_path / "b.txt"
    path.write_text("old")
    with files.replace_file(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_file_survives_an_exception_in_the_block(tmp_path, error):
    path = tmp_path / "b.txt"
    path.write_text("old")
    with pytest.raises(type(error)), files.replace_file(path) as aside:
        aside.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == {"b.txt"}


def test_new_folder(tmp_path):
    with files.replace_folder(tmp_path / "model") as aside:
        (aside / "sub").mkdir()
        (aside / "sub" / "weights").write_bytes(b"new")
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755
    assert names(tmp_path) == {"model", "model/sub", "model/sub/weights"}


def test_folder_replaces_the_old_one_whole(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "stale").write_text("old")
    with files.replace_folder(model) as aside:
        (aside / "weights").write_text("new")
        assert (model / "stale").read_text() == "old"
    assert names(tmp_path) == {"model", "model/weights"}


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_folder_survives_an_exception_in_the_block(tmp_path, error):
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_text("old")
    with pytest.raises(type(error)), files.replace_folder(model) as aside:
        (aside / "weights").write_text("half")
        raise error
    assert (model / "weights").read_text() == "old"
    assert names(tmp_path) == {"model", "model/weights"}


@pytest.mark.parametrize("replace", [files.replace_file, files.replace_folder])
def test_full_disk_while_syncing(tmp_path, monkeypatch, replace):
    """Delayed allocation reports a full disk only when the data is forced out."""
    path = tmp_path / "target"
    if replace is files.replace_file:
        path.write_text("old")
    else:
        path.mkdir()
        (path / "weights").write_text("old")
    before = names(tmp_path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), replace(path) as aside:
        (aside if aside.is_file() else aside / "weights").write_text("new")
    assert (path if path.is_file() else path / "weights").read_text() == "old"
    assert names(tmp_path) == before


def test_folder_comes_back_when_the_swap_fails(tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_text("old")
    rename = Path.rename

    def fail(self, target):
        if self.suffix == ".partial":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"), files.replace_folder(model) as aside:
        (aside / "weights").write_text("new")
    assert (model / "weights").read_text() == "old"
    assert names(tmp_path) == {"model", "model/weights"}


def test_a_disk_that_refuses_leaves_the_old_tensors(tmp_path):
    import resource

    import torch

    path = tmp_path / "state.safetensors"
    files.save_tensors(path, {"x": torch.ones(3)}, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError) as error:
            files.save_tensors(path, {"x": torch.ones(1_000_000)}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG
    tensors, metadata = files.load_tensors(path)
    assert torch.equal(tensors["x"], torch.ones(3)) and metadata == {"step": 1}
    assert names(tmp_path) == {"state.safetensors"}
