import copy
import io
import logging
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from rfsr_ext.data import PHOTOGRAPHS, Degradation, ImageFolder, PhotographCrops, evaluation_crops, photographs
from rfsr_ext.data.datasets import CheckedSamples
from rfsr_ext.data.images import from_uint8, read_image


def same(a, b):
    return torch.equal(a["gt"], b["gt"]) and torch.equal(a["lr"], b["lr"]) and a["prompt"] == b["prompt"]


def check(sample, size, scale=4):
    for key, side in (("gt", size), ("lr", size // scale)):
        assert sample[key].shape == (3, side, side) and sample[key].dtype == torch.float32
        assert sample[key].min() >= 0 and sample[key].max() <= 1
    assert isinstance(sample["prompt"], str)


@pytest.fixture(scope="module")
def crops():
    return PhotographCrops(photographs("train")[:5], 64, seed=3)


def test_photograph_crops_are_a_function_of_seed_and_index():
    crops, again = (PhotographCrops(["coins", "camera"], 64, seed=3) for _ in "ab")
    backwards = {i: again[i] for i in reversed(range(8))}
    assert all(same(crops[i], backwards[i]) for i in range(8))
    assert not any(same(crops[i], crops[i + 1]) for i in range(8))
    other = PhotographCrops(["brick"], 64, seed=4, dead_leaves_share=0)
    assert not same(other[0], PhotographCrops(["brick"], 64, seed=5, dead_leaves_share=0)[0])


@settings(max_examples=20, deadline=None)
@given(index=st.integers(0, 2**40))
def test_photograph_crops_of_any_index(crops, index):
    check(crops[index], 64)


def test_photograph_crops_show_the_photographs_they_name(crops):
    """Prompts are tags of the photographs, and no held-out photograph is among those to train on."""
    coffee = PhotographCrops(["coffee"], 64, dead_leaves_share=0, empty_prompt_share=0, recolor=False)
    tags = set(PHOTOGRAPHS["coffee"].tags)
    for i in range(10):
        assert set(coffee[i]["prompt"].split(", ")) <= tags
    train = copy.copy(crops)  # their pyramids take seconds
    train.dead_leaves_share = train.empty_prompt_share = 0
    names = [name for name, _ in train.levels]
    allowed = {tag for name in names for tag in PHOTOGRAPHS[name].tags}
    seen = {tag for i in range(60) for tag in train[i]["prompt"].split(", ")}
    assert seen <= allowed and len(seen) > 10
    assert set(names) < set(photographs("train"))
    assert set(photographs("train")).isdisjoint(photographs("test") + photographs("validation"))


def test_shares():
    leaves = PhotographCrops(["brick"], 32, dead_leaves_share=1)
    assert all(leaves[i]["prompt"] == "" for i in range(5))
    prompts = PhotographCrops(["brick"], 32, dead_leaves_share=0, empty_prompt_share=0.5)
    empty = sum(prompts[i]["prompt"] == "" for i in range(100))
    assert 30 <= empty <= 70


def test_photograph_crops_reject_sizes():
    with pytest.raises(ValueError, match="size must be a multiple of the scale 4, got 62"):
        PhotographCrops(["brick"], 62)
    with pytest.raises(ValueError, match=r"size must fit into photograph 'chelsea' of \(300, 451\) pixels, got 400"):
        PhotographCrops(["chelsea"], 400)


def test_evaluation_crops_are_fixed_and_take_turns():
    names = photographs("test")
    eight, again, five = (evaluation_crops(names, 64, count) for count in (8, 8, 5))
    assert all(same(a, b) for a, b in zip(eight, again, strict=True))
    assert all(same(a, b) for a, b in zip(five, eight, strict=False))
    for sample in eight:
        check(sample, 64)
        assert sample["gt"].mean(0).std() > 0.03
    prompts = [sample["prompt"] for sample in eight]
    assert prompts[:3] == [", ".join(PHOTOGRAPHS[name].tags) for name in names] and prompts[3] == prompts[0]


def test_evaluation_crops_seed_changes_the_degradation_alone():
    a, b = (evaluation_crops(["coffee"], 64, 1, seed)[0] for seed in (0, 1))
    assert torch.equal(a["gt"], b["gt"]) and not torch.equal(a["lr"], b["lr"])


def test_evaluation_crops_do_not_overlap():
    crops = [sample["gt"].numpy().tobytes() for sample in evaluation_crops(["coffee"], 128, 10)]
    assert len(set(crops)) == 10


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"gt": torch.full((3, 8, 8), 255.0)}, "gt must be in [0, 1], got values from 255 to 255"),
        ({"gt": torch.full((3, 8, 8), -1.0)}, "gt must be in [0, 1], got values from -1 to -1"),
        ({"lr": torch.full((3, 2, 2), torch.nan)}, "lr must be in [0, 1], got values from nan to nan"),
        ({"lr": torch.ones(3, 2, 2, dtype=torch.uint8)}, "lr must be a float32 tensor, got torch.uint8"),
        ({"lr": np.ones((3, 2, 2), np.float32)}, "lr must be a float32 tensor, got float32"),
        ({"gt": torch.ones(8, 8, 3)}, "gt must be [3, 8, 8] (crop_size, scale), got [8, 8, 3]"),
        ({"lr": torch.ones(3, 8, 8)}, "lr must be [3, 2, 2] (crop_size, scale), got [3, 8, 8]"),
        ({"prompt": None}, "prompt must be text, got NoneType; without one it is ''"),
    ],
)
def test_samples_of_the_users_own_are_checked(changes, sentence):
    good = {"gt": torch.ones(3, 8, 8), "lr": torch.zeros(3, 2, 2), "prompt": ""}
    checked = CheckedSamples([good, good | changes], 8, 4)
    assert checked[0] is good
    with pytest.raises(ValueError, match=re.escape(f"sample 1 of the dataset: {sentence}")):
        checked[1]


