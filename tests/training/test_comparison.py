"""Ways of training side by side: their settings, and what is kept of them; trainings themselves are only counted."""

import sys
from types import SimpleNamespace

import pandas as pd
import pytest

from rfsr_ext.evaluation import Measure
from rfsr_ext.training import comparison
from rfsr_ext.training.comparison import ComparisonConfig, run_comparison
from tests.tiny import PixelModel
from tests.training.conftest import TinyData

SAMPLES = [TinyData()[i] for i in range(3)]
MEASURES = [Measure("brightness", lambda sr, gt, prompts: sr.mean((1, 2, 3)), label="1")]
CONFIG = {
    "iterations": 9, "seeds": 2, "results": 2, "full_reference": [], "no_reference": ["brightness"], "held_out": [],
    "ways": {"RFSR": ["mini"], "DP2O then RFSR": ["dp2o-mini", {"config": "mini", "learning_rate": 1e-4}]},
}  # fmt: skip


@pytest.fixture
def run(monkeypatch, tmp_path):
    """`run_comparison` whose trainings are only counted, and may be interrupted; nothing is measured."""
    made = SimpleNamespace(trained=[], stop=None)

    class Trainer:
        def __init__(self, config):
            self.config = config

        def train(self):
            if len(made.trained) == made.stop:
                raise KeyboardInterrupt
            made.trained.append((self.config.method, self.config.seed, self.config.iterations))
            return SimpleNamespace(seconds=2.0, history=range(self.config.iterations))

    monkeypatch.setattr(comparison, "create_trainer", Trainer)
    monkeypatch.setattr(comparison, "load_model", lambda path, **options: PixelModel(**options))

    def measure(name, model, samples, measures, results, folder):
        rows = [{"model": name, "image": i, "seed": s} for s in range(results) for i in range(len(samples))]
        return pd.DataFrame(rows)

    monkeypatch.setattr(comparison, "_measure", measure)

    def run(stop=None, samples=SAMPLES, measures=MEASURES, **changes):
        made.trained, made.stop = [], stop
        config = ComparisonConfig(**CONFIG | {"output_dir": str(tmp_path / "all")} | changes)
        return run_comparison(config, samples, measures)

    run.made, run.folder = made, tmp_path / "all"
    return run


def test_a_package_that_a_late_way_needs_is_missed_before_the_first(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match="^lora_rank needs the package peft; pip install"):
        run(ways={"RFSR": ["mini"], "LoRA": [{"config": "mini", "lora_rank": 8}]})
    assert not run.made.trained


def test_an_interrupted_comparison_goes_on_and_may_grow(run):
    with pytest.raises(KeyboardInterrupt):
        run(stop=2)
    assert run.made.trained == [("rfsr", 0, 9), ("dp2o", 0, 4)]
    frame = run()
    assert run.made.trained == [("rfsr", 0, 5), ("rfsr", 1, 9), ("dp2o", 1, 4), ("rfsr", 1, 5)]
    assert len(frame) == 5 * 3 * 2 and list(frame["model"].unique()) == ["base", "RFSR", "DP2O then RFSR"]
    costs = frame.groupby(["model", "training_seed"])[["training_seconds", "iterations"]].first()
    assert costs.loc[("DP2O then RFSR", 1)].tolist() == [4, 9] and costs.loc[("base", 0)].tolist() == [0, 0]
    again = run()
    assert not run.made.trained
    pd.testing.assert_frame_equal(frame, again, check_dtype=False)
    more = run(ways=CONFIG["ways"] | {"CCSR": ["ccsr-mini"]}, seeds=3)
    assert run.made.trained[:2] == [("ccsr-stage1", 0, 4), ("ccsr-stage2", 0, 5)] and len(run.made.trained) == 9
    assert set(more["model"]) == {*frame["model"], "CCSR"}


OTHER = {
    "iterations": ({"iterations": 8}, "rfsr/seed-0/step-1/training"),
    "batch_size": ({"settings": {"batch_size": 2}}, "rfsr/seed-0/step-1/training"),
    "base model": ({}, "base/seed-0/evaluation"),
    "results": ({"results": 3}, "base/seed-0/evaluation"),
    "samples": ({"samples": SAMPLES[:2]}, "base/seed-0/evaluation"),
    "measures": ({"measures": [Measure("brightness", MEASURES[0].score, label="2")]}, "base/seed-0/evaluation"),
}


@pytest.mark.parametrize("key", OTHER)
def test_what_other_settings_made_is_refused(run, key, monkeypatch):
    run(seeds=1)
    changes, place = OTHER[key]
    if key == "base model":
        monkeypatch.setattr(PixelModel, "fingerprint", lambda self: "another")
    said = key if key == "samples" else f"{key} .*, now .*"  # a digest tells a reader nothing
    with pytest.raises(
        ValueError, match=rf"all/{place}.csv' was made with other settings \({said}\); give another folder"
    ):
        run(seeds=1, **changes)
    assert not run.made.trained


def test_a_training_that_others_have_begun_is_refused_too(run):
    with pytest.raises(KeyboardInterrupt):
        run(stop=0)
    with pytest.raises(ValueError, match=r"made with other settings \(iterations 9, now 8\)"):
        run(iterations=8)


def test_what_follows_another_training_is_another(run):
    """The second step's own settings are the same."""
    run()
    for path in (run.folder / "dp2o-then-rfsr/seed-0/step-1").iterdir():
        path.unlink()
    _, second = CONFIG["ways"]["DP2O then RFSR"]
    ways = CONFIG["ways"] | {"DP2O then RFSR": [{"config": "dp2o-mini", "beta": 1.0}, second]}
    with pytest.raises(ValueError, match=r"step-2/training.csv' was made with other settings \(earlier training"):
        run(ways=ways)


WRONG = [
    ({"seconds": 1}, "one of seconds and iterations must be given, the other null, got 1.0 and 9"),
    ({"held_out": ["mini-iqa"]}, "held_out must name what no way is trained on, got mini-iqa"),
    ({"ways": {"A": ["mini"], "a!": ["mini"]}}, "ways must have names that differ in letters or digits"),
    ({"ways": {"Base": ["mini"]}}, "none of them base, got Base"),
    ({"ways": {"A": "mini"}}, "ways.A must be a list of steps, got 'mini'"),
    ({"ways": {"A": [{"seed": 1}]}}, "ways.A[0]: a step must be a preset, or such as {config: mini, learning_rate: 1e"),
    ({"ways": {"A": ["mini", {"config": "mini", "seed": 1}]}}, "ways.A[1]: step must leave seed to the comparison"),
    ({"settings": {"max_seconds": 1}}, "settings must leave max_seconds to the comparison, got 1"),
    ({"settings": {"betas": 1}}, "settings: unknown key 'betas'"),
    ({"ways": {"A": [{"config": "dp2o-mini", "rounds": 2}]}}, "ways.A[0]: rounds must be 1, got 2"),
    ({"iterations": 1}, "iterations must be at least 2, one for each training, got 1"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "sentence"), WRONG)
def test_sentences(changes, sentence):
    with pytest.raises(ValueError) as refused:
        ComparisonConfig(**CONFIG | changes)
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_the_preset_shares_its_seconds_evenly():
    config = ComparisonConfig.load("mini")
    assert len(config.ways) == 5 and config.seeds >= 3
    for way in config.ways:
        trainings = config.trainings(way, 1)
        assert sum(training.max_seconds for training in trainings) == pytest.approx(config.seconds)
        assert {training.seed for training in trainings} == {1}
        for before, after in zip(trainings, trainings[1:], strict=False):
            assert after.model == f"{before.output_dir}/model"
