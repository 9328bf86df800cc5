"""The README's Python runs, and what it calls equivalent is."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rfsr_ext.training import RFSRConfig

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
SECTIONS = dict(re.findall(r"^###? (.+?)\n(.*?)(?=^##|\Z)", README, re.MULTILINE | re.DOTALL))
OPERATORS = ["haar_ll", "haar_ll_l1_loss", "gram_matrix", "gram_loss", "HaarLLLoss"]


def fences(words: str) -> list[str]:
    """Python blocks of the one section whose heading starts with ``words``."""
    (text,) = (
        text for heading, text in SECTIONS.items() if re.match(rf"{re.escape(words)}\b", heading.replace("`", ""))
    )
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def names():
    """What a reader has at hand where a block begins."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pictures, features = torch.rand(2, 2, 3, 37, 33), torch.randn(2, 2, 8, 6, 5)
        model = nn.Conv2d(3, 3, 3, padding=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    return {
        "torch": torch,
        "F": F,
        "pred": pictures[0],
        "target": pictures[1],
        "features": features[0],
        "target_features": features[1],
        "model": model,
        "optimizer": optimizer,
        "loader": DataLoader(TensorDataset(*pictures), batch_size=2),
    }


def test_every_block_is_python():
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) == README.count("```python")
    for block in blocks:
        compile(block, "README.md", "exec")


def test_metrics_in_python(names, capsys):
    (block,) = fences("Use it")
    exec(block, names)
    assert set(names["values"]) == {"psnr", "ssim", "judge"} and all(len(v) == 2 for v in names["values"].values())
    assert "basic: seed 0, PSNR and SSIM on RGB, border 0" in capsys.readouterr().out


@pytest.mark.parametrize("operator", OPERATORS)
def test_equivalents_are(operator, names):
    ours, plain = fences(operator)
    before, theirs = set(names), dict(names)
    exec(ours, names)
    exec(plain, theirs)
    results = [name for name in set(names) - before if isinstance(names[name], Tensor)]
    assert results
    for name in results:
        torch.testing.assert_close(names[name], theirs[name], rtol=1e-4, atol=1e-6)


def changed(model, run) -> bool:
    before = [p.detach().clone() for p in model.parameters()]
    run()
    return any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_plain_loop(names):
    (block,) = fences("Dropped into a plain loop")
    assert changed(names["model"], lambda: exec(block, names))


def test_lightning_module(names, tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed; the block was only parsed")
    (block,) = fences("Dropped into Lightning")
    exec(block, names)
    trainer = lightning.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    module = names["SuperResolution"](names["model"])
    assert changed(names["model"], lambda: trainer.fit(module, names["loader"]))


def test_diffusers_training_step(names):
    (block,) = fences("Dropped into a diffusers")
    unet = UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).requires_grad_(False)
    names |= {
        "unet": unet,
        "vae": vae,
        "noise_scheduler": DDPMScheduler(),
        "timesteps": torch.tensor([10, 600]),
        "encoder_hidden_states": torch.randn(2, 5, 8),
        "pixel_values": torch.rand(2, 3, 16, 16) * 2 - 1,
        "accelerator": SimpleNamespace(backward=lambda loss: loss.backward()),
    }
    names["latents"] = vae.encode(names["pixel_values"]).latent_dist.mean * vae.config.scaling_factor
    names["noise"] = torch.randn_like(names["latents"])
    exec(block, names)
    plain = F.mse_loss(
        unet(names["noisy_latents"], names["timesteps"], names["encoder_hidden_states"]).sample, names["noise"]
    )
    assert names["loss"] > plain
    for p, without in zip(unet.parameters(), torch.autograd.grad(plain, list(unet.parameters())), strict=True):
        assert p.grad.isfinite().all()
        assert not torch.allclose(p.grad, without, rtol=1e-3)  # the new loss reaches the U-Net too


def test_the_settings_shown_are_settings(tmp_path):
    blocks = re.findall(r"^```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (tmp_path / "config.yaml").write_text("".join(blocks))
    config = RFSRConfig.load(tmp_path / "config.yaml")
    assert list(config.rewards) == ["clipiqa", "image-reward", "pyiqa:musiq"]
    assert len(config.data) == 4 and config.degradation == "realesrgan-a"
