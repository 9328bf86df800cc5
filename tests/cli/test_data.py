"""``rfsr data`` as a user types it."""

import json
import os

import numpy as np
import pytest
from PIL import Image


def save(path, height=40, width=48, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(path)


def test_check_of_a_good_folder(rfsr, tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", 40 + i, 70, seed=i)
    (tmp_path / "0.txt").write_text("a cat")
    code, printed = rfsr("data", "check", tmp_path, "--crop-size", 32)
    assert code == 0 and not printed.err
    for line in (
        f"{tmp_path}: 3 of 3 images can be used",
        "  sizes: 70 to 70 wide, 40 to 42 high, median 70x41",
        "  channels: 3 RGB PNG",
        "  crops of 32x32 side by side: 6",
        "  prompts: 1",
    ):
        assert line in printed.out.splitlines()
    assert "crops" not in rfsr("data", "check", tmp_path, "--crop-size", 0)[1].out


def test_check_names_what_is_not_used(rfsr, tmp_path):
    save(tmp_path / "a" / "good.png")
    save(tmp_path / "a" / "same.png")
    (tmp_path / "a" / os.fsdecode(b"bad\xff\n.png")).write_text("text")
    (tmp_path / "a" / "b.gif").touch()
    (tmp_path / "empty").mkdir()
    save(tmp_path / "lr" / "1x4.png", 10, 12)
    save(tmp_path / "gt" / "1.png")
    save(tmp_path / "gt" / "2.png")
    pairs = ["--pairs", tmp_path / "lr", tmp_path / "gt", "--crop-size", 32]
    code, printed = rfsr("data", "check", tmp_path / "a", tmp_path / "empty", *pairs)
    assert code == f"rfsr: no usable image for crops of 32x32 pixels (--crop-size) in {tmp_path / 'empty'}"
    for line in (
        f"{tmp_path}/a: 2 of 3 images can be used",
        "  not looked into: 1 .gif",
        f"    {tmp_path}/a/good.png = {tmp_path}/a/same.png",
        f"{tmp_path}/lr and {tmp_path}/gt: 1 of 1 pairs can be used",
        f"    {tmp_path}/gt/2.png: has no LR image in {tmp_path}/lr",
    ):
        assert line in printed.out.splitlines()
    assert f"    {tmp_path}/a/bad\\udcff\\n.png: cannot be read as an image" in printed.out
    code, _ = rfsr("data", "check", tmp_path / "a", "--crop-size", 32, "--headers")
    assert code == "rfsr: 1 files will not be used; the reasons stand above"


def test_check_of_a_configuration(rfsr, tmp_path):
    save(tmp_path / "DIV2K" / "a.png", 64, 64)
    save(tmp_path / "RealSR" / "b_LR2.png", 32, 32)
    save(tmp_path / "RealSR" / "b_HR.png", 64, 64)
    (tmp_path / "run.yaml").write_text(
        f"data: [{tmp_path}/DIV2K, {{lr: {tmp_path}/RealSR, gt: {tmp_path}/RealSR}}]\n"
        "crop_size: 32\ndegradation: {preset: mini, scale: 2}\n"
    )
    code, printed = rfsr("data", "check", "--config", tmp_path / "run.yaml")
    assert code == 0
    assert "1 of 1 images can be used" in printed.out and "1 of 1 pairs can be used" in printed.out
    assert printed.out.count("crops of 32x32 side by side: 4") == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["check"], "give at least one folder, --pairs or a --config with folders"),
        (["check", "nowhere"], "data folder 'nowhere' does not exist"),
        (["degrade", "nowhere", "--output", "out"], "data folder 'nowhere' does not exist"),
        (["degrade", ".", "--output", "out", "--preset", "harsh"], "degradation must be one of the presets mini, real"),
        (["degrade", ".", "--output", "out", "--set", "scale=0"], "preset realesrgan-a: scale must be"),
        (["degrade", ".", "--output", "out"], "folder '.' has no picture to degrade"),
        (["degrade", ".", "--output", "out", "--like", "nowhere.json"], "'nowhere.json' does not exist"),
    ],
)
def test_one_sentence(rfsr, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    code, _ = rfsr("data", *arguments)
    assert sentence in str(code) and "\n" not in str(code) and not (tmp_path / "out").exists()


def test_degrade_like_somebody_else(rfsr, tmp_path):
    for i in range(3):
        save(tmp_path / "sharp" / f"{i}.png", seed=i)
    arguments = ["data", "degrade", tmp_path / "sharp", "--output"]
    code, printed = rfsr(*arguments, tmp_path / "one", "--preset", "mini", "--set", "scale=2", "--seed", 5)
    assert code == 0 and f"3 LR images in {tmp_path}/one/lr" in printed.out
    assert Image.open(tmp_path / "one" / "lr" / "0.png").size == (24, 20)
    code, printed = rfsr(*arguments, tmp_path / "two", "--like", tmp_path / "one")
    assert code == 0 and "3 of 3 LR files are those of the manifest to the byte" in printed.out
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    manifest["files"]["lr/1.png"]["sha256"] = "0" * 64
    manifest["settings"]["versions"]["scipy"] = "0.1"
    (tmp_path / "theirs.json").write_text(json.dumps(manifest))
    code, printed = rfsr(*arguments, tmp_path / "two", "--like", tmp_path / "theirs.json")
    assert "2 of 3 LR files are those of the manifest to the byte" in printed.out
    assert code.startswith("rfsr: 1 LR files differ from the manifest: lr/1.png (scipy was 0.1, is ")


def test_degrade_names_what_it_left_out(rfsr, tmp_path):
    save(tmp_path / "sharp" / "a.png")
    (tmp_path / "sharp" / "b.png").write_text("text")
    code, printed = rfsr("data", "degrade", tmp_path / "sharp", "--output", tmp_path / "out", "--preset", "mini")
    assert code == f"rfsr: 1 pictures could not be read: {tmp_path}/sharp/b.png"
    assert "1 LR images in" in printed.out and "left out" in printed.err


def test_evaluate_on_pairs(rfsr, tmp_path):
    """Two models, one of them twice: pictures, table and differences; the same command has nothing left to do."""
    from rfsr_ext.data import load_photograph
    from rfsr_ext.data.images import resize, to_uint8

    for i, top in enumerate((0, 100)):
        gt = load_photograph("coffee")[top : top + 64, 200:264]
        for kind, name, image in (("lr", f"{i}x4.png", resize(gt, (16, 16))), ("gt", f"{i}.png", gt)):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(to_uint8(image)).save(tmp_path / kind / name)
    arguments = ["evaluate", "mini", "--pairs", tmp_path / "lr", tmp_path / "gt", "--pictures", tmp_path / "out"]
    arguments += ["--metrics", "psnr,ssim", "--output", tmp_path / "table.csv", "--overwrite"]
    code, printed = rfsr(*arguments)
    assert code == 0 and f"pictures: {tmp_path}/out/mini-seed0" in printed.out
    assert sorted(path.name for path in (tmp_path / "out" / "mini-seed0").glob("*.png")) == ["0.png", "1.png"]
    before = (tmp_path / "out" / "mini-seed0" / "0.png").stat().st_ino
    table = (tmp_path / "table.csv").read_text()
    header, *rows = table.splitlines()
    assert header == "model,image,preset,psnr,ssim,seed"
    assert [row.split(",")[0] for row in rows] == ["bicubic", "bicubic", "mini", "mini"]
    bicubic, mini = (
        next(line for line in printed.out.splitlines() if line.startswith(name)) for name in ("bicubic", "mini")
    )
    assert printed.out.index(bicubic) < printed.out.index(mini) and "±" in bicubic
    assert rfsr(*arguments)[0] == 0 and (tmp_path / "table.csv").read_text() == table
    assert (tmp_path / "out" / "mini-seed0" / "0.png").stat().st_ino == before
    (tmp_path / "gt" / "2.png").write_bytes((tmp_path / "gt" / "1.png").read_bytes())
    code, printed = rfsr(*arguments)
    assert code == f"rfsr: 1 pictures of the pairs were left out: {tmp_path}/gt/2.png"
    assert rfsr("evaluate", tmp_path / "gt", "--pairs", tmp_path / "lr", tmp_path / "gt")[0].startswith(
        "rfsr: --pairs is for models alone"
    )
