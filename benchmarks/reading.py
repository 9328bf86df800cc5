"""Crops of large files: how long one takes, and whether a training waits for them.

``python -m benchmarks.reading`` prints two tables and writes ``benchmarks/results/reading-<device>.md`` and ``.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import PIL.features
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks import measure, report
from rfsr_ext.data import PHOTOGRAPHS, Degradation, ImageFolder, load_photograph
from rfsr_ext.data.images import from_uint8, read_image, to_uint8
from rfsr_ext.evaluation.ways import markdown_rows

SIDE, BATCH, TILE = 512, 8, 256
FILES = {"2040x1356.png": {}, "1024x1024.png": {}, "2040x1356.jpg": {"quality": 95}, "4000x3000.jpg": {"quality": 95}}
ABOUT = f"""\
Written by `python -m benchmarks.reading`; do not edit. A crop of {SIDE} pixels, float32, at places drawn anew in each
round, in which all contestants took turns; the files are mosaics of photographs at their own resolution, of the sizes
of DIV2K, FFHQ and a camera. Processor time does not count what else the machine does, which the load at the end tells.
"Rows" has Pillow's decoder end at the crop's last row, "draft" has JPEG decoded at half size. torchvision.io neither
turns a picture upright nor converts its colors to sRGB, for which ours looks.

