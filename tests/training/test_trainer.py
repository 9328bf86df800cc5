import errno
import json
import logging
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline

from rfsr_ext.files import load_tensors, save_tensors
from rfsr_ext.models import ControlNetISRModel
from rfsr_ext.rewards import WeightedReward
from rfsr_ext.sampling import sample
from rfsr_ext.training import NonFiniteLossError, RFSRConfig, RFSRTrainer, setup
from rfsr_ext.training.held_out import HeldOut
from tests import launching
from tests.training import run_tiny
from tests.training.conftest import Brightness, FewSamples, Pixels, assert_same_state, end_state, make_tiny_model


def run(settings, parts, model=None, **changes):
    config = RFSRConfig.from_dict(settings | changes)
    return RFSRTrainer(config, model or Pixels(), **parts).train()


def test_the_reward_rises_and_everything_is_written(settings, parts):
    changes = {"iterations": 6, "validate_every": 6, "structure_loss": "none", "style_loss": "none"}
    result = run(settings, parts, make_tiny_model(), learning_rate=1e-2, **changes)
    first, last = result.validation.iloc[0], result.validation.iloc[-1]
    assert last["brightness"] > first["brightness"] + 0.02
    assert result.best_iteration > 0
    assert len(result.history) == 6
    assert set(result.history["step"]) == {4, 5}
    assert not any(p.requires_grad for p in result.model.unet.parameters())
    folder = result.folder
    assert pd.read_csv(folder / "history.csv").shape[0] == 6
    assert json.loads((folder / "config.json").read_text())["iterations"] == 6
    assert list(folder.rglob("events.out.tfevents*"))
    assert not list(folder.rglob("*.partial"))
    # what was saved is the averaged model, and a stock pipeline opens it
    reopened = ControlNetISRModel.from_pretrained(folder / "model")
    lr, prompts = parts["validation"][0]["lr"][None], ["cat"]
    args = (lr, prompts, torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        sample(reopened, *args), sample(result.model, lr, prompts, torch.Generator().manual_seed(0))
    )
    StableDiffusionControlNetPipeline.from_pretrained(folder / "model", safety_checker=None)


@pytest.mark.parametrize(("level", "scale"), [(1, 2), (2, 4), (3, 8)])
def test_the_structure_level_is_that_of_the_band(settings, parts, level, scale):
    """The LL band of level n holds 2ⁿ times the means of squares with sides of 2ⁿ pixels."""
    config = RFSRConfig.from_dict(settings | {"structure_level": level})
    images, gt = torch.rand(2, 2, 3, 16, 16)
    wanted = scale * torch.nn.functional.avg_pool2d(images - gt, scale).abs().mean()
    torch.testing.assert_close(RFSRTrainer(config, Pixels(), **parts).objective.structure_loss(images, gt), wanted)


def test_dwt_only_draws_early_steps_alone(settings, parts):
    result = run(settings, parts | {"rewards": []}, reward_window=None, rewards={})
    assert set(result.history["step"]) <= {1, 2}
    assert result.history["structure"].notna().all()


def test_lora_trains_adapters_and_its_base_is_the_reference(settings, parts):
    model = make_tiny_model()
    before = {name: p.clone() for name, p in model.unet.named_parameters()}
    trainer = RFSRTrainer(
        RFSRConfig.from_dict(settings | {"lora_rank": 2, "style_loss": "kl", "learning_rate": 1e-2, "iterations": 3}),
        model,
        **parts,
    )
    assert all("lora_" in name for name in trainer.loop.states["model"].parameters)
    with setup.as_reference(model, trainer.objective.reference):
        condition = model.condition(parts["validation"][0]["lr"][None], [""])
        z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        base = model.predict(z, torch.tensor(500), condition)
    result = trainer.train()
    from peft import PeftModel

    for folder in ("model", "best"):  # beside the merged model peft's own files
        merged = ControlNetISRModel.from_pretrained(result.folder / folder).networks["unet"]
        adapters = result.folder / f"{folder}-adapters" / "unet"
        opened = PeftModel.from_pretrained(make_tiny_model().networks["unet"], adapters).merge_and_unload()
        for name, parameter in opened.state_dict().items():
            torch.testing.assert_close(parameter, merged.state_dict()[name])
    assert not any("lora_" in name for name, _ in result.model.unet.named_parameters())  # merged
    assert result.model.unet.state_dict().keys() == before.keys()
    assert any(not torch.equal(p, before[name]) for name, p in result.model.unet.named_parameters())
    untouched = make_tiny_model()
    torch.testing.assert_close(base, untouched.predict(z, torch.tensor(500), condition))


