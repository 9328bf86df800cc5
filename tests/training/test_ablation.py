"""A finished result is taken again only for the settings it was made with."""

import functools
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn

from rfsr_ext.models import ISRModel
from rfsr_ext.training import ablation
from rfsr_ext.training.config import RFSRConfig

SAMPLE = {"gt": torch.zeros(3, 8, 8), "lr": torch.zeros(3, 2, 2), "prompt": "a cat"}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """`ablate` whose training and measuring are only counted."""
    made = SimpleNamespace(trained=[], base=nn.Linear(1, 1))
    model = SimpleNamespace(
        fingerprint=lambda: str(made.base.weight.tolist()),
        recipe=SimpleNamespace(num_inference_steps=50),
        to=lambda device: None,
        check_size=functools.partial(ISRModel.check_size, SimpleNamespace(unit=8)),
    )

    class Trainer:
        def __init__(self, config):
            made.trained.append((config.seed, config.reward_window))

        def train(self):
            return SimpleNamespace(model=model)

    monkeypatch.setattr(ablation, "load_model", lambda name: model)
    monkeypatch.setattr(ablation, "RFSRTrainer", Trainer)
    monkeypatch.setattr(ablation, "evaluate", lambda *args, name, seeds: pd.DataFrame({"model": [name], "seed": seeds}))

    def run(config=None, samples=(SAMPLE,), scorers=("iqa",), variants=("rfsr", "structure-only"), seeds=(0,)):
        made.trained.clear()
        ablation.ablate(config or RFSRConfig(), samples, dict.fromkeys(scorers), variants, seeds, tmp_path)
        return len(made.trained)

    run.made, run.folder = made, tmp_path
    return run


def test_finished_results_are_taken_again(run):
    assert run() == 2
    assert run() == 0
    assert run(seeds=(0, 1)) == 2 and [seed for seed, _ in run.made.trained] == [1, 1]
    assert run(config=RFSRConfig(output_dir="elsewhere"), seeds=(0, 1)) == 0


def test_samples_that_would_have_to_be_padded_are_refused_before_the_work(run):
    odd = SAMPLE | {"gt": torch.zeros(3, 8, 12), "lr": torch.zeros(3, 2, 3)}
    with pytest.raises(ValueError, match="^size of the samples must be a multiple of 8 for this model, got 12$"):
        run(samples=(SAMPLE, odd))
    assert not list(run.folder.iterdir())


def test_a_package_that_a_late_variant_needs_is_missed_before_the_first(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    said = (
        r"^variant lora: lora_rank needs the package peft; pip install 'rfsr_ext\[lora\]', or leave it out of variants$"
    )
    with pytest.raises(ModuleNotFoundError, match=said):
        run(variants=("rfsr", "lora"))
    assert not run.made.trained
    assert run() == 2


OTHER = {
    "learning_rate": {"config": RFSRConfig(learning_rate=1e-3)},
    "iterations": {"config": RFSRConfig(iterations=7)},
    "scorers": {"scorers": ("iqa", "judge")},
}


@pytest.mark.parametrize("key", [*OTHER, "samples", "base model"])
def test_results_of_other_settings_are_refused(run, key):
    assert run() == 2
    options = OTHER.get(key, {})
    if key == "samples":
        options = {"samples": [SAMPLE | {"gt": torch.ones(3, 8, 8)}]}
    elif key == "base model":
        run.made.base = nn.Linear(1, 1)
    said = key if key == "samples" else f"{key} .*, now .*"  # a digest tells a reader nothing
    with pytest.raises(
        ValueError, match=rf"evaluation.csv' was made with other settings \({said}\); give another folder"
    ):
        run(**options)
    assert not run.made.trained


def test_a_result_without_settings_is_refused(run):
    run()
    (run.folder / "base-0" / "evaluation.json").unlink()
    with pytest.raises(ValueError, match="does not say what it was measured with"):
        run()


@pytest.mark.parametrize("preset", ["paper", "paper-pasd", "mini"])
@pytest.mark.parametrize("name", ablation.VARIANTS)
def test_every_variant_is_a_configuration(name, preset):
    config, changes = RFSRConfig.load(preset), ablation.VARIANTS[name]
    kept = {key: value for key, value in changes.items() if "window" not in key and not isinstance(value, int)}
    changed = ablation.variant(name, config, config.num_inference_steps or 50)
    assert changed.to_dict() | kept == changed.to_dict() and (changed == config) == (name == "rfsr")


@pytest.mark.parametrize(
    ("name", "steps", "windows"),
    [
        ("structure-1-40", 50, ([1, 40], [50, 50])),
        ("structure-1-40", 10, ([1, 8], [10, 10])),
        ("reward-21-50", 20, ([1, 20], [9, 20])),
        ("everywhere", 7, ([1, 7], [1, 7])),
    ],
)
def test_windows_keep_their_proportions(name, steps, windows):
    config = RFSRConfig(num_inference_steps=steps, structure_window=[1, steps], reward_window=[steps, steps],
                        allow_overlap=True)  # fmt: skip
    changed = ablation.variant(name, config, steps)
    assert (list(changed.structure_window), list(changed.reward_window)) == windows


def test_windows_in_another_unit_are_refused():
    config = RFSRConfig(window_unit="noise", structure_window=[0.6, 1.0], reward_window=[0.0, 0.2])
    with pytest.raises(ValueError, match="variant everywhere needs windows counted in steps, got window_unit 'noise'"):
        ablation.variant("everywhere", config, 50)
    assert ablation.variant("no-style", config, 50).style_loss == "none"
