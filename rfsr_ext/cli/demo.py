"""``rfsr demo``: the whole method on the mini model, with pictures and a table to look at."""

import json
import time
from pathlib import Path

import pandas as pd
import torch
import typer

from rfsr_ext.cli.evaluate import difference_table, mean_table
from rfsr_ext.data import Sample, evaluation_crops, photographs
from rfsr_ext.evaluation import (
    compare,
    comparison_figure,
    curves_figure,
    enlarge_bicubic,
    evaluate,
    evaluate_bicubic,
    held_out_scorers,
    save_figure,
    summarize,
)
from rfsr_ext.files import check_unheld, save_text
from rfsr_ext.metrics import Judge, psnr
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
    """One row per sample: LR, bicubic, each model's result, truth, with what was measured under each tile."""
    lr, gt = (torch.stack([s[key] for s in samples]) for key in ("lr", "gt"))
    prompts = [s["prompt"] for s in samples]
    noise = generators(seed, range(len(samples)))
    iqa, judge = create_reward("mini-iqa"), Judge.from_pretrained()
    results = {"bicubic": enlarge_bicubic(lr, next(iter(models.values())).scale)}
    for name, model in models.items():
        results[name] = sample(model, lr.to(model.device), prompts, [g.clone_state() for g in noise]).cpu()
    columns = [[(image, f"{image.shape[2]}×{image.shape[1]} pixels") for image in lr]]
    for images in (*results.values(), gt):
        with torch.no_grad():
            scores = zip(iqa.score(images, prompts), judge.score(images), psnr(images, gt), strict=True)
        captions = [
            f"{iqa.name} {s:.2f} · judge {j:.0f}" + (f"\nPSNR {p:.1f} dB" if images is not gt else "")
            for s, j, p in scores
        ]
        columns.append(list(zip(images, captions, strict=True)))
    rows = [list(row) for row in zip(*columns, strict=True)]
    return comparison_figure(rows, ["low resolution", *results, "ground truth"])


def run_demo(output: Path, iterations: int | None, crops: int, seed: int) -> None:
    """Train with the ``mini`` preset, and once more without its style loss, and measure both on held-out photographs.

    Pictures, table, JSON and models go to ``output``.
    """
    started = time.monotonic()
    overrides = {"output_dir": str(output), "seed": seed} | ({"iterations": iterations} if iterations else {})
    config = RFSRConfig.load("mini", overrides)
    without = config.replace(style_loss="none", output_dir=str(output / "without-style"))
    check_unheld(output, tuple(_WRITTEN))
    samples = evaluation_crops(photographs("test"), 128, crops, called="--crops")
    typer.echo("RFSR on the mini model; its rewards and VGG19 are small stand-ins (see rfsr_ext/weights/README.md)")
    result, hacked = RFSRTrainer(config).train(), RFSRTrainer(without).train()

    base = load_model(config.model).to(result.model.device)
    models = {"base": base, "fine-tuned": result.model, "without style loss": hacked.model}
    scorers = held_out_scorers()
    frames = [evaluate(model, samples, scorers, seeds=(seed,), name=name) for name, model in models.items()]
    frame = pd.concat([evaluate_bicubic(samples, scorers, base.scale), *frames], ignore_index=True)
    differences = difference_table(frame, "base", ["fine-tuned", "without style loss"])
    table = f"{mean_table(frame)}\n\nAgainst base:\n\n{differences}"
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
        "minus_base": {n: compare(frame, "base", n).to_dict("index") for n in models if n != "base"},
        "seconds": round(time.monotonic() - started, 1),
    }
    save_text(output / "report.json", json.dumps(report, indent=2) + "\n")
    save_text(output / "table.txt", table + "\n")
    typer.echo(f"\n{crops} held-out crops of 128 pixels, mean ± standard error over crops:\n\n{table}\n")
    typer.echo(f"two runs of {config.iterations} iterations, {report['seconds']:.0f} s in all")
    for name, what in {**_WRITTEN, "model": "fine-tuned model"}.items():
        typer.echo(f"{what + ':':18s}{output / name}")
