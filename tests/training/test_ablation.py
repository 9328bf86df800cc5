"""A finished result is taken again only for the settings it was made with."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn

from rfsr_ext.training import ablation
from rfsr_ext.training.config import RFSRConfig

SAMPLE = {"gt": torch.zeros(3, 8, 8), "lr": torch.zeros(3, 2, 2), "prompt": "a cat"}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """`ablate` whose training and measuring are only counted."""
    made = SimpleNamespace(trained=[], base=nn.Linear(1, 1))
    model = SimpleNamespace(fingerprint=lambda: str(made.base.weight.tolist()))

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
    with pytest.raises(
        ValueError, match=rf"evaluation.csv' was made with other settings \({key} .*, now .*another folder"
    ):
        run(**options)
    assert not run.made.trained


def test_a_result_without_settings_is_refused(run):
    run()
    (run.folder / "base-0" / "evaluation.json").unlink()
    with pytest.raises(ValueError, match="does not say what it was measured with"):
        run()


def test_every_variant_is_a_configuration():
    config = RFSRConfig()
    for changes in ablation.VARIANTS.values():
        changes = {key: value for key, value in changes.items() if not (key == "rewards" and isinstance(value, int))}
        assert config.replace(**changes).to_dict() | changes == config.replace(**changes).to_dict()