@pytest.mark.parametrize(
    ("sample", "missing"), [({"gt": torch.ones(3, 8, 8)}, "lr and prompt"), (None, "gt and lr and prompt")]
)
def test_samples_without_a_part_are_refused(sample, missing):
    with pytest.raises(ValueError, match=f"sample 0 of the dataset: it must have gt, lr and prompt, .*out {missing}$"):
        CheckedSamples([sample], 8, 4)[0]


@pytest.mark.parametrize("dataset", [[], {}, torch.utils.data.Dataset()])
def test_a_dataset_without_the_sample_asked_for_is_refused(dataset):
    with pytest.raises(ValueError, match=r"sample for every index .* got \w+Error\(.*\) for 5; let it"):
        CheckedSamples(dataset, 8, 4)[5]


def test_too_many_evaluation_crops():
    with pytest.raises(ValueError, match=r"count must be at most \d+ for crops of 128 pixels, got 10000"):
        evaluation_crops(["coffee"], 128, 10_000)


# -- folders ----------------------------------------------------------------------------------------------------------


def picture(height=40, width=56, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def encoded(suffix):
    buffer = io.BytesIO()
    picture().save(buffer, suffix)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        picture(seed=i).save(tmp_path / f"good{i}.png")
    return tmp_path


def test_folder_of_images(folder):
    (folder / "good1.txt").write_text("a cat\n", encoding="utf-8")
    (folder / "sub").mkdir()
    picture(seed=9).convert("L").save(folder / "sub" / "gray.JPG")
    (folder / "notes.md").write_text("no image")
    dataset, again = ImageFolder(folder, 32, seed=1), ImageFolder(folder, 32, seed=1)
    assert len(dataset) == 4 and not dataset.skipped
    samples = [dataset[i] for i in range(30)]
    for sample in samples:
        check(sample, 32)
    assert all(same(samples[i], again[i]) for i in reversed(range(30)))
    assert {sample["prompt"] for sample in samples} == {"", "a cat"}
    assert not same(samples[0], ImageFolder(folder, 32, seed=2)[0])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
def test_prompts_of_any_encoding(tmp_path, encoding):
    picture().save(tmp_path / "cat.png")
    text = "the cat\u2019s caf\u00e9"
    mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
    (tmp_path / "cat.txt").write_bytes(mark + (text + "\r\n").encode(encoding))
    dataset = ImageFolder(tmp_path, 32)
    (batch,) = DataLoader(dataset, batch_size=1, sampler=[0], num_workers=1)
    assert batch["prompt"] == [text] and not dataset.skipped


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", bytes(range(256)), b"a\0b"])
def test_a_prompt_that_is_no_text_is_skipped_counted_and_named(tmp_path, content, caplog):
    picture().save(tmp_path / "cat.png")
    (tmp_path / "cat.txt").write_bytes(content)
    dataset = ImageFolder(tmp_path, 32)
    assert dataset[0]["prompt"] == ""
    assert [path.name for path in dataset.skipped] == ["cat.txt"]
    assert "cat.txt: cannot be read as text" in caplog.text


def test_a_folder_in_the_place_of_a_prompt_is_none(tmp_path):
    picture().save(tmp_path / "cat.png")
    (tmp_path / "cat.txt").mkdir()
    dataset = ImageFolder(tmp_path, 32)
    assert dataset[0]["prompt"] == "" and not dataset.skipped


def test_what_is_not_looked_into_is_said(tmp_path, caplog):
    for name in ("a.heic", "b.HEIC", "c.gif", "notes.md", "._d.png", ".DS_Store"):
        (tmp_path / name).touch()
    (tmp_path / "e.png").symlink_to(tmp_path / "nowhere")
    said = "1 .gif, 2 .heic, 2 hidden files and folders, 1 links to nothing, or no files"
    with pytest.raises(FileNotFoundError, match=f"0 image files found, 0 skipped, {said}"):
        ImageFolder(tmp_path, 32)
    picture().save(tmp_path / "good.png")
    caplog.clear()
    dataset = ImageFolder(tmp_path, 32)
    assert dataset.passed_over == {
        ".heic": 2, ".gif": 1, "hidden files and folders": 2, "links to nothing, or no files": 1,
    }  # fmt: skip
    assert said in caplog.text


def test_bad_files_are_skipped_counted_and_named(folder, caplog):
    (folder / "text.png").write_text("this is no image")
    (folder / "empty.jpg").touch()
    picture(20, 60).save(folder / "small.png")
    for suffix in ("jpeg", "png"):
        data = encoded(suffix)
        (folder / f"truncated.{suffix}").write_bytes(data[: len(data) // 2])
    with caplog.at_level(logging.WARNING):
        dataset = ImageFolder(folder, 32)
        samples = [dataset[i] for i in range(60)]
    assert {path.name: reason.split("(")[0].strip() for path, reason in dataset.skipped.items()} == {
        "text.png": "cannot be read as an image",
        "empty.jpg": "cannot be read as an image",
        "small.png": "is 60x20 pixels, the crop needs 32",
        "truncated.jpeg": "cannot be decoded",
        "truncated.png": "cannot be decoded",
    }
    assert len(caplog.records) == 5  # one warning each, however often the file comes up
    assert "5 skipped so far" in caplog.text
    for sample in samples:
        check(sample, 32)


def test_files_found_broken_by_loader_processes_are_counted(folder):
    data = encoded("png")
    (folder / "broken.png").write_bytes(data[: len(data) // 2])
    dataset = ImageFolder(folder, 32)
    loader = DataLoader(dataset, batch_size=2, sampler=range(40), num_workers=2)
    assert sum(len(batch["gt"]) for batch in loader) == 40
    assert {path.name: reason for path, reason in dataset.skipped.items()} == {"broken.png": "cannot be decoded"}


def test_pictures_are_read_upright_and_at_full_depth(tmp_path):
    pixels = np.arange(24, dtype=np.uint16).reshape(4, 6) * 2849  # up to 65527
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    deep = read_image(tmp_path / "deep.png")
    assert deep.shape == (4, 6, 3) and deep.dtype == np.float32
    np.testing.assert_allclose(deep[..., 1], pixels / 65535, atol=1e-7)

    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    image = picture(32, 48)
    image.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), np.rot90(from_uint8(np.asarray(image)), -1))

    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(OSError, match="floating-point numbers, whose white is not known"):
        read_image(tmp_path / "float.tiff")


def test_a_broken_file_changes_no_other_sample(folder):
    """What stands in for it does not depend on when it was found to be broken."""
    data = encoded("png")
    (folder / "broken.png").write_bytes(data[: len(data) // 2])
    forwards, backwards = ImageFolder(folder, 32), ImageFolder(folder, 32)
    late = {i: backwards[i] for i in reversed(range(20))}
    assert all(same(forwards[i], late[i]) for i in range(20))


@settings(max_examples=60, deadline=None)
@given(suffix=st.sampled_from(["png", "jpeg", "webp", "bmp", "tiff"]), share=st.floats(0, 0.999), flip=st.booleans())
def test_no_damage_stops_training(tmp_path_factory, suffix, share, flip):
    """Any file cut anywhere, or with a byte changed, is read or skipped, never an exception."""
    folder = tmp_path_factory.mktemp("damaged")
    picture(seed=1).save(folder / "good.png")
    data = bytearray(encoded(suffix))
    at = int(len(data) * share)
    if flip:
        data[at] ^= 0xFF
    else:
        del data[at:]
    (folder / f"damaged.{suffix}").write_bytes(data)
    dataset = ImageFolder(folder, 32)
    for i in range(4):
        check(dataset[i], 32)


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="data folder .*absent' does not exist; give a folder of images"):
        ImageFolder(tmp_path / "absent", 32)
    with pytest.raises(FileNotFoundError, match="0 image files found, 0 skipped, nothing not.*wanted .bmp.*32x32"):
        ImageFolder(tmp_path, 32)
    picture(8, 8).save(tmp_path / "small.png")
    with pytest.raises(FileNotFoundError, match="1 image files found, 1 skipped"):
        ImageFolder(tmp_path, 32)
    with pytest.raises(ValueError, match="size must be a multiple of the scale 4, got 30"):
        ImageFolder(tmp_path, 30, degradation=Degradation(scale=4))


def test_every_file_turns_out_broken(tmp_path):
    data = encoded("png")
    (tmp_path / "broken.png").write_bytes(data[: len(data) // 2])
    dataset = ImageFolder(tmp_path, 32)
    with pytest.raises(FileNotFoundError, match="has no image left that can be decoded"):
        dataset[0]
