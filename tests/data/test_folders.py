"""Folders as people unpack data sets: order, links, several roots with weights and limits, pairs by name."""

import os
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from rfsr_ext.data import Degradation, ImageFolder, Root
from rfsr_ext.data.folders import list_root
from rfsr_ext.data.pairs import match


def picture(height=40, width=56, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def names(root):
    return [os.path.relpath(entry.gt, root.path or root.gt) for entry in list_root(root).entries]


def test_files_are_sorted_and_found_in_every_folder(tmp_path):
    for name in ("10.png", "2.JPG", "b/1.webp", "a/9.bmp", "a/deep/er/0.tiff", "B/1.jpeg", "@eaDir/thumb.jpg"):
        save(tmp_path / name, picture())
    expected = ["10.png", "2.JPG", "B/1.jpeg", "a/9.bmp", "a/deep/er/0.tiff", "b/1.webp"]
    assert names(Root(str(tmp_path))) == expected
    assert names(Root(str(tmp_path), limit=2)) == expected[:2]
    assert names(Root(f"{tmp_path}/")) == expected


def test_links_are_followed_and_no_folder_is_entered_twice(tmp_path):
    save(tmp_path / "elsewhere" / "0.png", picture())
    root = tmp_path / "root"
    save(root / "sub" / "1.png", picture())
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "sub" / "loop").symlink_to(root)
    (root / "sub" / "self").symlink_to("self")
    (root / "zagain").symlink_to(root / "sub")
    (root / "x.png").symlink_to(root / "sub" / "1.png")
    listing = list_root(Root(str(root)))
    assert [os.path.relpath(entry.gt, root) for entry in listing.entries] == ["linked/0.png", "sub/1.png", "x.png"]
    assert listing.passed_over == {"links to folders seen already": 2}  # self is neither


def test_tags_lie_beside_their_pictures(tmp_path):
    save(tmp_path / "a.png", picture())
    save(tmp_path / "sub" / "b.png", picture())
    (tmp_path / "a.txt").write_text("cat, fur")
    (tmp_path / "b.txt").write_text("of no picture here")
    prompts = [entry.prompt for entry in list_root(Root(str(tmp_path))).entries]
    assert prompts == [str(tmp_path / "a.txt"), None]
    assert {ImageFolder(tmp_path, 32)[i]["prompt"] for i in range(10)} == {"", "cat, fur"}


def test_roots_are_drawn_by_weight_and_number(tmp_path, monkeypatch):
    monkeypatch.setattr(Degradation, "__call__", lambda self, gt, seeds: (gt[..., ::4, ::4], gt))
    for folder, count, level in (("a", 30, 0), ("b", 10, 100), ("c", 20, 200)):
        for i in range(count):
            save(tmp_path / folder / f"{i:02}.bmp", np.full((8, 8, 3), level, np.uint8))
    roots = [str(tmp_path / "a"), Root(str(tmp_path / "b"), weight=3), Root(str(tmp_path / "c"), limit=5, weight=0.5)]
    dataset, draws = ImageFolder(roots, 8), 1000
    assert len(dataset) == 45
    drawn = Counter(round(dataset[i]["gt"].mean().item() * 255) for i in range(draws))
    share = {0: 30, 100: 30, 200: 2.5}
    for level, weight in share.items():
        p = weight / sum(share.values())
        assert abs(drawn[level] - draws * p) < 4 * np.sqrt(draws * p * (1 - p))


def test_a_fingerprint_changes_with_the_pictures(tmp_path):
    save(tmp_path / "a.png", picture(seed=1))
    before = ImageFolder(str(tmp_path), 8).fingerprint()
    assert ImageFolder(str(tmp_path), 8, seed=1).fingerprint() == before
    save(tmp_path / "\udcff.png", picture(seed=2))
    assert ImageFolder(str(tmp_path), 8).fingerprint() != before


