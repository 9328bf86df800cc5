"""The same samples to the bit, however many workers, processes and samples per batch there are, and after a resume."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rfsr_ext.training import RunConfig
from rfsr_ext.training.setup import build_dataset
from tests.training import watch_data

ROOT = Path(__file__).parents[2]
COUNT = 32


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Two folders of sharp images, one of them with files that cannot be used, and pairs."""
    root = tmp_path_factory.mktemp("data")
    for i in range(9):
        pixels = np.random.default_rng(i).integers(0, 256, (32 + 4 * i, 48, 3), np.uint8)
        for folder, image in (("a", pixels), ("gt", pixels), ("lr", pixels[::4, ::4])):
            (root / folder).mkdir(exist_ok=True)
            Image.fromarray(np.ascontiguousarray(image)).save(root / folder / f"{i}.png")
        (root / "a" / f"{i}.txt").write_text(f"picture {i}")
    for name in ("broken", "cut"):
        (root / "a" / f"{name}.png").write_bytes((root / "a" / "0.png").read_bytes()[:2000])
    (root / "a" / "text.png").write_text("no image")
    data = [{"path": f"{root}/a", "weight": 2, "limit": 11}, {"lr": f"{root}/lr", "gt": f"{root}/gt"}]
    return {"data": data, "crop_size": 32, "degradation": "realesrgan-a", "seed": 5, "model": "none"}


@pytest.fixture(scope="module")
def streamed(settings, tmp_path_factory):
    """As many pictures as samples, in eight shards."""
    root = tmp_path_factory.mktemp("shards")
    for shard in range(8):
        (root / f"{shard}").mkdir()
        for k in range(COUNT // 8):
            pixels = np.random.default_rng((shard, k)).integers(0, 256, (40, 48, 3), np.uint8)
            Image.fromarray(pixels).save(root / f"{shard}" / f"{k}.png")
            (root / f"{shard}" / f"{k}.txt").write_text(f"picture {k} of shard {shard}")
        shutil.make_archive(str(root / f"{shard}"), "tar", root / f"{shard}")
    return settings | {"data": {"stream": f"{root}/*.tar", "lanes": 8}}


def read_backwards(settings):
    """Fingerprints of the samples, read one by one, the last first."""
    dataset = build_dataset(RunConfig(**settings))
    samples = {i: watch_data.fingerprint(dataset[i]) for i in reversed(range(COUNT))}
    assert len(set(samples.values())) == COUNT
    return samples


@pytest.fixture(scope="module")
def expected(settings):
    return read_backwards(settings)


def arguments(settings, **changes):
    return [f"{key}={json.dumps(value)}" for key, value in (settings | changes).items()]


def rows(log, rank):
    """What a process wrote down: indices and fingerprints."""
    return [json.loads(line) for line in Path(f"{log}-{rank}").read_text().splitlines()]


def seen(log, processes=1):
    """Samples by index, of all processes; none was given twice."""
    found = [rows(log, rank) for rank in range(processes)]
    assert all(found)
    together = dict(sum(found, []))
    assert len(together) == sum(map(len, found))
    return together


@pytest.mark.parametrize(
    ("workers", "batch_size", "parts"), [(0, 1, 1), (1, 4, 1), (3, 8, 1), (3, 8, 2)], ids=lambda value: str(value)
)
def test_workers_and_batch_size(tmp_path, settings, expected, workers, batch_size, parts):
    watch_data.main(
        str(tmp_path / "run"), tmp_path / "log", 1,
        *arguments(settings, num_workers=workers, batch_size=batch_size, iterations=COUNT // batch_size,
                   gradient_accumulation_steps=parts, prefetch_factor=3),
    )  # fmt: skip
    assert seen(tmp_path / "log") == expected


def test_resumed_in_the_middle(tmp_path, settings, expected):
    """Each half in a run of its own, with other numbers of workers."""
    for log, iterations, workers in (("first", 3, 1), ("second", 8, 2)):
        watch_data.main(
            str(tmp_path / "run"), tmp_path / log, 1,
            *arguments(settings, num_workers=workers, batch_size=4, iterations=iterations),
        )  # fmt: skip
    first, second = seen(tmp_path / "first"), seen(tmp_path / "second")
    assert sorted(first) == list(range(12)) and sorted(second) == list(range(12, 32))
    assert first | second == expected


def run_on_two(folder, settings):
    """Rows of both processes of a run, and of one that resumes it; that they are two the script asserts."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                                "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for log, iterations, workers in (("first", 2, 0), ("second", 4, 1)):
        command = [str(ROOT / "tests/training/watch_data.py"), str(folder / "run"), str(folder / log), "2"]
        command += arguments(settings, num_workers=workers, batch_size=8, iterations=iterations)
        ended = subprocess.run([*launcher, *command], env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
    return seen(folder / "first", processes=2), seen(folder / "second", processes=2)


@pytest.mark.slow
def test_two_processes(tmp_path, settings, expected):
    first, second = run_on_two(tmp_path, settings)
    assert sorted(first) == list(range(16)) and sorted(second) == list(range(16, 32))
    assert first | second == expected


@pytest.mark.slow
def test_two_processes_read_shards(tmp_path, streamed):
    """No picture twice and none lost, shards of their own, and the resumed run goes on at the very next sample."""
    first, second = run_on_two(tmp_path, streamed)
    assert sorted(first) == list(range(16)) and sorted(second) == list(range(16, 32))
    assert first | second == read_backwards(streamed)
    dataset = build_dataset(RunConfig(**streamed))
    assert {dataset[i]["prompt"] for i in range(COUNT)} == {
        f"picture {k} of shard {shard}" for shard in range(8) for k in range(COUNT // 8)
    }
    lanes = [{index % 8 for index, _ in rows(tmp_path / log, rank)} for rank in (0, 1) for log in ("first", "second")]
    assert lanes == [{0, 1, 2, 3}] * 2 + [{4, 5, 6, 7}] * 2
