"""RFSR with the real reward classes, tiny and random, and with everything rewards can be composed of."""

import logging
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState

from rfsr_ext import rewards
from rfsr_ext.files import load_tensors
from rfsr_ext.rewards import CallableReward, WeightedReward
from rfsr_ext.training import RFSRConfig, RFSRTrainer
from tests.rewards import tiny
from tests.training.conftest import Brightness, Pixels, make_tiny_model

COMPOSED = {"weight": 1.0, "cap": 2.0, "tags": "worst", "normalize": True}


@pytest.fixture
def published(monkeypatch, tmp_path):
    monkeypatch.setitem(rewards.PUBLISHED, "image-reward", lambda: tiny.OriginalImageReward().reward())
    monkeypatch.setitem(rewards.PUBLISHED, "clipiqa", lambda: tiny.clip_iqa(tmp_path))


@pytest.fixture(params=["no", "bf16"])
def mixed_precision(request):
    """accelerate remembers the precision of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield request.param
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("terms", [["image-reward"], ["clipiqa", "image-reward"]])
def test_one_iteration_in_each_window(settings, parts, published, terms, mixed_precision):
    if "clipiqa" in terms:
        pytest.importorskip("pyiqa", reason="CLIP-IQA needs the package pyiqa (pip install 'rfsr_ext[rewards]')")
    model = make_tiny_model()
    before = {name: p.clone() for name, p in model.unet.named_parameters()}
    changes = {
        "rewards": {name: COMPOSED for name in terms},
        "balance_rewards": True,
        "num_inference_steps": 4,
        "structure_window": [1, 1],
        "reward_window": [4, 4],
        "iterations": 2,
        "mixed_precision": mixed_precision,
    }
    given = {key: value for key, value in parts.items() if key != "rewards"}
    result = RFSRTrainer(RFSRConfig.from_dict(settings | changes), model, **given).train()
    assert list(result.history["window"]) == ["structure", "reward"]
    assert not result.history["skipped"].any() and (result.history["grad_norm"] > 0).all()
    logged = {f"reward/{name}" for name in terms}
    assert result.history.loc[result.history["window"] == "reward", sorted(logged)].notna().all().all()
    assert any(not torch.equal(p, before[name]) for name, p in result.model.unet.named_parameters())


def composed(settings, parts, **changes):
    terms = [
        WeightedReward(Brightness(), 1.0, cap=2.0, views=("1", "0.5", "crop-16"), normalize=True),
        WeightedReward(CallableReward(lambda x, p: x.var((1, 2, 3)), "contrast"), 0.5, steps=(5, 5), tags="mean"),
    ]
    config = RFSRConfig.from_dict(settings | {"balance_rewards": True} | changes)
    return RFSRTrainer(config, Pixels(), **parts | {"rewards": terms}).train()


def test_a_resumed_run_has_the_same_crops_and_statistics(settings, parts, tmp_path):
    whole = composed(settings, parts, structure_loss="none", output_dir=str(tmp_path / "whole"))
    composed(settings, parts, structure_loss="none", iterations=2)
    resumed = composed(settings, parts, structure_loss="none")
    ends = [
        load_tensors(sorted((Path(run.folder) / "checkpoints").glob("*.safetensors"))[-1]) for run in (whole, resumed)
    ]
    assert ends[0][1]["method"] == ends[1][1]["method"]
    assert ends[0][1]["method"]["reward_statistics"]["brightness"][0] is not None
    for name, tensor in ends[0][0].items():
        assert torch.equal(tensor, ends[1][0][name]), name
    assert whole.history.loc[whole.history["step"] == 4, "reward/contrast"].isna().all()
    assert whole.history.loc[whole.history["step"] == 5, "reward/contrast"].notna().all()


def held_out(settings, parts, tmp_path, values, **options):
    """What a trainer makes of a reward's held-out scores, first the base model's, and which it would keep."""
    term = WeightedReward(Brightness(), 2.0, **options)
    trainer = RFSRTrainer(
        RFSRConfig.from_dict(settings | {"style_loss": "none", "output_dir": str(tmp_path / str(options))}),
        Pixels(),
        **parts | {"rewards": [term]},
    )
    return [trainer.held_out._reward(pd.DataFrame({"brightness": scores})).mean() for scores in values]


def test_scores_beyond_their_cap_do_not_choose_the_best_weights(settings, parts, tmp_path):
    base, good, fooled = [0.1, 0.3], [0.8, 0.9], [0.4, 9.0]  # one image's excess would outweigh the other's failure
    plain, capped = (held_out(settings, parts, tmp_path, (base, good, fooled), **options)
                     for options in ({}, {"cap": 0.5}))  # fmt: skip
    assert plain == pytest.approx([0.4, 1.7, 9.4])
    assert capped == pytest.approx([0.4, 1.0, 0.9])
    standard = held_out(settings, parts, tmp_path, (base, good, fooled), normalize=True, cap=0.5)
    assert standard == pytest.approx([0, 1.3 / 0.1, 9 / 0.1])  # in deviations of the base model's scores
    assert held_out(settings, parts, tmp_path, ([0.1], [0.4]), normalize=True) == pytest.approx([0, 0.6])


def test_best_weights_stop_changing_where_every_score_has_reached_its_cap(settings, parts):
    options = {"structure_loss": "none", "style_loss": "none", "learning_rate": 3e-3, "iterations": 12}
    terms = [WeightedReward(Brightness(), 1.0, cap=-1.0)]  # reached before training
    result = RFSRTrainer(
        RFSRConfig.from_dict(settings | options | {"lambda_structure": 0.0}),
        Pixels(),
        **parts | {"rewards": terms},
    ).train()
    assert (result.validation["reward"] == -1).all() and result.best_iteration == 0


def test_a_resumed_run_must_have_the_same_rewards(settings, parts):
    composed(settings, parts, structure_loss="none", iterations=2)
    terms = [WeightedReward(Brightness(), 1.0)]
    config = RFSRConfig.from_dict(settings | {"balance_rewards": True, "structure_loss": "none"})
    trainer = RFSRTrainer(config, Pixels(), **parts | {"rewards": terms})
    with pytest.raises(
        ValueError, match="rewards must be those of the checkpoint, brightness, contrast, got brightness"
    ):
        trainer.train()


def test_a_judge_that_falls_while_published_rewards_rise_is_warned_of(settings, parts, published, tmp_path, caplog):
    pytest.importorskip("pyiqa", reason="CLIP-IQA needs the package pyiqa (pip install 'rfsr_ext[rewards]')")
    terms = [WeightedReward(tiny.clip_iqa(tmp_path), 1.0), WeightedReward(tiny.OriginalImageReward().reward(), 1.0)]

    def agrees(images, prompts):
        return sum(term.reward.score(images, prompts) for term in terms)

    judges = {"ally": agrees, "opponent": lambda images, prompts: -agrees(images, prompts)}
    changes = {"structure_loss": "none", "style_loss": "none", "learning_rate": 3e-3, "iterations": 8}
    with caplog.at_level(logging.WARNING):
        result = RFSRTrainer(
            RFSRConfig.from_dict(settings | changes), make_tiny_model(), **parts | {"rewards": terms, "judges": judges}
        ).train()
    first, last = result.validation.iloc[0], result.validation.iloc[-1]
    assert last["reward"] > first["reward"]
    assert last["reward"] == pytest.approx(last["clipiqa"] + last["image-reward"])
    warned = [record.getMessage() for record in caplog.records if "this is what reward hacking" in record.message]
    numbers = "({:.4g} to {:.4g})".format
    assert warned and not any("ally" in message for message in warned)
    assert warned[-1].startswith(
        f"iteration 8: the training reward has risen {numbers(first['reward'], last['reward'])} while the held-out "
        f"opponent has fallen {numbers(first['opponent'], last['opponent'])}"
    )


def test_the_gradient_trainer_refuses_rewards_without_a_gradient(settings, parts):
    flat = CallableReward(lambda x, p: x.mean((1, 2, 3)).round(), "steps", differentiable=False)
    with pytest.raises(ValueError, match="reward 'steps' has no gradient .* leave it to a preference trainer"):
        RFSRTrainer(RFSRConfig.from_dict(settings), Pixels(), **parts | {"rewards": [WeightedReward(flat, 1.0)]})
    assert not Path(settings["output_dir"]).exists()
    with pytest.raises(ValueError, match=r"steps of reward 'brightness' must overlap the reward window \[4, 5\]"):
        terms = [WeightedReward(Brightness(), 1.0, steps=(1, 2))]
        RFSRTrainer(RFSRConfig.from_dict(settings), Pixels(), **parts | {"rewards": terms})


def test_the_gradient_trainer_refuses_a_metric_whose_gradient_is_zero(settings, parts):
    pytest.importorskip("pyiqa", reason="PIQE needs the package pyiqa (pip install 'rfsr_ext[rewards]')")
    with pytest.raises(ValueError, match="reward 'pyiqa:piqe' has no gradient .* leave it to a preference trainer"):
        RFSRTrainer(
            RFSRConfig.from_dict(settings | {"rewards": {"pyiqa:piqe": 1.0}}),
            Pixels(),
            **{name: part for name, part in parts.items() if name != "rewards"},
        )
    assert not Path(settings["output_dir"]).exists()