def test_every_root_must_yield_something(tmp_path):
    save(tmp_path / "good" / "a.png", picture())
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="data folder .*/empty' has no usable image: 0 image files found"):
        ImageFolder([tmp_path / "good", tmp_path / "empty"], 32)
    with pytest.raises(FileNotFoundError, match="data folder '.*/absent' does not exist; give a folder of images"):
        ImageFolder([tmp_path / "good", tmp_path / "absent"], 32)
    (tmp_path / "empty" / "DIV2K.zip").touch()
    with pytest.raises(FileNotFoundError, match="1 .zip not looked into"):
        ImageFolder(tmp_path / "empty", 32)
    with pytest.raises(ValueError, match="roots must name at least one folder, got none"):
        ImageFolder([], 32)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "it must have a path, or lr and gt, got neither"),
        ({"lr": "a"}, "it must have a path, or lr and gt, got {'lr': 'a'}"),
        ({"path": "a", "gt": "b"}, "it must have a path, or lr and gt"),
        ({"path": "a", "weight": 0}, "weight must be above 0, got 0"),
        ({"path": "a", "weight": float("nan")}, "weight must be above 0, got nan"),
        ({"path": "a", "limit": 0}, "limit must be at least 1, got 0"),
    ],
)
def test_roots_are_checked(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Root(**settings)


def test_headers_of_a_huge_folder_are_sampled(tmp_path, monkeypatch):
    """Samples are the same whether all headers were looked at before the start or only some."""
    for i in range(12):
        save(tmp_path / f"{i:02}.png", picture(16 if i % 3 == 0 else 40, seed=i))
    whole = ImageFolder(tmp_path, 32)
    monkeypatch.setattr("rfsr_ext.data.datasets.HEADERS", 4)
    sampled = ImageFolder(tmp_path, 32)
    assert len(whole.skipped) == 4 and len(sampled.skipped) == 4  # the sample, 00, 03, 06 and 09, has nothing of use
    monkeypatch.setattr("rfsr_ext.data.datasets.HEADERS", 3)
    sampled = ImageFolder(tmp_path, 32)
    assert [path.name for path in sampled.skipped] == ["00.png"]  # 00, 04 and 08
    assert all(torch.equal(whole[i]["gt"], sampled[i]["gt"]) for i in range(40))
    assert sampled.skipped.keys() == whole.skipped.keys()


# -- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lr", "gt"),
    [
        ("0801x4.png", "0801.png"),
        ("0801x4m.png", "0801.png"),
        ("0801x4w2.png", "0801.png"),
        ("Canon_001_LR4.png", "Canon_001_HR.png"),
        ("Nikon_050_LR2.png", "Nikon_050_HR.png"),
        ("panasonic_101_x1.png", "panasonic_101_x4.png"),
        ("baby_LRBI_x4.png", "baby_LRBI_x4.png"),
        ("img-lq.jpg", "img-gt.png"),
        ("img_LRx4.png", "img.png"),
        ("a/b/7.png", "a/b/7.jpg"),
        ("ümlaut x4.png", "ümlaut.png"),
        ("x4.png", "x4.png"),
    ],
)
def test_names_of_pairs(lr, gt):
    others = ["zz/other.png"]
    pairs, unpaired = match(("LR", [f"LR/{lr}", *(f"LR/{o}" for o in others)]), ("HR", [f"HR/{gt}"]))
    assert pairs == [(f"LR/{lr}", f"HR/{gt}")]
    assert unpaired == {"LR/zz/other.png": "has no ground truth in HR"}


def test_the_same_name_comes_first():
    """Only what has no namesake is compared without what it says of its resolution."""
    pairs, unpaired = match(("LR", ["LR/a.png", "LR/a_x4.png", "LR/b.png"]), ("HR", ["HR/a.png", "HR/a_HR.png"]))
    assert pairs == [("LR/a.png", "HR/a.png"), ("LR/a_x4.png", "HR/a_HR.png")]
    assert unpaired == {"LR/b.png": "has no ground truth in HR"}
    assert match(("LR", []), ("HR", ["HR/c.png"]))[1] == {"HR/c.png": "has no LR image in LR"}


def test_both_in_one_folder():
    files = [f"R/Canon/Test/4/Canon_{i:03}_{kind}.png" for i in range(3) for kind in ("HR", "LR4")]
    pairs, unpaired = match(("R", files), ("R", files))
    assert pairs == [(files[2 * i + 1], files[2 * i]) for i in range(3)] and not unpaired


