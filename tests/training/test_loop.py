"""The loop by itself: a method of two players that knows nothing of images."""

import logging
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from rfsr_ext.files import load_tensors, lock_folder
from rfsr_ext.training import Loop, Method, NonFiniteLossError
from rfsr_ext.training import loop as loop_module
from tests import launching
from tests.training import toy
from tests.training.toy import Numbers, ToyGAN


def train(folder, method=None, **changes):
    loop = Loop(toy.config(folder, **changes), method or ToyGAN(), Numbers())
    return loop.train()


def checkpoints(folder):
    return sorted(Path(folder, "checkpoints").glob("*.safetensors"))


def end_state(folder):
    return load_tensors(checkpoints(folder)[-1])


def assert_same_state(a, b, **tolerance):
    (a, about_a), (b, about_b) = a, b
    assert about_a["method"] == about_b["method"] and about_a["iteration"] == about_b["iteration"]
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **{"rtol": 0, "atol": 0} | tolerance)


def test_two_players_learn_with_an_optimizer_each(tmp_path):
    history = train(tmp_path, iterations=150)
    assert {"generator/loss", "discriminator/loss", "generator/grad_norm"} <= set(history)
    assert history["generator/loss"].tail(10).mean() < 0.5 * history["generator/loss"].head(10).mean()
    tensors, metadata = end_state(tmp_path)
    assert metadata["method"] == {"seen": 150 * 4}
    for player in ("generator", "discriminator"):
        kinds = ("parameters", "ema", "optimizer.exp_avg")
        assert {f"{player}.{kind}.net.0.weight" for kind in kinds} <= tensors.keys()
    exported, _ = load_tensors(tmp_path / "model" / "generator.safetensors")
    assert torch.equal(exported["0.weight"], tensors["generator.ema.net.0.weight"])


def test_gradients_that_were_turned_off(tmp_path):
    with torch.no_grad():
        history = train(tmp_path / "off", iterations=1)
        assert history["generator/grad_norm"].item() > 0 and not torch.is_grad_enabled()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="nothing can be trained under torch.inference_mode"):
        train(tmp_path / "inference", iterations=1)
    assert not (tmp_path / "inference").exists()


def test_other_data_is_named_when_a_run_goes_on(tmp_path, caplog):
    class Named(Numbers):
        pictures = "a.png, b.png"

        def fingerprint(self):
            return self.pictures

    def go_on(iterations):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            Loop(toy.config(tmp_path, iterations=iterations), ToyGAN(), data).train()
        return "data has other pictures than when the run began" in caplog.text

    data = Named()
    assert [go_on(1), go_on(2)] == [False, False]
    data.pictures = "a.png, b.png, c.png"
    assert [go_on(3), go_on(4)] == [True, False]


def test_a_turn_moves_its_own_player_only(tmp_path):
    class Frozen(ToyGAN):
        def learning_rate_factor(self, player, iteration):
            return 0.0 if player == "generator" else 1.0

    method = Frozen()
    before = {n: p.clone() for n, p in method.generator.named_parameters()}
    other = {n: p.clone() for n, p in method.discriminator.named_parameters()}
    train(tmp_path, method, iterations=3)
    assert all(torch.equal(p, before[n]) for n, p in method.generator.named_parameters())
    assert not any(torch.equal(p, other[n]) for n, p in method.discriminator.named_parameters())