def test_lora_targets_must_be_there(tiny_model):
    pytest.importorskip("peft", reason="the extra lora is not installed")
    with pytest.raises(
        ValueError, match="lora_targets must name modules of the unet, such as conv, .* got nothing, q$"
    ):
        setup.add_adapters(tiny_model, 2, ("nothing", "q"))
    with pytest.raises(
        ValueError, match="lora_targets must name modules of the unet or controlnet, such as to_k, .* got to_kk$"
    ):
        setup.add_adapters(tiny_model, 2, ("to_q", "to_kk"))


def test_lora_over_a_base_in_half_precision_needs_no_second_copy(settings, parts):
    """The base model, which is the reference, is held in bfloat16; what is trained, its moments and average are not."""
    model = make_tiny_model().to("cpu", torch.bfloat16)
    changes = {"lora_rank": 2, "iterations": 2, "gradient_checkpointing": True, "style_loss": "kl"}
    trainer = RFSRTrainer(RFSRConfig.from_dict(settings | changes), model, **parts)
    assert trainer.objective.reference is None
    state = trainer.loop.states["model"]
    assert {p.dtype for p in state.parameters.values()} == {torch.float32}
    frozen = {p.dtype for m in model.networks.values() for p in m.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    before = {name: p.clone() for name, p in state.parameters.items()}
    history = trainer.train().history
    assert not history["skipped"].any() and history["loss"].notna().all()
    assert any(not torch.equal(p, before[name]) for name, p in state.parameters.items())


def test_a_resumed_run_ends_as_an_uninterrupted_one(settings, parts, tmp_path):
    whole = run(settings, parts, make_tiny_model(), iterations=3, output_dir=str(tmp_path / "whole"))
    run(settings, parts, make_tiny_model(), iterations=2)
    resumed = run(settings, parts, make_tiny_model(), iterations=3)
    assert_same_state(end_state(whole.folder), end_state(resumed.folder))
    columns = ["iteration", "step", "loss", "grad_norm"]
    assert whole.history[columns].equals(resumed.history[columns])


def count_evaluations(model):
    """The model, and a list that gets a number of images for every evaluation by it or by its reference."""
    evaluations, predict = [], type(model).predict

    class Counting(type(model)):
        def predict(self, latents, timestep, condition):
            evaluations.append(len(latents))
            return predict(self, latents, timestep, condition)

    model.__class__ = Counting
    return model, evaluations


def steps_drawn(settings, parts, points, count):
    config = RFSRConfig.from_dict(settings | {"points_per_rollout": points, "iterations": 1200, "checkpoint_every": 12})
    method = RFSRTrainer(config, make_tiny_model(), **parts).method
    method.steps = list(range(101, 101 + count))
    return np.array([method.draw_step(k) for k in range(1200)])


def test_one_point_a_rollout_is_the_papers_draw(settings, parts):
    wanted = [np.random.default_rng((0, k, 2)).choice(range(101, 131)) for k in range(1200)]
    assert steps_drawn(settings, parts, 1, 30).tolist() == wanted


def test_points_of_a_rollout_are_distributed_as_the_papers(settings, parts):
    """Each step as likely as any other, in order and never twice within a trajectory, each with its share of both."""
    for points in (3, 4):
        steps = steps_drawn(settings, parts, points, 30)
        counts = np.bincount(steps - 101, minlength=30)
        assert abs(counts - 40).max() < 25  # 4 standard deviations of independent draws
        groups = steps.reshape(-1, points)
        assert (np.diff(groups, axis=1) > 0).all()
        early = (groups <= 120).sum(axis=1)
        assert set(early) == ({2} if points == 3 else {2, 3})


def test_iterations_share_a_trajectory_and_resume_to_the_same_bits(settings, parts, tmp_path):
    shared = settings | {"points_per_rollout": 2, "gradient_accumulation_steps": 2}
    model, evaluations = count_evaluations(Pixels())
    trainer = RFSRTrainer(RFSRConfig.from_dict(shared | {"output_dir": str(tmp_path / "whole")}), model, **parts)
    asked, dataset = [], trainer.loop.dataset.dataset
    trainer.loop.dataset.dataset = type("", (), {"__getitem__": lambda _, i: asked.append(i) or dataset[i]})()
    trainer.loop.held_out = None
    history = trainer.loop.train()
    steps = history["step"].to_numpy().reshape(3, 2)
    assert (np.diff(steps) > 0).all()
    # up to the last trained step once each, with one more by the reference in the reward window; 2 parts of one image
    assert evaluations == [1] * 2 * int(steps[:, 1].sum() + (steps >= 4).sum())
    assert asked == list(range(6))  # three batches of two

    run(shared, parts, iterations=2)
    run(shared, parts)
    assert_same_state(end_state(tmp_path / "whole"), end_state(settings["output_dir"]))


def test_resume_refuses_other_settings_and_other_models(settings, parts):
    run(settings, parts, iterations=2)
    saved = end_state(settings["output_dir"])
    with pytest.raises(ValueError, match=r"made with other settings \(ema_decay\)"):
        run(settings, parts, ema_decay=0.75)
    moved = Pixels()
    moved.networks["network"].bias.data += 1
    with pytest.raises(ValueError, match="is of another base model"):
        run(settings, parts, model=moved)
    with pytest.raises(FileExistsError, match="holds checkpoints of a run; resume it or give another"):
        RFSRTrainer(RFSRConfig.from_dict(settings), Pixels(), **parts).train(resume=False)
    assert_same_state(saved, end_state(settings["output_dir"]))


def test_a_damaged_checkpoint_is_named(settings, parts):
    run(settings, parts, iterations=2)
    path = sorted((Path(settings["output_dir"]) / "checkpoints").glob("*.safetensors"))[-1]
    tensors, metadata = load_tensors(path)
    moment = next(name for name in tensors if ".optimizer.exp_avg." in name)
    held_out = metadata["held_out"]
    for damaged, facts, sentence in (
        *(
            (tensors, metadata | {"held_out": held_out | change}, f"is damaged .*{said}")
            for change, said in (
                ({"measured": 1.5}, "measured are no dicts"),
                ({"measured": [{"iteration": 0, "reward": 0.5, "darkness": 0.5}]}, "psnr"),
                ({"best_iteration": 7}, "best_iteration"),
                ({"base_scores": {"reward": 0.5}}, "base_scores are no lists"),
                ({"base_scores": {"darkness": [0.5]}}, "reward"),
                ({"scales": {"iqa": 1.0}}, "iterable"),
            )
        ),
        (tensors, metadata | {"history": True}, r"is damaged \(its history\); delete it to go on from the one before"),
        (tensors, metadata | {"optimizer_steps": {}}, "is damaged .KeyError"),
        (tensors, metadata | {"held_out": {"measured": []}}, "is damaged .KeyError"),
        (
            {n: t for n, t in tensors.items() if n != moment},
            metadata,
            "is damaged: what it holds of the optimizer does",
        ),
        (tensors | {moment: torch.zeros(3, 5)}, metadata, "is damaged: what it holds of the optimizer does not fit"),
    ):
        save_tensors(path, damaged, facts)
        with pytest.raises(ValueError, match=sentence):
            run(settings, parts)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        run(settings, parts)


class Moody(Brightness):
    """Not a number whenever asked to be."""

    bad = False

    def score(self, images, prompts=None):
        return super().score(images) * (float("nan") if self.bad else 1.0)


def test_non_finite_steps_are_skipped_and_then_stop_the_run(settings, parts, caplog):
    reward = Moody()
    trainer = RFSRTrainer(
        RFSRConfig.from_dict(settings | {"max_skipped": 3, "structure_loss": "none", "iterations": 20}),
        Pixels(),
        **parts | {"rewards": [WeightedReward(reward, 1.0)]},
    )
    state = trainer.loop.states["model"]
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    reward.bad = True
    with caplog.at_level(logging.WARNING), pytest.raises(NonFiniteLossError, match="3 iterations in a row"):
        trainer.train()
    assert "is not finite, step skipped" in caplog.text
    assert_same_state(before, state.tensors())


def test_full_disk_leaves_the_last_checkpoint(settings, parts, monkeypatch):
    run(settings, parts, iterations=2)
    saved = end_state(settings["output_dir"])

    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        run(settings, parts)
    assert_same_state(saved, end_state(settings["output_dir"]))
    assert not list(Path(settings["output_dir"]).rglob("*.partial"))


def test_warns_when_the_reward_rises_and_the_judge_falls(settings, parts, caplog):
    with caplog.at_level(logging.WARNING):
        run(settings, parts, iterations=20, structure_loss="none", style_loss="none", learning_rate=3e-3)
    assert "the training reward has risen" in caplog.text
    assert "held-out darkness has fallen" in caplog.text


def test_warns_when_psnr_falls_too_far(tiny_model, caplog):
    held_out = HeldOut(tiny_model, [], max_psnr_drop=1.0)
    for iteration, psnr in ((0, 28.5), (1, 27.6), (2, 9.3)):
        held_out._record({"iteration": iteration, "psnr": psnr}, lambda row, best: True)
    assert held_out.best_iteration == 1
    assert [record.getMessage() for record in caplog.records] == [
        "iteration 2: held-out PSNR is 9.30 dB, 19.20 below the base model's, more than max_psnr_drop (1) allows; if "
        "it stays so, lower learning_rate"
    ]


@pytest.mark.parametrize(
    ("reward", "darkness", "warns"),
    [
        ([1.0, 1.2, 0.9, 1.1], [-1.0, -1.1, -0.9, -1.2], True),
        ([1.0, 1.2, 0.9, 1.1], [-3.0, 1.0, -2.0, 2.0], False),  # half lower in the mean, by 0.4 standard errors
        ([4.0, -3.0, 3.0, -2.0], [-1.0, -1.1, -0.9, -1.2], False),
        ([1.0, 1.2, 0.9, 1.1], [1.0, 1.1, 0.9, 1.2], False),
        ([1.0], [-1.0], False),  # one image has no standard error
    ],
)
def test_warns_only_beyond_chance(settings, parts, caplog, reward, darkness, warns):
    trainer = RFSRTrainer(RFSRConfig.from_dict(settings), Pixels(), **parts)
    base = pd.DataFrame({"reward": [5.0, -7.0, 2.0, 0.0], "darkness": [1.0, 8.0, -2.0, 3.0]})[: len(reward)]
    trainer.held_out._warn_of_hacking(base, 0)
    trainer.held_out._warn_of_hacking(base + pd.DataFrame({"reward": reward, "darkness": darkness}), 1)
    assert ("this is what reward hacking looks like" in caplog.text) == warns


def test_best_respects_the_psnr_bound(settings, parts):
    result = run(
        settings, parts, iterations=20, structure_loss="none", style_loss="none", learning_rate=3e-3,
        max_psnr_drop=-100.0,
    )  # fmt: skip
    assert result.best_iteration == 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"crop_size": 30}, "crop_size must be a whole number"),
        ({"structure_window": [1, 4]}, "structure_window must end before reward_window begins"),
        ({"reward_window": [4, 9]}, "reward window must lie within the sampling steps 1 to 5"),
        (
            {"points_per_rollout": 6, "checkpoint_every": 6},
            "points_per_rollout must be at most the number of steps in the windows (4), got 6",
        ),
        ({"data": "nowhere"}, "data folder 'nowhere' does not exist"),
    ],
)
def test_sentences(settings, parts, changes, sentence):
    given = {k: v for k, v in parts.items() if k != "dataset"} if "data" in changes else parts
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(sentence)):
        RFSRTrainer(RFSRConfig.from_dict(settings | changes), Pixels(), **given)
    assert not Path(settings["output_dir"]).exists()


