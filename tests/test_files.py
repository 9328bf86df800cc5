"""Files and folders are replaced whole or not at all."""

import errno
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
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


HOLD = """
import multiprocessing, os, sys, time
from rfsr_ext.files import lock_folder

with lock_folder(sys.argv[1]):
    if "fork" in sys.argv:  # as a loader process is
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=False)
        child.start()
        print(child.pid, flush=True)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Start another process that holds a folder; it says so before the test goes on."""
    started = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path / "run"), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        children = []
        for line in process.stdout:
            if line.strip() == "held":
                break
            children.append(int(line))
        assert process.poll() is None and process.pid != os.getpid()
        return process, children

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_process_cannot_have_a_locked_folder(tmp_path, holder):
    process, _ = holder()
    with pytest.raises(RuntimeError) as error, files.lock_folder(tmp_path / "run"):
        pytest.fail("two processes hold one folder")
    assert f"process {process.pid} on {socket.gethostname()}" in str(error.value) and "run'" in str(error.value)
    process.communicate()  # it ends in peace
    with files.lock_folder(tmp_path / "run"):
        assert names(tmp_path) == {"run", "run/.rfsr.lock"}


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_ends_with_its_process(tmp_path, holder, signal_):
    process, children = holder("fork")
    try:
        os.kill(process.pid, signal_)
        process.wait(10)
        assert children and all(Path(f"/proc/{child}").exists() for child in children)
        with files.lock_folder(tmp_path / "run"):
            pass
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)


def test_a_lock_is_also_against_the_same_process_and_lets_go_after_an_exception(tmp_path):
    with pytest.raises(KeyError), files.lock_folder(tmp_path):
        with pytest.raises(RuntimeError, match=f"process {os.getpid()}"), files.lock_folder(tmp_path):
            pytest.fail("held twice")
        raise KeyError
    with files.lock_folder(tmp_path):
        pass


def _lock(folder, answers):
    try:
        with files.lock_folder(folder):
            answers.put("held")
    except RuntimeError:
        answers.put("refused")


def test_a_forked_child_neither_has_nor_ends_the_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with files.lock_folder(tmp_path):
        for _ in range(2):
            child = context.Process(target=_lock, args=(tmp_path, answers))
            child.start()
            assert answers.get(timeout=20) == "refused"
            child.join(20)
            assert child.exitcode == 0


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def unsupported(descriptor, operation):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with files.lock_folder(tmp_path):
        pass
    assert "cannot be locked (Operation not supported)" in caplog.text
