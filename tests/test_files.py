"""Files and folders are replaced whole or not at all."""

import ast
import codecs
import errno
import json
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


def write(folder: Path, contents: dict[str, str]) -> None:
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def save(path: Path, contents: dict[str, str]) -> None:
    with files.replace_folder(path) as aside:
        write(aside, contents)


def texts(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*") if path.is_file() and path.name != files.MANIFEST
    }  # fmt: skip


def test_text_does_not_depend_on_the_locale():
    """Where Python takes the locale's encoding, a "±" ends a demo after minutes."""
    without = [
        f"{path.name}:{call.lineno}"
        for path in Path(files.__file__).parent.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in ("read_text", "write_text")
        and "encoding" not in {keyword.arg for keyword in call.keywords}
    ]  # fmt: skip
    assert not without


def test_a_name_as_long_as_can_be(tmp_path):
    path = tmp_path / f"{'日' * 83}.txt"  # 253 bytes, of 255
    with files.replace_file(path) as aside:
        aside.write_text("new")
    assert texts(tmp_path) == {path.name: "new"}


def test_a_home_folder_that_no_shell_wrote_out_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("~/runs", "~"):
        with pytest.raises(ValueError, match="begins with a '~' that no shell has written out; give the whole path"):
            files.make_folder(path)
    files.make_folder("a~/~")
    assert [path.name for path in tmp_path.iterdir()] == ["a~"]


def test_new_folder(tmp_path):
    model = tmp_path / "a" / "model"
    with files.replace_folder(model) as aside:
        write(aside, {"sub/weights": "new"})
        (aside / "sub/weights").chmod(0o600)  # as safetensors 0.8 writes them
    assert model.stat().st_mode & 0o777 == 0o755
    assert names(model) == {"sub", "sub/weights", ".rfsr.json"}
    assert {file.stat().st_mode & 0o777 for file in model.rglob("*") if file.is_file()} == {0o644}
    assert json.loads((model / ".rfsr.json").read_text()) == {"files": ["sub/weights"]}


def test_folder_replaces_the_files_it_wrote(tmp_path):
    model = tmp_path / "model"
    save(model, {"stale": "old", "gone/stale": "old", "sub/weights": "old"})
    with files.replace_folder(model) as aside:
        (aside / "weights").write_text("new")
        assert texts(model).keys() >= {"stale", "gone/stale", "sub/weights"}
    assert names(model) == {"weights", ".rfsr.json"}


def test_folder_leaves_other_files_alone(tmp_path):
    model = tmp_path / "model"
    theirs = {"notes.md": "mine", "runs/1.txt": "mine", "sub/notes.md": "mine"}
    write(model, theirs)
    (model / "empty").mkdir()
    (model / "link").symlink_to("/nowhere")
    before = {name: (model / name).stat().st_ino for name in theirs}
    save(model, {"sub/weights": "first", "gone/stale": "first"})
    write(model, {"gone/later.md": "mine"})
    save(model, {"sub/weights": "second", "config": "second"})
    assert texts(model) == theirs | {"gone/later.md": "mine", "sub/weights": "second", "config": "second"}
    assert before == {name: (model / name).stat().st_ino for name in theirs}
    assert (model / "empty").is_dir() and (model / "link").is_symlink()


@pytest.mark.parametrize("theirs", ["sub/weights", "sub", "config", ".rfsr.json"])
def test_folder_refuses_to_replace_a_file_of_somebody_else(tmp_path, theirs):
    model = tmp_path / "model"
    write(model, {theirs: "mine"})
    with pytest.raises(FileExistsError, match=f"model' holds a {theirs!r} that rfsr did not write; move it away or"):
        save(model, {"a": "new", "config": "new", "sub/weights": "new"})
    assert (model / theirs).read_text() == "mine"
    assert names(model) == {theirs, str(Path(theirs).parent)} - {"."}


def test_a_list_cannot_lead_out_of_its_folder(tmp_path):
    """The list may come from somewhere else, with a model that was downloaded."""
    write(tmp_path, {"mine": "mine", "other/mine": "mine", "model/ours": "old"})
    (tmp_path / "model" / "link").symlink_to(tmp_path / "other")
    listed = ["../mine", str(tmp_path / "mine"), "link/mine", "ours", "absent"]
    (tmp_path / "model" / files.MANIFEST).write_text(json.dumps({"files": listed}))
    save(tmp_path / "model", {"weights": "new"})
    assert texts(tmp_path) == {"mine": "mine", "other/mine": "mine", "model/weights": "new"}


@pytest.mark.parametrize("name", ["file", "file/model", "dangling"])
def test_a_file_is_not_a_folder(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    for use in (files.replace_folder, files.lock_folder):
        sentence = "must be a folder, but .* is a file; give another"
        with pytest.raises(NotADirectoryError, match=sentence) as error, use(tmp_path / name):
            pytest.fail("began")
        assert str(tmp_path / name.split("/")[0]) in str(error.value)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="there is no /proc")
@pytest.mark.parametrize("use", [
    lambda: files.make_folder("/proc"), lambda: files.make_folder("/proc/x"), lambda: files.make_folder("/proc/x/y"),
    lambda: files.lock_folder("/proc/x").__enter__(), lambda: files.replace_file("/proc/x").__enter__(),
])  # fmt: skip
def test_a_folder_that_takes_no_files_is_named(use):
    with pytest.raises(PermissionError, match="^nothing new can be written into '/proc'; give another folder$"):
        use()