def test_samples_are_asked_for_before_the_work(settings, parts):
    """As many as there are trajectories of two iterations: three batches of two, of which the last is the sixth."""
    settings |= {"points_per_rollout": 2}
    RFSRTrainer(RFSRConfig.from_dict(settings), Pixels(), **parts | {"dataset": FewSamples(6)})
    with pytest.raises(ValueError, match=r"dataset must give a sample for every index .* got IndexError\(5\) for 5"):
        RFSRTrainer(RFSRConfig.from_dict(settings), Pixels(), **parts | {"dataset": FewSamples(5)})
    assert not Path(settings["output_dir"]).exists()


def test_a_disk_that_tensorboard_fills_is_named(settings, parts, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = RFSRTrainer(RFSRConfig.from_dict(settings), Pixels(), **parts)
    monkeypatch.setattr(trainer.loop.accelerator, "log", full)
    with pytest.raises(OSError) as error:
        trainer.train()
    assert error.value.filename == str(Path(settings["output_dir"]) / "tensorboard")


@pytest.mark.slow
def test_killed_ten_times_it_ends_as_if_it_had_not_been(tmp_path):
    whole = launching.start_alone(run_tiny.__file__, tmp_path / "whole", 40, 2)
    assert whole.wait() == 0, whole.stderr.read()
    rng, kills = random.Random(0), 0
    while True:
        process = launching.start_alone(run_tiny.__file__, tmp_path / "killed", 40, 2)
        checkpoints = tmp_path / "killed" / "checkpoints"
        seen = len(list(checkpoints.glob("*")))
        if kills < 10:  # once it is under way, at a random moment
            while process.poll() is None and len(list(checkpoints.glob("*"))) <= min(seen, 1):
                time.sleep(0.01)
            time.sleep(rng.random() * 0.7)
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
            for path in checkpoints.glob("*.safetensors"):
                load_tensors(path)  # every checkpoint that is there is whole
            continue
        assert process.wait() == 0, process.stderr.read()
        break
    assert kills == 10
    assert_same_state(end_state(tmp_path / "whole"), end_state(tmp_path / "killed"))
    weights = [
        (tmp_path / name / "model/unet/diffusion_pytorch_model.safetensors").read_bytes()
        for name in ("whole", "killed")
    ]
    assert weights[0] == weights[1]
