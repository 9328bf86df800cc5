"""Shards over the network, here from a disk: which sample is which, workers, faults.  Needs the extra `stream`."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from rfsr_ext.data import Degradation
from rfsr_ext.data.stream import StreamedImages, _Lane

MINI = Degradation.preset("mini")


def test_lanes_begin_anew_and_go_back():
    opened = []

    def begin(count=40):
        opened.append(count)
        return iter([{"n": n} for n in range(count)])

    lane = _Lane(begin)
    assert [lane[p]["n"] for p in (0, 1, 1, 5, 4, 39, 40, 85, 79)] == [0, 1, 1, 5, 4, 39, 0, 5, 39]
    assert _Lane(begin)[83]["n"] == 3 and _Lane(lambda: begin(1))[7] == {"n": 0}
    opened.clear()
    assert [lane[p]["n"] for p in range(80, 120)] == list(range(40)) and len(opened) == 1
    with pytest.raises(ValueError, match="at least one image"):
        _Lane(lambda: begin(0))[0]


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package datasets; pip install 'rfsr_ext\[stream\]'"):
        StreamedImages("x-*.tar", 32)


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Four shards of five pictures; each is of one gray, 10 · shard + picture; one is broken, and two
    prompts are not UTF-8: one of Windows, the other no text."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for s in range(4):
        with tarfile.open(tmp_path / f"{s}.tar", "w") as tar:
            for k in range(5):
                buffer = io.BytesIO()
                Image.fromarray(np.full((40, 44, 3), 10 * s + k, np.uint8)).save(buffer, "png")
                png = buffer.getvalue()[:50] if (s, k) == (2, 1) else buffer.getvalue()
                text = {(0, 3): "café".encode("cp1252"), (0, 4): b"\0a\0"}.get((s, k), f"picture {s} {k}\n".encode())
                for ending, content in (("png", png), ("txt", text)):
                    member = tarfile.TarInfo(f"{s}_{k}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return f"{tmp_path}/*.tar"


def gray(sample):
    return round(sample["gt"].mean().item() * 255)


def test_samples_take_turns_over_lanes(shards):
    stream = StreamedImages(shards, 32, 0, MINI, lanes=4)
    samples = [stream[i] for i in range(28)]
    shown = [10 * (i % 4) + i // 4 % 5 for i in range(28)]
    shown[6] = shown[26] = 22  # the broken one, for which the next stands in
    assert [gray(sample) for sample in samples] == shown
    assert samples[5]["prompt"] == "picture 1 1" and samples[0]["lr"].shape == (3, 8, 8)
    assert samples[12]["prompt"] == "café" and samples[16]["prompt"] == ""
    assert stream.skipped == 2
    assert not torch.equal(samples[0]["lr"], samples[20]["lr"])  # the same picture, degraded anew


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_any_order_and_any_number_of_workers(shards, lanes):
    one = StreamedImages(shards, 32, 0, MINI, lanes)
    expected = [one[i] for i in range(24)]
    late = StreamedImages(shards, 32, 0, MINI, lanes)
    for i in (17, 3, 23, 0):  # a resumed run begins anywhere
        assert torch.equal(late[i]["lr"], expected[i]["lr"]) and late[i]["prompt"] == expected[i]["prompt"]
    for workers in (1, 3):
        stream = StreamedImages(shards, 32, 0, MINI, lanes)
        loader = DataLoader(stream, batch_size=2, sampler=range(8, 24), num_workers=workers)
        given = torch.cat([batch["lr"] for batch in loader])
        assert torch.equal(given, torch.stack([sample["lr"] for sample in expected[8:]]))


def test_what_is_refused(shards, tmp_path):
    with pytest.raises(ValueError, match="lanes must be at least 1 and at most the 4 shards, got 5"):
        StreamedImages(shards, 32, 0, MINI, lanes=5)
    with pytest.raises(ValueError, match="files must all end in .tar or all in .parquet, got x.zip"):
        StreamedImages("x.zip", 32)
    with pytest.raises(FileNotFoundError, match="no shards at .*absent"):
        StreamedImages(f"{tmp_path}/absent-*.tar", 32)
