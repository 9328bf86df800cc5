"""Settings that save memory: what they hold where, and that nothing else becomes of a run."""

import copy
import sys

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.memory import as_on_gpu, prepare
from rfsr_ext.losses import VGGGramLoss
from rfsr_ext.memory import hold_weights, on_device
from rfsr_ext.models import ControlNetISRModel
from rfsr_ext.sampling import TimestepWindows
from rfsr_ext.training import Loop, Method, RFSRConfig, RFSRObjective, RFSRTrainer
from tests.training import toy
from tests.training.conftest import make_tiny_model
from tests.training.test_loop import assert_same_state, end_state


def test_held_weights_are_rounded_and_all_else_is_as_before():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(8 * 36, 4))
    rounded = copy.deepcopy(network)
    with torch.no_grad():
        for part in (rounded[0], rounded[3]):
            part.weight.copy_(part.weight.half())
    held = hold_weights(hold_weights(network, torch.float16), torch.float16)  # twice is once
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    found, expected = held(x), rounded(x)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (found, expected)))
    assert sorted(p.nbytes for p in held.parameters()) == [16, 32, 32, 32, 8 * 27 * 2, 4 * 288 * 2]
    assert torch.equal(copy.deepcopy(held)(x), expected)


def test_modules_are_on_a_device_for_as_long_as_they_are_used():
    shared = nn.Linear(2, 2)
    modules = [nn.Sequential(shared, nn.BatchNorm1d(2)), nn.Sequential(shared)]
    before = [dict(m.state_dict(keep_vars=True)) for m in modules]
    with pytest.raises(KeyError), on_device(modules, "meta"):
        assert {t.device.type for m in modules for t in m.state_dict().values()} == {"meta"}
        assert modules[0][0].weight is modules[1][0].weight
        raise KeyError
    for module, tensors in zip(modules, before, strict=True):
        after = module.state_dict(keep_vars=True)
        assert all(after[name] is tensor for name, tensor in tensors.items())


def trained(settings, parts, folder, **changes):
    config = RFSRConfig.from_dict(settings | {"iterations": 3, "output_dir": str(folder)} | changes)
    trainer = RFSRTrainer(config, make_tiny_model(), **parts)
    return trainer, trainer.train()


def test_frozen_networks_in_half_precision_train_alike_and_are_saved_whole(settings, parts, tmp_path):
    """Under autocast, which rounds the same weights, not a bit of the training differs."""
    changes = {"mixed_precision": "bf16", "style_loss": "kl"}
    _, plain = trained(settings, parts, tmp_path / "plain", **changes)
    trainer, held = trained(settings, parts, tmp_path / "held", frozen_dtype="bfloat16", **changes)
    columns = ["step", "loss", "grad_norm"]
    assert held.history[columns].equals(plain.history[columns])
    assert set(held.history["window"]) == {"structure", "reward"}
    untouched = make_tiny_model()
    for model in (held.model, *(ControlNetISRModel.from_pretrained(held.folder / name) for name in ("model", "best"))):
        for name in ("vae", "text_encoder"):
            expected = untouched.networks[name].state_dict()
            found = model.networks[name].state_dict()
            assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)
    for name, network in held.model.trainable_networks().items():
        pairs = zip(network.parameters(), plain.model.networks[name].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    for network in trainer.objective.reference.networks.values():
        assert any(p.dtype == torch.bfloat16 for p in network.parameters())
    assert {p.dtype for p in trainer.loop.states["model"].parameters.values()} == {torch.float32}


def test_reference_style_loss_and_rewards_are_held_too(settings, parts, tmp_path):
    style = VGGGramLoss(weights="random")
    config = settings | {"frozen_dtype": "float16", "style_loss": "gram", "offload_reference": True}
    trainer = RFSRTrainer(RFSRConfig.from_dict(config), make_tiny_model(), style_loss=style, **parts)
    size = sum(p.nbytes for p in style.parameters())
    assert size < 0.51 * 4 * sum(p.numel() for p in style.parameters())
    assert trainer.objective.offload_reference and trainer.objective.style_loss is style
    trained = sum(4 * p.numel() for p in trainer.model.trained_parameters().values())
    frozen = [trainer.model.networks[name] for name in ("vae", "text_encoder")]
    weights = trained + sum(t.nbytes for m in frozen for t in (*m.parameters(), *m.buffers()))
    found = trainer.held_memory()
    assert found.pop("rewards and style loss") == size + sum(b.nbytes for b in style.buffers())
    assert abs(found.pop("weights") - weights) < 0.01 * weights  # position numbers of the trained networks
    assert found == {"gradients": trained, "optimizer": 2 * trained, "average": trained, "reference": 0}


def test_the_reference_comes_for_its_step_alone():
    """A model on the meta device, which stands for a GPU, and a reference whose home is the CPU."""
    model, seen = make_tiny_model(), []
    reference = model.reference()
    own = [p for network in reference.trainable_networks().values() for p in network.parameters()]
    prepare(model.to("meta"))

    def predict(*args):
        seen.extend(p.device.type for network in reference.trainable_networks().values() for p in network.parameters())
        return model.predict(*args)

    reference.predict = predict
    objective = RFSRObjective(
        model, TimestepWindows(None, (4, 5), 5), kl=True, reference=reference, offload_reference=True
    )
    with as_on_gpu():
        _, logs = objective(torch.rand(1, 3, 8, 8, device="meta"), torch.rand(1, 3, 32, 32, device="meta"), ["cat"], 4)
    assert logs["style"].device.type == "meta" and set(seen) == {"meta"} and len(seen) == len(own)
    after = [p for network in reference.trainable_networks().values() for p in network.parameters()]
    assert all(a is b for a, b in zip(after, own, strict=True))


class Wide(Method):
    """Two layers, whose weights are large enough for 8 bits."""

    def __init__(self):
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(2, 4096), nn.Tanh(), nn.Linear(4096, 2))
        self.players = {"model": {"net": self.network}}

    def loss(self, player, batch, iteration, samples):
        loss = (self.network(batch["x"]) - batch["y"]).square().mean()
        return loss, {"loss": loss.detach()}


def test_adam_of_8_bits_keeps_less_and_resumes_to_the_same_bits(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; pip install 'rfsr_ext[8bit]'")

    def run(name, iterations, optimizer="adam-8bit"):
        changes = {"iterations": iterations, "optimizer": optimizer, "learning_rate": 1e-3, "checkpoint_every": 5}
        return Loop(toy.config(tmp_path / name, **changes), Wide(), toy.Numbers()).train()

    history, exact = run("whole", 20), run("exact", 20, "adam")
    np.testing.assert_allclose(history["loss"], exact["loss"], rtol=0.05)
    assert history["loss"][19] != exact["loss"][19]
    run("cut", 10)
    run("cut", 20)
    assert_same_state(end_state(tmp_path / "whole"), end_state(tmp_path / "cut"))
    tensors, _ = end_state(tmp_path / "whole")
    moments = {n: t for n, t in tensors.items() if n.startswith("model.optimizer.state") and n.endswith("0.weight")}
    assert len(moments) == 2 and {t.dtype for t in moments.values()} == {torch.uint8}


def test_adam_of_8_bits_says_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModuleNotFoundError, match=r"^optimizer adam-8bit needs the package bitsandbytes; pip install"):
        Loop(toy.config(tmp_path, optimizer="adam-8bit"), Wide(), toy.Numbers())