def test_the_current_folder_and_a_link_to_one(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save(tmp_path / "link", {"weights": "first"})
    monkeypatch.chdir(tmp_path / "real")
    save(Path("."), {"weights": "second"})
    assert (tmp_path / "link").is_symlink() and texts(tmp_path / "real") == {"weights": "second"}


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_folder_survives_an_exception_in_the_block(tmp_path, error):
    model = tmp_path / "model"
    save(model, {"weights": "old"})
    before = names(tmp_path)
    with pytest.raises(type(error)), files.replace_folder(model) as aside:
        (aside / "weights").write_text("half")
        raise error
    assert (model / "weights").read_text() == "old"
    assert names(tmp_path) == before


def test_nothing_is_left_of_a_new_folder_after_an_exception(tmp_path):
    with pytest.raises(KeyError), files.replace_folder(tmp_path / "model") as aside:
        (aside / "weights").write_text("half")
        raise KeyError
    assert names(tmp_path) == set()


def test_full_disk_while_locking_is_named(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError) as error, files.lock_folder(tmp_path):
        pass
    assert error.value.filename == str(tmp_path / files.LOCK)


@pytest.mark.parametrize("replace", [files.replace_file, files.replace_folder])
def test_full_disk_while_syncing(tmp_path, monkeypatch, replace):
    """Delayed allocation reports a full disk only when the data is forced out."""
    path = tmp_path / "target"
    if replace is files.replace_file:
        path.write_text("old")
    else:
        save(path, {"weights": "old"})
    before = names(tmp_path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), replace(path) as aside:
        (aside if aside.is_file() else aside / "weights").write_text("new")
    assert (path if path.is_file() else path / "weights").read_text() == "old"
    assert names(tmp_path) == before


OLD = {"weights": "old", "sub/stale": "old", "sub/config": "old"}
NEW = {"weights": "new", "sub/config": "new", "more/tokens": "new"}
MINE = {"notes.md": "mine", "sub/notes.md": "mine"}
MOVES = len(OLD) + len(NEW) + 2  # each list of files moves as well


@pytest.mark.parametrize("failing", range(MOVES))
def test_folder_comes_back_when_a_move_fails(tmp_path, monkeypatch, failing):
    model = tmp_path / "model"
    write(model, MINE)
    save(model, OLD)
    before, moves, rename = names(tmp_path), [], Path.rename

    def fail(self, target):
        moves.append(target)
        if len(moves) == failing + 1:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"):
        save(model, NEW)
    assert texts(model) == OLD | MINE
    assert names(tmp_path) - before <= {"model/more"}  # an empty folder at most


def _save_and_die(path: Path, at: int) -> None:
    """The process kills itself before a move."""
    rename, moves = Path.rename, []

    def die(self, target):
        if len(moves) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        moves.append(target)
        return rename(self, target)

    Path.rename = die
    save(path, NEW)


def test_folder_after_a_process_that_was_killed_in_the_swap(tmp_path):
    """Files of others never move, old and new are never mixed, and the next call finds everything in order."""
    for at in range(MOVES):
        model = tmp_path / f"{at}"
        write(model, MINE)
        save(model, OLD)
        killed = multiprocessing.get_context("fork").Process(target=_save_and_die, args=(model, at))
        killed.start()
        killed.join(20)
        assert killed.exitcode == -signal.SIGKILL
        left = {name: text for name, text in texts(model).items() if not name.startswith(".rfsr.partial.")}
        assert MINE.items() <= left.items()
        assert left.items() <= (OLD | MINE).items() or left.items() <= (NEW | MINE).items()
        with pytest.raises(KeyError), files.replace_folder(model):
            raise KeyError
        assert texts(model) == OLD | MINE  # whatever the call itself comes to
        save(model, NEW)
        assert texts(model) == NEW | MINE
        assert names(model) == NEW.keys() | MINE.keys() | {"sub", "more", files.MANIFEST}


def test_a_process_waits_for_another_that_replaces_the_same_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    started = context.Event()

    def other():
        started.set()
        save(tmp_path, {"a": "second", "b": "second"})

    child = context.Process(target=other, daemon=True)
    with files.replace_folder(tmp_path) as aside:
        child.start()
        assert started.wait(20)
        child.join(1)
        assert child.is_alive() and child.pid != os.getpid()
        write(aside, {"a": "first", "b": "first", "c": "first"})
    child.join(20)
    assert child.exitcode == 0
    assert texts(tmp_path) == {"a": "second", "b": "second"}


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


def test_a_run_does_not_begin_where_it_would_replace_what_others_wrote(tmp_path):
    write(tmp_path, {"model/net.py": "mine", "notes.md": "mine"})
    sentence = "holds a 'model' that rfsr did not write; move it away or give another"
    with pytest.raises(FileExistsError, match=sentence), files.lock_folder(tmp_path, names=["config.json", "model"]):
        pytest.fail("began")
    assert names(tmp_path) == {"model", "model/net.py", "notes.md"}
    with files.lock_folder(tmp_path, names=["config.json", "best"]):
        (tmp_path / "best").mkdir()
    with files.lock_folder(tmp_path, names=["config.json", "best"]):  # ours now
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


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "latin-1", "ascii"]
)
def test_text_in_any_encoding(encoding):
    text = "a cat, fur" if encoding == "ascii" else "süß, größer: 5 × 7"
    assert files.decode_text(text.encode(encoding)) == text
    big = codecs.BOM_UTF16_BE + text.encode("utf-16-be")
    assert files.decode_text(big) == text and files.decode_text(b"") == ""


@pytest.mark.parametrize("data", [bytes(range(256)), b"a\0b", codecs.BOM_UTF16_LE + b"a", b"\x81\x8d"])
def test_what_is_no_text(data):
    with pytest.raises(ValueError):
        files.decode_text(data)
