"""DP2O on models of one convolution and on tiny ones of every kind."""

import json
import logging
import math
import random
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from rfsr_ext.data.candidates import CandidateFolder
from rfsr_ext.evaluation import Measure
from rfsr_ext.models import ControlNetISRModel
from rfsr_ext.training import load_config
from rfsr_ext.training.dp2o import DP2OConfig, DP2OTrainer, PreferencePairs
from rfsr_ext.training.dp2o.method import draw_timesteps
from rfsr_ext.training.kept import read_seconds
from rfsr_ext.training.setup import as_reference
from tests import launching
from tests.models.released.dp2o import tiny_flux
from tests.tiny import sd_scheduler, tiny_model
from tests.training.conftest import FewSamples, Pixels, TinyData, assert_same_state, end_state

HERE = Path(__file__).parent


def measures():
    """How near to the truth, and how bright."""
    return [
        Measure("distance", lambda sr, gt, prompts: (sr - gt).square().mean((1, 2, 3)), lower_better=True),
        Measure("brightness", lambda sr, gt, prompts: sr.mean((1, 2, 3))),
    ]


def parts():
    data = TinyData()
    return {
        "dataset": data,
        "measures": measures(),
        "validation": [data[i] for i in range(500, 503)],
        "judges": {"darkness": lambda images, prompts: -images.mean((1, 2, 3))},
        "test": [],
    }


