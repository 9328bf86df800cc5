"""What the mini model makes of photographs that nothing was trained on: the table, the sheets and the blind test.

``PHOTOGRAPHS`` is the folder in which the packages of `rfsr_ext.data.PACKAGED` are unpacked, see ``rfsr mini build``.

``python -m benchmarks.laboratory table PHOTOGRAPHS base=mini fine-tuned=runs/mini/model`` measures models, beside
bicubic enlargement, and writes ``laboratory.csv`` and ``laboratory.md``; ``sheet`` in its place draws one crop of every
held-out photograph.

``python -m benchmarks.laboratory pairs PHOTOGRAPHS base=mini fine-tuned=runs/mini/model`` draws pairs of results, which
is left and which right by chance, and writes the key; ``bicubic=``, without a folder, is bicubic enlargement.  Somebody
who has not seen the key writes lines ``pair,choice`` (left or right) into ``votes.csv`` beside it, and
``python -m benchmarks.laboratory count FOLDER`` counts, in it or in each folder in it, and writes every vote with the
names of its pair into ``blind_votes.csv`` of ``--output``.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest
from torch import Tensor

from benchmarks import measure
from rfsr_ext.data import Sample, evaluation_crops, photographs
from rfsr_ext.evaluation import (
    bradley_terry,
    compare,
    comparison_figure,
    enlarge_bicubic,
    evaluate,
    evaluate_bicubic,
    held_out_scorers,
    save_figure,
    summarize,
)
from rfsr_ext.evaluation.ways import markdown_rows
from rfsr_ext.metrics import Preset, Suite
from rfsr_ext.models import load_model
from rfsr_ext.sampling import generators, sample

SIZE = 128
METRICS = ("psnr", "ssim", "gmsd", "cw_ssim", "piqe")  # nothing to download; less is better for GMSD and PIQE
PER_SHEET = 10
_COLUMNS = ["mean", "standard_error"]


def held_out(photographs_at: Path, count: int) -> list[Sample]:
    """Crops of the photographs that no stage of ``rfsr mini build`` was trained on."""
    names = photographs("test") + photographs("test", packaged=True)
    return evaluation_crops(names, SIZE, count, folder=photographs_at)


def upscaler(folder: str) -> Callable[[list[Sample], int], Tensor]:
    """Samples and a seed to results; an empty ``folder`` is bicubic enlargement."""
    if not folder:
        return lambda samples, seed: enlarge_bicubic(torch.stack([s["lr"] for s in samples]), 4)
    model = load_model(folder)

    def upscale(samples: list[Sample], seed: int) -> Tensor:
        parts = []
        for first in range(0, len(samples), 8):
            part = samples[first : first + 8]
            noise = generators(seed, range(first, first + len(part)))
            parts.append(sample(model, torch.stack([s["lr"] for s in part]), [s["prompt"] for s in part], noise))
        return torch.cat(parts)

    return upscale


def table(samples: list[Sample], models: Mapping[str, str], seeds: range, output: Path) -> None:
    """Means, and differences from the rows above, over crops; every row of the measurement as CSV."""
    suite, scorers = Suite(Preset("laboratory", METRICS)), held_out_scorers()
    frames = [evaluate_bicubic(samples, scorers, 4, suite=suite)]
    for name, folder in models.items():
        frames.append(evaluate(load_model(folder), samples, scorers, seeds, name=name, suite=suite))
    frame = pd.concat(frames, ignore_index=True)
    names = list(frame["model"].unique())
    means = summarize(frame)
    metrics = list(means.index.get_level_values("metric").unique())
    cells = [
        [name, *(f"{mean:.3f} ± {error:.3f}" for mean, error in means.loc[name].loc[metrics, _COLUMNS].to_numpy())]
        for name in names
    ]
    parts = [
        "# What the mini model makes of photographs that nothing was trained on",
        f"Written by `python -m benchmarks.laboratory table`; {measure.now()}, {measure.processor()}. The judge and, "
        "of another kind, PIQE train nobody; the rewards, mini-iqa and mini-preference, are what fine-tuning raises.",
        f"{len(samples)} held-out crops of {SIZE} pixels, noise of seeds {seeds.start} to {seeds.stop - 1}; mean ± "
        "standard error over crops; of GMSD and PIQE less is better.",
        "\n".join(markdown_rows(["", *metrics], cells)),
    ]
    for before, name in zip(names, names[1:], strict=False):
        found = compare(frame, before, name)
        cells = [[f"{found.loc[m, 'difference']:+.3f} ({found.loc[m, 'ratio']:+.1f})" for m in metrics]]
        parts += [f"{name} − {before} (in standard errors):", "\n".join(markdown_rows(metrics, cells))]
    text = "\n\n".join(parts)
    output.mkdir(parents=True, exist_ok=True)
    frame.drop(columns="prompt").round(5).to_csv(output / "laboratory.csv", index=False)
    (output / "laboratory.md").write_text(text + "\n")
    print(text)


def sheet(samples: list[Sample], models: Mapping[str, str], output: Path) -> None:
    """A row for each crop: LR, bicubic, every model, truth."""
    ways = {"bicubic": upscaler("")} | {name: upscaler(folder) for name, folder in models.items()}
    columns = [
        [s["lr"] for s in samples],
        *(list(way(samples, 0)) for way in ways.values()),
        [s["gt"] for s in samples],
    ]
    output.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(samples), PER_SHEET):
        rows = [[(column[i], "") for column in columns] for i in range(first, min(first + PER_SHEET, len(samples)))]
        figure = comparison_figure(rows, ["low resolution", *ways, "ground truth"], tile=256)
        save_figure(figure, output / f"sheet-{first // PER_SHEET + 1}.png")


def pairs(samples: list[Sample], models: Mapping[str, str], seed: int, output: Path) -> None:
    """Shuffled pairs of two ways' results, ten on a sheet, and the key to them."""
    if len(models) != 2:
        raise SystemExit(f"pairs need two ways NAME=FOLDER, got {len(models)}")
    results = {name: upscaler(folder)(samples, seed) for name, folder in models.items()}
    rng = np.random.default_rng(seed)
    output.mkdir(parents=True, exist_ok=True)
    order, swapped = rng.permutation(len(samples)), rng.random(len(samples)) < 0.5
    sides = [list(results) if not swap else list(results)[::-1] for swap in swapped]
    with (output / "key.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["pair", "crop", "left", "right"])
        rows.writerows([number, i, *sides[number]] for number, i in enumerate(order))
    for first in range(0, len(samples), PER_SHEET):
        numbers = range(first, min(first + PER_SHEET, len(samples)))
        shown = [[(results[side][order[n]], f"pair {n}, {place}")
                  for side, place in zip(sides[n], ("left", "right"), strict=True)] for n in numbers]  # fmt: skip
        rows = [a + b for a, b in zip(shown[::2], shown[1::2], strict=True)]
        figure = comparison_figure(rows, ["left", "right"] * 2, tile=256)
        save_figure(figure, output / f"pairs-{first // PER_SHEET + 1}.png")


def count(folder: Path, output: Path) -> None:
    """How often each way was chosen, with Wilson's interval; all votes, and the strengths that they give, as CSV."""
    folders = sorted(path.parent for path in folder.rglob("key.csv"))
    if not folders:
        raise SystemExit(f"folder must hold key.csv, or folders with one, got {str(folder)!r}")
    tests = []
    for part in folders:
        key = pd.read_csv(part / "key.csv").set_index("pair")
        choice = pd.read_csv(part / "votes.csv").set_index("pair")["choice"]
        if sorted(choice.index) != sorted(key.index) or not set(choice) <= {"left", "right"}:
            raise SystemExit(f"votes.csv must hold left or right for each of the {len(key)} pairs once")
        votes = key.join(choice).reset_index()
        votes["chosen"] = votes["left"].where(votes.pop("choice") == "left", votes["right"])
        votes.insert(0, "test", part.name)
        tests.append(votes)
        for name in sorted(set(key["left"]) | set(key["right"])):
            wins = int((votes["chosen"] == name).sum())
            low, high = binomtest(wins, len(key)).proportion_ci(method="wilson")
            print(f"{name}: {wins} of {len(key)}, {wins / len(key):.0%} (95 %: {low:.0%} to {high:.0%})")
    everything = pd.concat(tests, ignore_index=True)
    try:
        for name, row in bradley_terry(everything).iterrows():
            print(f"strength of {name}: {row['strength']:+.2f} (95 %: {row['low']:+.2f} to {row['high']:+.2f})")
    except ValueError as error:  # the counts stand without strengths
        print(error)
    output.mkdir(parents=True, exist_ok=True)
    everything.to_csv(output / "blind_votes.csv", index=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["table", "sheet", "pairs", "count"])
    parser.add_argument("folder", type=Path, help="of the photographs; for count, of the key and the votes")
    parser.add_argument("models", nargs="*", help="NAME=FOLDER")
    parser.add_argument("--crops", type=int, help="64 for the table, 13 for the sheet, 40 pairs")
    parser.add_argument("--seeds", type=int, default=3, help="of the noise, for the table")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs and their noise")
    parser.add_argument("--output", type=Path, default=Path("runs/laboratory"))
    options = parser.parse_args()
    models = dict(model.split("=", 1) for model in options.models)
    if options.what == "count":
        return count(options.folder, options.output)
    samples = held_out(options.folder, options.crops or {"table": 64, "sheet": 13, "pairs": 40}[options.what])
    if options.what == "table":
        table(samples, models, range(options.seeds), options.output)
    elif options.what == "sheet":
        sheet(samples, models, options.output)
    else:
        pairs(samples, models, options.seed, options.output)
    return None


if __name__ == "__main__":
    main()
