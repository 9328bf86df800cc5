"""LR files that anybody can make again: to the byte, resumable, and never over what is not ours."""

import hashlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rfsr_ext.data import Degradation, ImageFolder, Root
from rfsr_ext.data.degraded import degrade_folder, read_manifest, write_plain_png
from rfsr_ext.data.images import read_image, to_tensor

DEGRADATION = Degradation.preset("realesrgan-b")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, height, width in (("a", 40, 48), ("sub/b", 41, 38), ("c", 36, 36)):
        path = tmp_path / "sharp" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path)
    (tmp_path / "sharp" / "broken.png").write_text("no image")
    return tmp_path / "sharp"


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}


def degrade(folder, output, **changes):
    arguments = {"degradation": DEGRADATION, "seed": 3, "progress": False} | changes
    return degrade_folder(Root(str(folder)), output=output, **arguments)


def test_files_are_the_degradations_and_the_manifest_says_all(folder, tmp_path):
    skipped = degrade(folder, tmp_path / "out")
    assert list(skipped) == [str(folder / "broken.png")]
    manifest = read_manifest(tmp_path / "out")
    assert manifest["settings"]["seed"] == 3 and manifest["settings"]["degradation"] == DEGRADATION.to_dict()
    assert {"rfsr_ext", "numpy", "scipy", "pillow", "libjpeg"} <= manifest["settings"]["versions"].keys()
    for k, (name, height, width) in enumerate([("a", 40, 48), ("broken", 0, 0), ("c", 36, 36), ("sub/b", 40, 36)]):
        if name == "broken":
            assert manifest["files"]["lr/broken.png"] is None
            continue
        sharp = to_tensor(read_image(folder / f"{name}.png"))[None, :, :height, :width]
        lr, gt = DEGRADATION(sharp.contiguous(), [(3, k)])
        for kind, expected in (("lr", lr), ("gt", gt)):
            path = tmp_path / "out" / kind / f"{name}.png"
            stored = to_tensor(read_image(path))
            assert (stored - expected[0]).abs().max() <= 0.5 / 255 + 1e-6
            record = manifest["files"][f"{kind}/{name}.png"]
            assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
            assert record["facts"]["source"] == f"{name}.png" and record["facts"]["index"] == k


def test_two_people_have_the_same_files(folder, tmp_path):
    degrade(folder, tmp_path / "one")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(2, threads))
        degrade(folder, tmp_path / "two")
    finally:
        torch.set_num_threads(threads)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") != {}
    assert (tmp_path / "one" / "manifest.json").read_bytes() == (tmp_path / "two" / "manifest.json").read_bytes()
    degrade(folder, tmp_path / "three", seed=4)
    assert contents(tmp_path / "one")["lr/a.png"] != contents(tmp_path / "three")["lr/a.png"]


def test_crops_are_those_of_training(folder, tmp_path):
    degrade(folder, tmp_path / "out", crops=4, size=32)
    dataset = ImageFolder(folder, 32, 3, DEGRADATION)
    for i in range(4):
        lr = to_tensor(read_image(tmp_path / "out" / "lr" / f"{i:06}.png"))
        assert torch.equal(lr, dataset[i]["lr"])


def test_an_interrupted_run_goes_on(folder, tmp_path, monkeypatch):
    degrade(folder, tmp_path / "whole")
    made = []

    def failing(path, image):
        made.append(path)
        if len(made) == 2:
            raise KeyboardInterrupt
        write_plain_png(path, image)

    with monkeypatch.context() as patch:
        patch.setitem(degrade_folder.__globals__["_KINDS"], "lr", failing)
        with pytest.raises(KeyboardInterrupt):
            degrade(folder, tmp_path / "out")
    assert len(contents(tmp_path / "out")) == 2
    before = (tmp_path / "out" / "lr" / "a.png").stat()
    degrade(folder, tmp_path / "out")
    assert (tmp_path / "out" / "lr" / "a.png").stat().st_ino == before.st_ino  # not made again
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    inodes = {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*.png")}
    degrade(folder, tmp_path / "out")
    assert {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*.png")} == inodes


@pytest.mark.parametrize("inside", [".", "val", "a/../val"])
def test_what_is_made_is_no_source(folder, inside):
    """The next run would find it among the pictures."""
    with pytest.raises(ValueError, match="must lie outside of .* would count among its pictures; give another folder"):
        degrade(folder, folder / inside)


def test_nothing_foreign_is_overwritten(folder, tmp_path):
    output = tmp_path / "out"
    (output / "lr").mkdir(parents=True)
    (output / "lr" / "c.png").write_text("mine")
    with pytest.raises(FileExistsError, match="holds a 'lr/c.png' that rfsr did not write"):
        degrade(folder, output)
    assert (output / "lr" / "c.png").read_text() == "mine" and not (output / "lr" / "a.png").exists()
    (output / "lr" / "c.png").unlink()
    (output / "manifest.json").write_text("[]")
    with pytest.raises(FileExistsError, match="holds a 'manifest.json' that rfsr did not write"):
        degrade(folder, output)
    assert (output / "manifest.json").read_text() == "[]"
    (output / "manifest.json").unlink()
    degrade(folder, output)
    (output / "lr" / "c.png").write_text("changed")
    with pytest.raises(FileExistsError, match="c.png' was changed after rfsr wrote it"):
        degrade(folder, output)
    assert (output / "lr" / "c.png").read_text() == "changed"


def test_other_settings_need_another_folder(folder, tmp_path):
    degrade(folder, tmp_path / "out")
    before = contents(tmp_path / "out")
    mini = Degradation.preset("mini")
    crops = {"crops": 2, "size": 32}
    for what, changes in {"seed": {"seed": 4}, "degradation": {"degradation": mini}, "crops": crops}.items():
        with pytest.raises(ValueError, match=f"holds files that were made with another {what}; give another folder"):
            degrade(folder, tmp_path / "out", **changes)
    (folder / "new.png").write_bytes((folder / "a.png").read_bytes())  # all that follow would have other numbers
    with pytest.raises(ValueError, match="made with another images"):
        degrade(folder, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_two_pictures_of_one_name(folder, tmp_path):
    Image.open(folder / "a.png").save(folder / "a.jpg")
    with pytest.raises(ValueError, match="must hold one picture called 'a', got two"):
        degrade(folder, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="has no picture to degrade"):
        (tmp_path / "empty").mkdir()
        degrade(tmp_path / "empty", tmp_path / "out")


@pytest.mark.parametrize(
    "content", ["", "{}", '{"settings": {}, "files": {}}', json.dumps({"settings": {"degradation": 1}})]
)
def test_what_is_no_manifest(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match="is no manifest of rfsr data degrade"):
        read_manifest(tmp_path)


@settings(max_examples=15, deadline=None)
@given(height=st.integers(1, 200), width=st.integers(1, 200), seed=st.integers(0, 99))
def test_plain_png(tmp_path_factory, height, width, seed):
    """Pillow reads what was written, checksums included; 65 535 bytes, where a block ends, are passed."""
    path = tmp_path_factory.mktemp("png") / "x.png"
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    write_plain_png(path, image)
    with Image.open(path) as file:
        file.verify()
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image)
    assert path.stat().st_size - height * (3 * width + 1) < 100