We decode whole files. Ending at the last row would save the share below and give the same pixels, but it would read the
upper part of a file that is damaged further down: whether a file counts as damaged would depend on the crops drawn from
it before, and so would the samples, which must be functions of seed and index alone. Pillow also reports the early end
as damage, so that the two could not be told apart. Draft mode gives other pixels, those of a smaller picture."""
ABOUT_LOADER = f"""\
`ImageFolder` on these four files, degraded by realesrgan-a, batches of {BATCH}, two batches prefetched by each worker;
one thread each. The rate is that of a loop that does nothing else, the processor time that of its own process for each
sample. The wait is that for a batch in a loop that is busy elsewhere, as with a GPU, for {{step:g}} s after each.
Batches are pinned where there is a GPU; here there was none."""


def mosaic(width: int, height: int) -> np.ndarray:
    """``[height, width, 3]`` of 8 bits: squares of photographs, each as it is in its file."""
    rng, names = np.random.default_rng(0), list(PHOTOGRAPHS)
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            photograph = load_photograph(names[rng.integers(len(names))])
            y, x = (rng.integers(n - TILE + 1) for n in photograph.shape[:2])
            part = pixels[top : top + TILE, left : left + TILE]
            part[:] = to_uint8(photograph[y : y + part.shape[0], x : x + part.shape[1]])
    return pixels


def cut(pixels: np.ndarray, top: int, left: int) -> np.ndarray:
    return pixels[top : top + SIDE, left : left + SIDE]


def by_pillow(path: Path, top: int, left: int) -> np.ndarray:
    with Image.open(path) as file:
        return from_uint8(cut(np.asarray(file.convert("RGB")), top, left))


def by_rows(path: Path, top: int, left: int) -> np.ndarray:
    with Image.open(path) as file:
        file.tile = [tile._replace(extents=(0, 0, file.width, top + SIDE)) for tile in file.tile]
        with contextlib.suppress(OSError):  # as which Pillow takes it that rows of a JPEG are left
            file.load()
        return from_uint8(np.asarray(file.crop((left, top, left + SIDE, top + SIDE))))


def by_draft(path: Path, top: int, left: int) -> np.ndarray:
    with Image.open(path) as file:
        file.draft("RGB", (file.width // 2, file.height // 2))
        return from_uint8(cut(np.asarray(file), top // 2, left // 2))


def by_torchvision(path: Path, top: int, left: int) -> np.ndarray:
    from torchvision.io import ImageReadMode, decode_image

    part = decode_image(str(path), ImageReadMode.RGB)[:, top : top + SIDE, left : left + SIDE]
    return from_uint8(part.movedim(0, -1).numpy())


def contestants(path: Path) -> dict[str, Callable[[Path, int, int], np.ndarray]]:
    """By name, what reads a crop from a file of this kind."""
    found = {
        "ours": lambda path, top, left: read_image(path, lambda height, width: (top, left, SIDE, SIDE)),
        "ours, all of it, then cut": lambda path, top, left: cut(read_image(path), top, left),
        "Pillow, then cut": by_pillow,
    }
    if find_spec("torchvision"):
        found["torchvision.io, then cut"] = by_torchvision
    found["Pillow, rows"] = by_rows
    if path.suffix == ".jpg":
        found["Pillow, draft"] = by_draft
    return found


def run_file(path: Path, rounds: int) -> dict:
    found, rng = contestants(path), np.random.default_rng(0)
    with Image.open(path) as file:
        width, height = file.size
    walls, processors = {key: [] for key in found}, {key: [] for key in found}
    expected = by_pillow(path, 3, 5)
    same = {key: np.array_equal(read(path, 3, 5), expected) for key, read in found.items()}
    for _ in range(rounds):
        top, left = int(rng.integers(height - SIDE + 1)), int(rng.integers(width - SIDE + 1))
        for key, read in found.items():
            wall, processor = time.perf_counter(), time.process_time()
            read(path, top, left)
            walls[key].append(time.perf_counter() - wall)
            processors[key].append(time.process_time() - processor)
    rows = [
        {
            "name": key,
            "same": same[key],
            **measure.quantiles(walls[key]),
            "processor": float(np.median(processors[key])),
        }
        for key in found
    ]
    return {"title": f"{path.name}, {path.stat().st_size / 2**20:.1f} MiB, {rounds} crops", "rows": rows}


def run_loader(folder: Path, workers: int, rounds: int, step: float) -> dict:
    """Samples per second, and seconds of waiting for a batch after each step."""
    dataset = ImageFolder(folder, SIDE, 0, Degradation.preset("realesrgan-a"))
    ahead = 1 + 2 * workers  # batches that are ready or under way when counting begins
    loader = iter(
        DataLoader(
            dataset, BATCH, sampler=range((2 * rounds + 2 * ahead) * BATCH), num_workers=workers,
            prefetch_factor=2 if workers else None,
        )
    )  # fmt: skip
    for _ in range(ahead):
        next(loader)
    samples, waits = rounds * BATCH, []
    started, processor = time.perf_counter(), time.process_time()
    for _ in range(rounds):
        next(loader)
    rate, processor = samples / (time.perf_counter() - started), (time.process_time() - processor) / samples
    for _ in range(rounds):
        time.sleep(step)
        started = time.perf_counter()
        next(loader)
        waits.append(time.perf_counter() - started)
    return {"workers": workers, "rate": rate, "processor": processor, **measure.quantiles(waits)}


def markdown(result: dict) -> str:
    lines = [f"# {result['device']}", "", *ABOUT.splitlines(), ""]
    for case in result["files"]:
        ours = case["rows"][0]["processor"]
        body = [
            [row["name"], "same" if row["same"] else "other", f"{row['median'] * 1e3:.0f} ms",
             f"{row['q20'] * 1e3:.0f} – {row['q80'] * 1e3:.0f} ms", f"{row['processor'] * 1e3:.0f} ms",
             f"{row['processor'] / ours:.2f}"]
            for row in case["rows"]
        ]  # fmt: skip
        header = ["", "pixels", "median", "20 % – 80 %", "processor time", "processor / ours"]
        lines += [f"### {case['title']}", "", *markdown_rows(header, body), ""]
    body = [
        [str(row["workers"]), f"{row['rate']:.1f}", f"{row['processor'] * 1e3:.0f} ms", f"{row['median']:.2f} s",
         f"{row['q20']:.2f} – {row['q80']:.2f} s"]
        for row in result["loader"]
    ]  # fmt: skip
    header = ["workers", "samples per second", "processor time", "wait for a batch", "20 % – 80 %"]
    about = ABOUT_LOADER.format(step=result["step"]).splitlines()
    lines += ["### The loader", "", *about, "", *markdown_rows(header, body), ""]
    return "\n".join([*lines, f"From {result['started']}, to {result['ended']}; {result['versions']}."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reading", description=__doc__.partition("\n")[0])
    parser.add_argument("--crops", type=int, default=15, help="of each file")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--step", type=float, default=4.0, help="seconds of a training step")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = f"{measure.now()}, load {measure.load()}"
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in FILES]
        for path, options in zip(paths, FILES.values(), strict=True):
            Image.fromarray(mosaic(*map(int, path.stem.split("x")))).save(path, **options)
        files = [run_file(path, args.crops) for path in paths]
        loader = [run_loader(Path(folder), workers, args.batches, args.step) for workers in args.workers]
    packages = ["torch", "numpy", "pillow", *(["torchvision"] if find_spec("torchvision") else [])]
    codecs = [f"{name} {PIL.features.version(name)}" for name in ("libjpeg_turbo", "zlib_ng")]
    result = {
        "device": f"Reading, {measure.processor().rpartition(',')[0]}, {os.cpu_count()} cores",
        "files": files,
        "loader": loader,
        "step": args.step,
        "versions": ", ".join([f"{name} {version(name)}" for name in packages] + codecs),
        "started": started,
        "ended": f"{measure.now()}, load {measure.load()}",
    }
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{report.slug(result['device'])}.md"
    path.write_text(markdown(result))
    path.with_suffix(".json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