def test_seconds_end_a_run_as_its_iterations_do(tmp_path, monkeypatch):
    """A clock that goes on by a second in every iteration, and by an hour while nothing runs."""
    clock, stop = SimpleNamespace(now=0.0, monotonic=lambda: clock.now), 2

    class Slow(ToyGAN):
        def loss(self, player, batch, iteration, samples):
            clock.now += player == "generator"
            if iteration == stop:
                raise KeyboardInterrupt
            return super().loss(player, batch, iteration, samples)

    monkeypatch.setattr(loop_module, "time", clock)
    limits = {"iterations": 10**6, "max_seconds": 4}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", Slow(), checkpoint_every=1, **limits)
    assert len(checkpoints(tmp_path / "run")) == 2
    stop, clock.now = None, 3600.0
    assert len(train(tmp_path / "run", Slow(), checkpoint_every=1000, **limits)) == 4
    train(tmp_path / "other", iterations=4)
    assert_same_state(end_state(tmp_path / "run"), end_state(tmp_path / "other"))
    before = (tmp_path / "run/checkpoints").stat().st_mtime_ns
    assert len(train(tmp_path / "run", Slow(), **limits)) == 4  # nothing is left to do
    assert (tmp_path / "run/checkpoints").stat().st_mtime_ns == before
    loop = Loop(toy.config(tmp_path / "late", **limits), Slow(), Numbers())
    loop.seconds = 5.0
    with pytest.raises(ValueError, match="max_seconds must leave time to train, but 5 s had gone by .*, got 4"):
        loop.train()


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_equal_one_batch(tmp_path, parts):
    once = train(tmp_path / "once", iterations=8)
    cut = train(tmp_path / "cut", iterations=8, gradient_accumulation_steps=parts)
    columns = ["generator/loss", "generator/grad_norm", "discriminator/loss", "discriminator/grad_norm"]
    pd.testing.assert_frame_equal(once[columns], cut[columns], rtol=1e-5)
    assert_same_state(end_state(tmp_path / "once"), end_state(tmp_path / "cut"), rtol=1e-4, atol=1e-6)


def test_accelerates_environment_does_not_reach_the_gradient(tmp_path, monkeypatch):
    expected = train(tmp_path / "a", iterations=3)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    found = train(tmp_path / "b", iterations=3)
    pd.testing.assert_frame_equal(expected.drop(columns="seconds"), found.drop(columns="seconds"), rtol=0, atol=0)


def test_clipping_can_be_off(tmp_path):
    class Steep(ToyGAN):
        def optimizer(self, player, parameters, config):
            return torch.optim.SGD(parameters, config.learning_rate)

    moved = {}
    for limit in (None, 1e9, 0.01):
        method = Steep()
        before = method.generator[0].weight.clone()
        history = train(tmp_path / str(limit), method, iterations=1, max_grad_norm=limit, ema_decay=0.0)
        assert history["generator/grad_norm"][0] > 0.1  # what is logged is the norm before
        moved[limit] = (method.generator[0].weight - before).detach()
    assert torch.equal(moved[None], moved[1e9])
    assert moved[0.01].norm() < 0.2 * moved[None].norm()
    for limit in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="max_grad_norm must be a finite number"):
            toy.config(tmp_path, max_grad_norm=limit)


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path):
    train(tmp_path / "whole", iterations=12)
    train(tmp_path / "cut", iterations=5, checkpoint_every=2)
    train(tmp_path / "cut", iterations=12, checkpoint_every=2)
    assert_same_state(end_state(tmp_path / "whole"), end_state(tmp_path / "cut"))


def test_an_interrupted_trainer_goes_on(tmp_path):
    class Interrupted(ToyGAN):
        at = 7

        def loss(self, player, batch, iteration, samples):
            if iteration == self.at and player == "generator":
                self.at = None
                raise KeyboardInterrupt
            return super().loss(player, batch, iteration, samples)

    train(tmp_path / "whole", iterations=12, checkpoint_every=3)
    method = Interrupted()
    loop = Loop(toy.config(tmp_path / "cut", iterations=12, checkpoint_every=3), method, Numbers())
    with pytest.raises(KeyboardInterrupt):
        loop.train()
    with lock_folder(tmp_path / "cut"):
        pass  # nobody holds it
    loop.train()
    assert_same_state(end_state(tmp_path / "whole"), end_state(tmp_path / "cut"))
    early = Interrupted()
    early.at = 1
    loop = Loop(toy.config(tmp_path / "early", iterations=12, checkpoint_every=3), early, Numbers())
    with pytest.raises(KeyboardInterrupt):
        loop.train()
    with pytest.raises(RuntimeError, match="stopped before its first checkpoint; begin again with a new trainer"):
        loop.train()


class Fragile(ToyGAN):
    """One step of a large learning rate makes weights whose loss is soon never finite again."""

    def loss(self, player, batch, iteration, samples):
        loss, logs = super().loss(player, batch, iteration, samples)
        ruined = max(p.abs().max() for p in self.generator.parameters()) > 50
        if ruined and iteration > self.destroyed_at + self.finite:
            loss = loss * float("nan")
        return loss, {"loss": loss.detach()}

    def learning_rate_factor(self, player, iteration):
        return 1e4 if iteration == self.destroyed_at else 1.0

    destroyed_at, finite = 10, 0