@pytest.fixture
def settings(tmp_path):
    return {
        "images": 4, "candidates": 6, "selected": 2, "full_reference": ["distance"], "no_reference": ["brightness"],
        "crop_size": 32, "batch_size": 4, "iterations": 4, "learning_rate": 1e-3, "ema_decay": 0.5, "beta": 100.0,
        "validation_seeds": 2, "validate_every": 2, "checkpoint_every": 1, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip


def run(settings, model=None, **changes):
    given = parts() | {name: changes.pop(name) for name in list(changes) if name in parts()}
    return DP2OTrainer(DP2OConfig.from_dict(settings | changes), model or Pixels(), **given).train()


# -- the method -------------------------------------------------------------------------------------------------------


def predictions(kind):
    scheduler = type(sd_scheduler()).from_config(sd_scheduler().config, prediction_type=kind)
    return tiny_model(num_inference_steps=3, scheduler=scheduler)


MODELS = {
    "noise": lambda: predictions("epsilon"),
    "velocity": lambda: predictions("v_prediction"),
    "flow": lambda: tiny_flux(num_inference_steps=3, trained={"controlnet": ""}),
    "from the LR image": lambda: tiny_model(num_inference_steps=3, noising="to-start", temperature=0.5),
}


@pytest.mark.parametrize("kind", MODELS)
def test_winners_are_learned_and_losers_unlearned(kind, settings):
    """From the reference on, with the same noise and timestep for both, and the pair's own condition."""
    trainer = DP2OTrainer(DP2OConfig.from_dict(settings | {"candidates": 4, "images": 2}), MODELS[kind](), **parts())
    method, held_out, loop = trainer._round(1)
    batch = next(iter(torch.utils.data.DataLoader(loop.dataset, 4, sampler=range(4))))
    seen = []
    predict = type(trainer.model).predict

    class Watched(type(trainer.model)):
        def predict(self, latents, timestep, condition):
            seen.append((latents, timestep, condition))
            return predict(self, latents, timestep, condition)

    trainer.model.__class__ = trainer.original.__class__ = Watched
    optimizer = torch.optim.Adam([p for p in trainer.model.trained_parameters().values()], 1e-3)
    first, logs = method.loss("model", batch, 0, range(4))
    assert first.item() == pytest.approx(math.log(2) * batch["weight"].mean().item(), rel=1e-5)
    assert logs["drift"] == pytest.approx(0, abs=1e-6)  # products may round otherwise at another address
    (latents, timesteps, condition), other = seen
    assert torch.equal(timesteps[:4], timesteps[4:]) and condition.prompts[:4] == condition.prompts[4:]
    assert all(torch.equal(a, b) for a, b in zip((latents, timesteps), other[:2], strict=True))
    alpha, sigma = method.process.level(timesteps[:4])
    first_alpha, first_sigma = method.process.level(method.process.timesteps[0])
    start = trainer.model.encode(condition.image)
    for i in range(4):  # what is left without the images is the same noise for both
        clean = torch.stack([batch["winner"][i], batch["loser"][i]])
        noise = (latents[[i, i + 4]] - alpha[i].float() * clean) / sigma[i].float()
        if trainer.model.recipe.noising == "to-start":
            noise = noise - (start[i] - clean) * (first_alpha / first_sigma).float()
        torch.testing.assert_close(noise[0], noise[1], atol=1e-2, rtol=1e-3)
        assert noise.std().item() == pytest.approx(trainer.model.recipe.temperature, rel=0.2)
    for _ in range(6):
        loss, logs = method.loss("model", batch, 0, range(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < first and logs["accuracy"] > 0.5 and logs["winner"] < logs["loser"] and logs["drift"] > 0


def test_pairs_are_drawn_evenly_and_carry_their_weights(settings):
    trainer = DP2OTrainer(DP2OConfig.from_dict(settings), Pixels(), **parts())
    _, _, loop = trainer._round(1)
    dataset = loop.dataset
    candidates, pairs = dataset.candidates, dataset.pairs
    where = {}
    for group in pairs.groups.tolist():
        latents = candidates.latents(group)[0].float()
        for i, winner in enumerate(pairs.winners[group].tolist()):
            for j, loser in enumerate(pairs.losers[group].tolist()):
                key = (latents[winner].sum().item(), latents[loser].sum().item())
                where[key] = pairs.weights[group, i, j].item()
    drawn = [dataset[i] for i in range(320)]
    found = [(sample["winner"].sum().item(), sample["loser"].sum().item()) for sample in drawn]
    counts = pd.Series(found).value_counts()
    assert len(counts) == len(where) == 16 and counts.min() > 5 and counts.max() < 45  # 20 each
    for key, sample in zip(found, drawn, strict=True):
        assert sample["weight"].item() == pytest.approx(where[key])
    assert torch.equal(PreferencePairs(candidates, pairs, 0)[7]["winner"], dataset[7]["winner"])


def test_timesteps_are_distributed_as_they_are_said_to_be():
    rngs = [np.random.default_rng(i) for i in range(4000)]
    process = tiny_model(num_inference_steps=4).process()
    uniform = draw_timesteps(process, 1000, "uniform", rngs)
    assert 0 <= uniform.min() < 10 and 990 < uniform.max() <= 999
    assert abs(uniform.float().mean() - 499.5) < 3 * 289 / 4000**0.5
    own = draw_timesteps(process, 1000, "sampler", rngs)
    assert set(own.tolist()) == set(process.timesteps.tolist())
    flow = draw_timesteps(tiny_flux().process(), 1000, "logit-normal", rngs).float() / 1000
    assert flow.min() > 0 and flow.max() <= 1
    logits = (flow / (1 - flow)).log()
    assert abs(logits.mean()) < 0.1 and abs(logits.std() - 1) < 0.1


def test_a_missing_package_is_missed_before_the_first_candidate(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    config = DP2OConfig.from_dict(settings | {"lora_rank": 2})
    with pytest.raises(ModuleNotFoundError, match="^lora_rank needs the package peft; pip install"):
        DP2OTrainer(config, tiny_model(num_inference_steps=3), **parts())


def test_adapters_switched_off_are_the_reference(settings, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed (pip install 'rfsr_ext[lora]')")
    model = tiny_model(num_inference_steps=3)
    untouched = tiny_model(num_inference_steps=3)
    result = run(settings, model, lora_rank=2, learning_rate=1e-2, iterations=3, images=2)
    first, *_, last = result.history.to_dict("records")
    assert first["drift"] == 0 < last["drift"]
    saved = ControlNetISRModel.from_pretrained(result.folder / "model")
    names = [name for name, p in saved.networks["unet"].named_parameters()]
    assert names == [name for name, _ in untouched.networks["unet"].named_parameters()]
    config = DP2OConfig.from_dict(settings | {"lora_rank": 2, "images": 2, "output_dir": str(tmp_path / "other")})
    trainer = DP2OTrainer(config, tiny_model(num_inference_steps=3), **parts())
    trainer._trained()
    z, condition = torch.randn(1, 4, 16, 16), untouched.condition(TinyData()[0]["lr"][None], ["cat"])
    for parameter in trainer.model.trained_parameters().values():
        parameter.data += 0.1 if parameter.requires_grad else 0.0
    method = trainer._round(1)[0]
    with torch.no_grad(), as_reference(trainer.model, method.reference) as reference:
        before = reference.predict(z, torch.tensor(500), condition)
    torch.testing.assert_close(before, untouched.predict(z, torch.tensor(500), condition))
    assert not torch.equal(before, trainer.model.predict(z, torch.tensor(500), condition))


# -- the run ----------------------------------------------------------------------------------------------------------


def test_results_become_better_and_everything_is_written(settings):
    data = TinyData()
    result = run(settings, iterations=60, validate_every=60, checkpoint_every=60, batch_size=8, images=8, beta=500.0,
                 learning_rate=3e-3, report_seeds=4, test=[data[i] for i in range(600, 604)])  # fmt: skip
    first, last = result.validation.iloc[0], result.validation.iloc[-1]
    assert last["reward"] > first["reward"] + 0.1 and last["reward_worst"] > first["reward_worst"] + 0.1
    assert first["reward_worst"] <= first["reward"] <= first["reward_best"]
    assert result.history["accuracy"].iloc[-10:].mean() > 0.6
    assert {"margin", "winner", "loser", "drift"} <= set(result.history)
    folder = result.folder
    for name in ("results.csv", "changes.csv", "best_of.csv", "best_of.png", "worst_and_best.png", "history.csv"):
        assert (folder / name).is_file(), name
    changes = pd.read_csv(folder / "changes.csv", index_col="metric")
    assert changes.loc["reward worst", "difference"] > 0
    assert "reward worst" in result.summary and "fine-tuned model: " in result.summary
    curves = pd.read_csv(folder / "best_of.csv")
    of = curves[curves["quantity"].eq("reward") & curves["model"].eq("base")].pivot(index="count", columns="of")[
        "value"
    ]
    assert of["best"].is_monotonic_increasing and of["worst"].is_monotonic_decreasing
    results = pd.read_csv(folder / "results.csv")
    worst = results[results["model"].eq("base")].groupby("image")["reward"].min().mean()
    assert of["worst"].iloc[-1] == pytest.approx(worst)


def test_a_resumed_run_ends_as_an_uninterrupted_one(settings, tmp_path):
    whole = run(settings, output_dir=str(tmp_path / "whole"))
    assert whole.seconds > read_seconds(whole.folder / "preferences.seconds") > 0  # sampling and scoring count
    run(settings, iterations=2)
    resumed = run(settings)
    assert_same_state(end_state(whole.folder), end_state(resumed.folder))
    drop = ["seconds"]
    assert whole.history.drop(columns=drop).equals(resumed.history.drop(columns=drop))
    pd.testing.assert_frame_equal(whole.validation, resumed.validation)


def test_later_rounds_sample_from_the_tuned_model(settings, tmp_path):
    once = run(settings, iterations=2, output_dir=str(tmp_path / "once"))
    twice = run(settings, iterations=2, rounds=2)
    folder = Path(settings["output_dir"])
    assert_same_state(end_state(once.folder), end_state(folder / "round-1"))
    first, second = (CandidateFolder(folder / f"preferences/round-{i}") for i in (1, 2))
    assert not torch.equal(first.latents(0)[0], second.latents(0)[0])
    manifests = [json.loads((x.folder / "manifest.json").read_text())["settings"] for x in (first, second)]
    assert manifests[0]["model"] == Pixels().fingerprint() != manifests[1]["model"]
    assert twice.history["drift"].iloc[0] > 0  # against the base model
    again = run(settings, iterations=2, rounds=2)  # nothing is left to do
    assert_same_state(end_state(twice.folder), end_state(again.folder))
    begun = run(settings, iterations=2, rounds=2, reference="round", output_dir=str(tmp_path / "begun"))
    assert begun.history["drift"].iloc[0] == 0


@pytest.mark.parametrize(("winner", "warns"), [([0.01, 0.02, 0.015], True), ([-0.01, -0.02, -0.015], False)])
def test_warns_when_the_reward_rises_by_leaving_the_reference(settings, caplog, winner, warns):
    trainer = DP2OTrainer(DP2OConfig.from_dict(settings | {"full_reference": []}), Pixels(), **parts())
    held_out = trainer._round(1)[1]
    held_out.history = lambda: [
        {"iteration": i + 1, "winner": w, "drift": 0.1, "skipped": False} for i, w in enumerate(winner)
    ]
    held_out.measure(0)
    trainer.model.networks["network"].bias.data += 0.3  # brighter
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        held_out.measure(3)
    assert ("the reward rises by leaving the reference" in caplog.text) == warns
    assert "held-out darkness has fallen" in caplog.text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"selected": 4}, "candidates must be at least twice selected (4)"),
        ({"full_reference": [], "no_reference": []}, "must name at least one metric"),
        ({"reference": "round", "lora_rank": 2}, "reference must be base with lora_rank"),
        ({"crop_size": 30}, "crop_size must be a whole number"),
        ({"no_reference": ["brightness", "contrast"]}, "scores must hold 'contrast', got distance, brightness"),
        ({"dataset": FewSamples(3)}, "got IndexError(3) for 3"),
    ],
)
def test_sentences(settings, changes, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        run(settings, **changes)


def test_candidates_that_are_all_alike_are_refused(settings):
    same = [Measure("distance", lambda sr, gt, prompts: torch.ones(len(sr)))]
    with pytest.raises(ValueError, match="each of the 4 images has equal rewards for all its 6 candidates"):
        run(settings, measures=same, no_reference=[])


def test_presets_hold_the_published_settings():
    sd2, flux = load_config("dp2o-sd2"), load_config("dp2o-flux")
    assert (sd2.model, sd2.candidates, sd2.selected) == ("c-sd2", 32, 8)
    assert (flux.model, flux.candidates, flux.selected) == ("c-flux", 64, 4)
    for config in (sd2, flux):
        assert (config.images, config.batch_size, config.iterations) == (30_000, 1024, 1000)
        assert (config.beta, config.beta_convention, config.learning_rate) == (5000, "half-mean", 2e-5)
        assert config.model_options == {"trained": {"controlnet": ""}}
        assert len(config.full_reference) == 3 and len(config.no_reference) == 6
        assert config.intra_group_weight and config.inter_group_weight and config.reward_scope == "group"


# -- in processes of their own ----------------------------------------------------------------------------------------


def results(folder):
    """Everything that must be the same bits."""
    found = {path: path.read_bytes() for path in folder.rglob("latents.safetensors")}
    found |= {path: path.read_bytes() for path in folder.rglob("scores.safetensors")}
    found |= {path: path.read_bytes() for path in (folder / "model").rglob("*.safetensors")}
    return {path.relative_to(folder): content for path, content in found.items()}


@pytest.mark.slow
def test_killed_while_it_samples_scores_and_trains_it_ends_as_if_it_had_not_been(tmp_path):
    whole = launching.start_alone(HERE / "run_dp2o.py", tmp_path / "whole", 12)
    assert whole.wait() == 0, whole.stderr.read()
    rng = random.Random(0)
    stages = ["preferences/round-1/*/latents*", "checkpoints/*", "preferences/round-2/*/latents*", None]
    kills = 0
    for stage in stages:
        process = launching.start_alone(HERE / "run_dp2o.py", tmp_path / "killed", 12)
        if stage is not None:  # at a random moment of the stage
            while process.poll() is None and not list((tmp_path / "killed").glob(f"**/{stage}")):
                time.sleep(0.005)
            time.sleep(rng.random() * 0.05)
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
        else:
            assert process.wait() == 0, process.stderr.read()
    assert kills == 3
    assert len(results(tmp_path / "whole")) > 10
    assert results(tmp_path / "whole") == results(tmp_path / "killed")
    assert_same_state(end_state(tmp_path / "whole"), end_state(tmp_path / "killed"))


@pytest.mark.slow
def test_two_processes_do_as_one(tmp_path):
    one = launching.start_alone(HERE / "run_dp2o.py", tmp_path / "one", 6)
    assert one.wait() == 0, one.stderr.read()
    launching.ended_well(launching.start("ddp.yaml", HERE / "run_dp2o.py", tmp_path / "two", 6, 2))
    # each of the two has sampled and scored its half, and says so itself
    shares = [json.loads(path.read_text()) for path in sorted((tmp_path / "two").glob("share-*.json"))]
    assert [share["processes"] for share in shares] == [2, 2]
    assert all(share["sampled"] == share["scored"] > 0 for share in shares)
    found = [results(tmp_path / name) for name in ("one", "two")]
    first = [path for path in found[0] if "round-1" in str(path)]
    assert len(first) > 4 and all(found[0][path] == found[1][path] for path in first)
    curves = [pd.read_csv(tmp_path / name / "history.csv") for name in ("one", "two")]
    pd.testing.assert_series_equal(curves[0]["loss"], curves[1]["loss"], rtol=1e-3, atol=1e-6)
    pd.testing.assert_series_equal(curves[0]["grad_norm"], curves[1]["grad_norm"], rtol=1e-2, atol=1e-6)
