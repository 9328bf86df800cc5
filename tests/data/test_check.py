"""What is said of a folder before training starts."""

import numpy as np
import pytest
from PIL import Image

from rfsr_ext.data import Root
from rfsr_ext.data.check import check_root, modes


def save(path, height=40, width=56, seed=0, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", 40 + 32 * i, seed=i)
    save(tmp_path / "gray.jpg", mode="L")
    save(tmp_path / "small.png", 31)
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:3000])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "a.heic").touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "again.png").write_bytes((tmp_path / "1.png").read_bytes())
    (tmp_path / "0.txt").write_bytes(bytes(range(256)))
    (tmp_path / "1.txt").write_text("two")
    return tmp_path


def test_everything_is_counted(folder):
    report = check_root(Root(str(folder)), 32)
    assert len(report.listing.entries) == 8 and len(report.headers) == 5
    assert modes(report.headers) == {"RGB PNG": 4, "L JPEG": 1}
    assert report.crops == 1 + 2 + 3 + 1 + 2  # 40, 72 and 104 high, gray, again
    assert report.duplicates == [[str(folder / "1.png"), str(folder / "sub" / "again.png")]]
    assert report.listing.passed_over == {".heic": 1}
    faults = {path.removeprefix(f"{folder}/"): reason.split(" (")[0] for path, reason in report.faults.items()}
    assert faults == {
        "small.png": "is 56x31 pixels, the crop needs 32",
        "cut.png": "cannot be decoded",
        "text.png": "cannot be read as an image",
        "0.txt": "cannot be read as text",
    }


def test_headers_alone_are_quick_and_find_less(folder):
    report = check_root(Root(str(folder)), 32, decode=False)
    assert {path.removeprefix(f"{folder}/") for path in report.faults} == {"small.png", "text.png"}
    assert len(report.headers) == 6 and not report.duplicates


def test_pairs_without_a_partner_and_of_other_sizes(tmp_path):
    for name, lr, gt in (("good", 10, 40), ("off", 10, 41), ("lr_only", 10, None), ("gt_only", None, 40)):
        for kind, height in (("lr", lr), ("gt", gt)):
            if height:
                save(tmp_path / kind / f"{name}.png", height, 14 if kind == "lr" else 56)
    (tmp_path / "lr" / "cut.png").write_bytes((tmp_path / "lr" / "good.png").read_bytes()[:200])
    save(tmp_path / "gt" / "cut.png")
    report = check_root(Root(lr=str(tmp_path / "lr"), gt=str(tmp_path / "gt")), 32)
    assert {path.removeprefix(f"{tmp_path}/"): reason.split(" (")[0] for path, reason in report.faults.items()} == {
        "gt/off.png": "is 56x41 pixels, must be 4 times its LR image, which is 14x10",
        "gt/cut.png": "has an LR image that cannot be decoded",
        "gt/gt_only.png": f"has no LR image in {tmp_path / 'lr'}",
        "lr/lr_only.png": f"has no ground truth in {tmp_path / 'gt'}",
    }
    assert len(report.headers) == 1 and report.crops == 1


def test_whole_pictures_of_any_size(folder):
    report = check_root(Root(str(folder)), 0, decode=False)
    assert len(report.headers) == 7 and report.crops == 0


def test_a_huge_folder_is_sampled_evenly(tmp_path):
    for i in range(20):
        save(tmp_path / f"{i:02}.png", seed=i)
    report = check_root(Root(str(tmp_path)), 32, decode=False, at_most=5)
    assert report.looked_at == [0, 4, 8, 12, 16] and len(report.headers) == 5