@pytest.mark.parametrize("finite", [0, 3])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_after_a_blow_up_the_advice_works(tmp_path, every, finite, caplog):
    changes = {"iterations": 40, "checkpoint_every": every, "keep_checkpoints": 1, "max_skipped": 9}
    fragile = Fragile()
    fragile.finite = finite  # iterations, whose losses are large
    with caplog.at_level(logging.WARNING), pytest.raises(NonFiniteLossError) as error:
        train(tmp_path, fragile, **changes)
    assert "is not finite, step skipped" in caplog.text
    assert "9 iterations in a row" in str(error.value) and "lower learning_rate" in str(error.value)
    kept = [load_tensors(path) for path in checkpoints(tmp_path)]
    assert kept and all(about["iteration"] <= 10 for _, about in kept)
    for tensors, _ in kept:
        assert all(t.abs().max() < 50 for name, t in tensors.items() if ".parameters." in name)
    assert not (tmp_path / "model").exists()
    mended = Fragile()
    mended.destroyed_at = -1  # never, and whatever is ruined shows at once
    history = train(tmp_path, mended, **changes | {"learning_rate": 5e-3, "max_skipped": 5})
    assert len(history) == 40 and not history["skipped"].any()
    assert len(checkpoints(tmp_path)) == 1


def test_a_finished_run_that_is_made_longer_keeps_what_it_had(tmp_path):
    changes = {"checkpoint_every": 1, "keep_checkpoints": 2, "max_skipped": 9}
    train(tmp_path, iterations=10, **changes)
    with pytest.raises(NonFiniteLossError):
        train(tmp_path, Fragile(), iterations=40, **changes)
    assert end_state(tmp_path)[1]["iteration"] == 9
    assert len(train(tmp_path, iterations=12, **changes)) == 12


@pytest.mark.parametrize("destroyed_at", [10, 7])
def test_a_run_that_ends_in_a_blow_up_does_not_end_well(tmp_path, destroyed_at):
    method = Fragile()
    method.destroyed_at = destroyed_at
    with pytest.raises(NonFiniteLossError, match="run ended while steps were being skipped"):
        train(tmp_path, method, iterations=12, max_skipped=1000)
    assert not (tmp_path / "model").exists()


def test_the_last_step_is_looked_at_too(tmp_path):
    class Infinite(ToyGAN):
        def learning_rate_factor(self, player, iteration):
            return float("inf") if (player, iteration) == ("generator", 11) else 1.0

    with pytest.raises(NonFiniteLossError, match="the last step left weights that are of no use"):
        train(tmp_path, Infinite(), iterations=12)
    assert not (tmp_path / "model").exists()
    assert end_state(tmp_path)[1]["iteration"] <= 11
    train(tmp_path, iterations=12)
    train(tmp_path / "whole", iterations=12)
    assert_same_state(end_state(tmp_path), end_state(tmp_path / "whole"))


def test_a_finished_run_is_not_taken_for_a_shorter_one(tmp_path):
    train(tmp_path, iterations=6)
    saved = end_state(tmp_path)
    with pytest.raises(ValueError, match="iterations must be at least 6, which the run in .* has done, got 3"):
        train(tmp_path, iterations=3)
    assert_same_state(saved, end_state(tmp_path))


def test_one_run_at_a_time(tmp_path):
    with lock_folder(tmp_path), pytest.raises(RuntimeError, match="is in use by another run"):
        train(tmp_path, iterations=2)
    assert not checkpoints(tmp_path)


@pytest.fixture
def large_scale(monkeypatch):
    """Losses under float16 are scaled by so much that gradients overflow at first, and again when it has grown."""
    make = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: make(*a, init_scale=2.0**24, growth_interval=3, **k))


