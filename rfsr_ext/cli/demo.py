"""``rfsr demo``: the whole method on the mini model, with pictures and a table to look at."""

import json
import time
from pathlib import Path

import pandas as pd
import torch
import typer

from rfsr_ext.cli.evaluate import difference_table, held_out_scorers, mean_table
from rfsr_ext.data import Sample, evaluation_crops, photographs
from rfsr_ext.evaluation import (
    compare,
    comparison_figure,
    curves_figure,
    evaluate,
    evaluate_bicubic,
    save_figure,
    summarize,
)
from rfsr_ext.files import check_unheld, replace_file
from rfsr_ext.metrics import psnr
from rfsr_ext.models import ISRModel, load_model
from rfsr_ext.rewards import REWARDS, create_reward
from rfsr_ext.sampling import generators, sample
from rfsr_ext.training import RFSRConfig, RFSRTrainer

__all__ = ["run_demo"]

PICTURED = 6
_WRITTEN = {  # beside what training writes
    "comparison.png": "picture", "curves.png": "curves", "table.txt": "table", "report.json": "all numbers",
}  # fmt: skip


def _comparison(models: dict[str, ISRModel], samples: list[Sample], seed: int):
    """One row per sample: LR, each model's result, ground truth, with what was measured under each tile."""
    lr, gt = (torch.stack([s[key] for s in samples]) for key in ("lr", "gt"))
    prompts = [s["prompt"] for s in samples]
    noise = generators(seed, range(len(samples)))
    iqa = create_reward("mini-iqa")
    columns = [[(image, f"{image.shape[2]}×{image.shape[1]} pixels") for image in lr]]
    for model in models.values():
        images = sample(model, lr, prompts, [g.clone_state() for g in noise])
        with torch.no_grad():
            scores = iqa.score(images, prompts)
        columns.append(
            [
                (image, f"PSNR {p:.1f} dB · {iqa.name} {s:.2f}")
                for image, p, s in zip(images, psnr(images, gt), scores, strict=True)
            ]
        )
    with torch.no_grad():
        columns.append([(image, f"{iqa.name} {s:.2f}") for image, s in zip(gt, iqa.score(gt, prompts), strict=True)])
    rows = [list(row) for row in zip(*columns, strict=True)]
    return comparison_figure(rows, ["low resolution", *models, "ground truth"])


def run_demo(output: Path, iterations: int | None, crops: int, seed: int) -> None:
    """Train with the ``mini`` preset, measure on held-out photographs, write pictures, table and JSON to ``output``."""
    started = time.monotonic()
    overrides = {"output_dir": str(output), "seed": seed} | ({"iterations": iterations} if iterations else {})
    config = RFSRConfig.load("mini", overrides)
    check_unheld(output, tuple(_WRITTEN))
    typer.echo("RFSR on the mini model; its rewards and VGG19 are small stand-ins (see rfsr_ext/weights/README.md)")
    result = RFSRTrainer(config).train()

    samples = evaluation_crops(photographs("test"), 128, crops)
    models = {"base": load_model(config.model), "fine-tuned": result.model}
    scorers = held_out_scorers()
    frames = [evaluate(model, samples, scorers, seeds=(seed,), name=name) for name, model in models.items()]
    frame = pd.concat([evaluate_bicubic(samples, scorers, result.model.scale), *frames], ignore_index=True)
    table = f"{mean_table(frame)}\n\nFine-tuned against base:\n\n{difference_table(frame, 'base', ['fine-tuned'])}"
    figures = {
        "comparison.png": _comparison(models, samples[:PICTURED], seed),
        "curves.png": curves_figure(result.history),
    }
    for name, figure in figures.items():
        save_figure(figure, output / name)
    report = {
        "config": config.to_dict(),
        "stand_ins": ["mini model", *REWARDS, f"VGG19 ({config.vgg_weights})"],
        "held_out": {"photographs": photographs("test"), "crops": crops, "size": 128, "seed": seed},
        "means": {m: t.droplevel("model").to_dict("index") for m, t in summarize(frame).groupby(level="model")},
        "fine_tuned_minus_base": compare(frame, "base", "fine-tuned").to_dict("index"),
        "seconds": round(time.monotonic() - started, 1),
    }
    with replace_file(output / "report.json") as path:
        path.write_text(json.dumps(report, indent=2) + "\n")
    with replace_file(output / "table.txt") as path:
        path.write_text(table + "\n")
    typer.echo(f"\n{crops} held-out crops of 128 pixels, mean ± standard error over crops:\n\n{table}\n")
    typer.echo(f"{config.iterations} iterations, {report['seconds']:.0f} s in all")
    for name, what in {**_WRITTEN, "model": "fine-tuned model"}.items():
        typer.echo(f"{what + ':':18s}{output / name}")