@pytest.mark.parametrize("files", [["a.png", "a.jpg"], ["b_x2.png", "b_x4.png"]])
def test_two_partners_are_refused(files):
    with pytest.raises(ValueError, match=r"folder 'LR' must hold one picture called '.', got .* and .*; move one away"):
        match(("LR", [f"LR/{name}" for name in files]), ("HR", ["HR/a.png", "HR/b.png"]))


@pytest.fixture
def pairs(tmp_path):
    """Four pairs whose LR image is every fourth pixel of its ground truth, so that crops can be recognized."""
    for i in range(4):
        gt = picture(48 + 4 * i, 64, seed=i)
        save(tmp_path / "gt" / f"{i}.png", gt)
        save(tmp_path / "lr" / f"{i}x4.png", np.ascontiguousarray(gt[::4, ::4]))
    return tmp_path


def test_crops_of_pairs_lie_over_each_other(pairs):
    (pairs / "gt" / "2.txt").write_text("beside the truth")
    (pairs / "lr" / "3x4.txt").write_text("beside the LR image")
    dataset = ImageFolder(Root(lr=str(pairs / "lr"), gt=str(pairs / "gt")), 32)
    samples = [dataset[i] for i in range(40)]
    for sample in samples:
        assert sample["gt"].shape == (3, 32, 32) and sample["lr"].shape == (3, 8, 8)
        gt = sample["gt"].numpy()
        # of a picture that was turned round, the pixel that was kept lies at the block's other end
        assert any(np.array_equal(sample["lr"].numpy(), gt[:, ::4, first::4]) for first in (0, 3))
    assert {sample["prompt"] for sample in samples} == {"", "beside the truth", "beside the LR image"}
    tops = {sample["gt"].numpy().tobytes() for sample in samples}
    assert len(tops) > 30 and not dataset.skipped


def test_pairs_that_do_not_fit_are_skipped_and_named(pairs, caplog):
    save(pairs / "lr" / "wrong.png", picture(10, 16))
    save(pairs / "gt" / "wrong.png", picture(48, 64))
    save(pairs / "gt" / "alone.png", picture(48, 64))
    save(pairs / "lr" / "lonelyx4.png", picture(12, 16))
    dataset = ImageFolder(Root(lr=str(pairs / "lr"), gt=str(pairs / "gt")), 32)
    assert len(dataset) == 4
    assert {path.name: reason for path, reason in dataset.skipped.items()} == {
        "wrong.png": "is 64x48 pixels, must be 4 times its LR image, which is 16x10",
        "alone.png": f"has no LR image in {pairs / 'lr'}",
        "lonelyx4.png": f"has no ground truth in {pairs / 'gt'}",
    }
    for name in ("wrong.png", "alone.png", "lonelyx4.png"):
        assert name in caplog.text


def test_pairs_of_another_scale_and_of_none(pairs):
    with pytest.raises(FileNotFoundError, match="has no usable image: 4 pairs found, 0 without a partner, 4 skipped"):
        ImageFolder(Root(lr=str(pairs / "lr"), gt=str(pairs / "gt")), 32, degradation=Degradation(scale=2))
    with pytest.raises(FileNotFoundError, match="0 pairs found, 4 without a partner"):
        ImageFolder(Root(lr=str(pairs / "lr"), gt=str(pairs / "lr")), 32)


def test_a_pair_with_a_broken_half_is_not_drawn(pairs):
    path = pairs / "lr" / "0x4.png"
    path.write_bytes(path.read_bytes()[:200])
    dataset = ImageFolder(Root(lr=str(pairs / "lr"), gt=str(pairs / "gt")), 32)
    for i in range(30):
        dataset[i]
    assert {path.name: reason for path, reason in dataset.skipped.items()} == {"0.png": "cannot be decoded"}


def test_pairs_and_sharp_images_together(pairs, tmp_path):
    save(tmp_path / "sharp" / "a.png", picture(64, 64, seed=9))
    dataset = ImageFolder([Root(lr=str(pairs / "lr"), gt=str(pairs / "gt")), tmp_path / "sharp"], 32)
    shapes = {(sample["gt"].shape, sample["lr"].shape) for sample in (dataset[i] for i in range(20))}
    assert shapes == {((3, 32, 32), (3, 8, 8))} and len(dataset) == 5