def test_float16_scales_the_loss_and_resumes_to_the_same_bits(tmp_path, large_scale):
    changes = {"mixed_precision": "fp16", "checkpoint_every": 5, "max_skipped": 3}
    history = train(tmp_path / "whole", iterations=40, **changes)
    for player in ("generator", "discriminator"):
        scale, overflow = history[f"{player}/loss_scale"], ~np.isfinite(history[f"{player}/grad_norm"])
        assert overflow[:4].all()  # more in a row than may be skipped
        ratio = (scale.shift(-1) / scale)[:-1]
        assert set(ratio[overflow[:-1]]) == {0.5} and set(ratio[~overflow[:-1]]) == {1.0, 2.0}
    assert not history["skipped"].any() and np.isfinite(history["generator/loss"]).all()
    _, about = end_state(tmp_path / "whole")
    taken = {p: int(np.isfinite(history[f"{p}/grad_norm"]).sum()) for p in ("generator", "discriminator")}
    assert about["optimizer_steps"] == taken
    train(tmp_path / "cut", iterations=17, **changes)
    resumed = train(tmp_path / "cut", iterations=40, **changes)
    assert_same_state(end_state(tmp_path / "whole"), end_state(tmp_path / "cut"))
    assert end_state(tmp_path / "cut")[1]["scalers"] == about["scalers"]
    pd.testing.assert_frame_equal(resumed.drop(columns="seconds"), history.drop(columns="seconds"))


def test_float16_is_as_large_as_float32_where_it_does_not_overflow(tmp_path):
    """The loss is scaled, its gradient and the step are not."""
    still = {"iterations": 8, "learning_rate": 1e-9}
    exact, half = (
        train(tmp_path / kind, mixed_precision=kind, **still)["generator/grad_norm"] for kind in ("no", "fp16")
    )
    fits = np.isfinite(half)
    assert fits.sum() >= 4
    np.testing.assert_allclose(half[fits], exact[fits], rtol=1e-2)
    assert (half != exact).all()


def test_float16_blows_up_as_float32_does(tmp_path):
    class Steep(ToyGAN):
        """Its loss is finite, its gradient never."""

        def loss(self, player, batch, iteration, samples):
            loss, logs = super().loss(player, batch, iteration, samples)
            return loss + 0 * (loss - loss.detach()).sqrt(), logs

    changes = {"mixed_precision": "fp16", "iterations": 40, "max_skipped": 4}
    destroyed = Fragile()
    destroyed.learning_rate_factor = lambda player, iteration: 1e4 if iteration >= 10 else 1.0
    with pytest.raises(NonFiniteLossError, match="4 iterations in a row"):
        train(tmp_path / "loss", destroyed, **changes)
    with pytest.raises(NonFiniteLossError, match="4 iterations in a row"):
        train(tmp_path / "gradient", Steep(), **changes)  # once the scale is down from 2¹⁶ to 1
    assert not (tmp_path / "gradient" / "model").exists()


def test_two_precisions_in_one_process_whatever_the_order(tmp_path):
    class Watched(Method):
        def __init__(self):
            torch.manual_seed(0)
            self.network, self.dtypes = nn.Linear(2, 2), set()
            self.players = {"model": {"net": self.network}}

        def install(self, player, networks):
            self.network = networks["net"]

        def loss(self, player, batch, iteration, samples):
            self.dtypes.add((batch["x"] @ batch["x"].T).dtype)
            loss = (self.network(batch["x"]) - batch["y"]).square().mean()
            return loss, {"loss": loss.detach()}

    methods = {name: Watched() for name in ("a", "b", "c", "d")}
    loops = [
        Loop(toy.config(tmp_path / name, iterations=2, mixed_precision=precision), methods[name], Numbers())
        for name, precision in (("a", "bf16"), ("b", "no"), ("c", "bf16"), ("d", "fp16"))
    ]
    for loop in loops:  # only now: each keeps its own
        loop.train()
    wanted = [torch.bfloat16, torch.float32, torch.bfloat16, torch.float16]
    assert [m.dtypes for m in methods.values()] == [{dtype} for dtype in wanted]


@pytest.mark.slow
def test_killed_it_resumes_to_the_same_bits(tmp_path):
    train(tmp_path / "whole", iterations=400)
    rng, kills = random.Random(0), 0
    while kills < 3:
        process = launching.start_alone(toy.__file__, tmp_path / "killed", 400)
        seen = {path.name for path in checkpoints(tmp_path / "killed")}
        while process.poll() is None and {path.name for path in checkpoints(tmp_path / "killed")} <= seen:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        kills += 1
    assert end_state(tmp_path / "killed")[1]["iteration"] < 400
    launching.ended_well(launching.start_alone(toy.__file__, tmp_path / "killed", 400))
    assert_same_state(end_state(tmp_path / "whole"), end_state(tmp_path / "killed"))
