"""``rfsr compare``: ways of training side by side, as tables, pictures and curves."""

import shlex
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import typer
import yaml

from rfsr_ext.cli.config import choose_device
from rfsr_ext.data import Sample, evaluation_crops, photographs
from rfsr_ext.data.manifest import versions
from rfsr_ext.evaluation import best_of_figure, comparison_figure, create_measures, enlarge_bicubic, save_figure
from rfsr_ext.evaluation.ways import best_of_ways, markdown_table, reward_ways, ways_table
from rfsr_ext.files import save_table, save_text
from rfsr_ext.rewards.ranking import HybridReward
from rfsr_ext.training.comparison import BASE, ComparisonConfig, run_comparison, shown_images

__all__ = ["compare_ways"]


def compare_ways(source: str, overrides: dict[str, Any]) -> None:
    """Train and measure every way, or what is left of it; tables and pictures land in ``output_dir``."""
    config, device = ComparisonConfig.load(source, overrides), choose_device()
    samples = evaluation_crops(photographs("test"), config.size, config.crops, called="crops")
    measures = create_measures(config.full_reference, config.no_reference, device)
    measures += create_measures((), config.held_out, device)
    lower_better = {measure.name for measure in measures if measure.lower_better}
    rows = run_comparison(config, samples, measures, device)
    frame = reward_ways(rows, HybridReward(config.full_reference, config.no_reference), lower_better)
    scores = tuple(dict.fromkeys(("psnr", "ssim", "low_ssim", *(measure.name for measure in measures))))
    table = ways_table(frame, scores, BASE)
    curves = [best_of_ways(frame, name, name in lower_better) for name in ("reward", *config.held_out)]
    output, curves = Path(config.output_dir), pd.concat(curves, ignore_index=True)
    text = _text(config, table, lower_better)
    for name, part in (("comparison", frame), ("table", table), ("best_of", curves)):
        save_table(output / f"{name}.csv", part)
    save_text(output / "comparison.md", text)
    save_figure(_pictures(config, samples), output / "comparison.png")
    save_figure(best_of_figure(curves), output / "best_of.png")
    typer.echo(text)
    typer.echo(f"tables and pictures: {output}")


def _text(config: ComparisonConfig, table: pd.DataFrame, lower_better: set[str]) -> str:
    """The result as Markdown: what was compared and by which command, both tables, and all settings."""
    cost = f"{config.seconds:g} s" if config.iterations is None else f"{config.iterations} iterations"
    seeds = ", ".join(map(str, range(config.seeds)))
    reward = ", ".join((*config.full_reference, *config.no_reference))
    lower = ", ".join((*sorted(lower_better), "spread (g_std, l_std) and cost"))
    held_out = f" No way is trained on {', '.join(config.held_out)}." if config.held_out else ""
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"""# Ways of training {config.model}

`{shlex.join(["rfsr", *sys.argv[1:]])}`

{config.crops} held-out crops of {config.size} pixels, {config.results} results for each; training seeds {seeds},
{cost} for each way and seed. Means ± standard error over crops and seeds together. `reward` is made of {reward},
on one scale for all ways.{held_out} Lower is better for {lower}.

{markdown_table(table)}

## Against {BASE}

Paired by crop; bold beyond twice the error, as one in twenty is by chance.

{markdown_table(table[table["model"] != BASE], difference=True)}

## Settings

{made}; {torch.get_num_threads()} threads.

```yaml
{yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True, default_flow_style=None)}```
"""


def _pictures(config: ComparisonConfig, samples: list[Sample]):
    """One row per held-out crop: LR image, bicubic enlargement, the first result of each way, ground truth."""
    ways = shown_images(config)
    count = len(ways[BASE])
    scale = samples[0]["gt"].shape[-1] // samples[0]["lr"].shape[-1]
    rows = []
    for i, sample in enumerate(samples[:count]):
        images = [sample["lr"], enlarge_bicubic(sample["lr"][None], scale)[0]]
        images += [*(of_way[i] for of_way in ways.values()), sample["gt"]]
        rows.append([(image, "") for image in images])
    return comparison_figure(rows, ["low resolution", "bicubic", *ways, "ground truth"], tile=200)
