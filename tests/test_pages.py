"""The Python of README and guides runs, what they call equivalent is, and their settings and commands exist."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import typer.main
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rfsr_ext import cli
from rfsr_ext.training import RFSRConfig
from rfsr_ext.training.comparison import ComparisonConfig

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["README.md", "CONTRIBUTING.md", "notebooks/README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
PAGES = {name: (ROOT / name).read_text() for name in sorted(NAMES)}
SECTIONS = [
    section
    for page in PAGES.values()
    for section in re.findall(r"^###? (.+?)\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL)
]
OPERATORS = ["haar_ll", "haar_ll_l1_loss", "gram_matrix", "gram_loss", "HaarLLLoss"]


def fences(words: str) -> list[str]:
    """Python blocks of the one section whose heading starts with ``words``."""
    (text,) = (text for heading, text in SECTIONS if re.match(rf"{re.escape(words)}\b", heading.replace("`", "")))
    return blocks("python", text)


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


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


@pytest.mark.parametrize("name", [name for name in PAGES if "```python" in PAGES[name]])
def test_every_block_is_python(name):
    found = blocks("python", PAGES[name])
    assert len(found) == PAGES[name].count("```python")
    for block in found:
        compile(block, name, "exec")


def test_metrics_in_python(names, capsys):
    (block,) = fences("Metrics in Python")
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
    (block,) = fences("The losses in your own trainer")
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
    names = ["docs/training.md", "docs/rewards_and_metrics.md", "docs/published_models.md"]
    (tmp_path / "config.yaml").write_text("".join(block for name in names for block in blocks("yaml", PAGES[name])))
    config = RFSRConfig.load(tmp_path / "config.yaml")
    assert list(config.rewards) == ["clipiqa", "image-reward", "pyiqa:musiq"]
    assert len(config.data) == 4 and config.degradation == "realesrgan-a" and config.model == "seesr"


def test_the_comparison_shown_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("yaml", PAGES["docs/comparison.md"])
    Path("ways.yaml").write_text(block)
    Path("my_method.yaml").write_text("{}")
    assert len(ComparisonConfig.load("ways.yaml").ways) == 6


def commands(text: str) -> list[str]:
    """What a page says after ``rfsr`` (or ``-m rfsr_ext``), in its blocks of shell lines and between backticks."""
    lines = "".join(blocks("sh", text))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    quoted = re.findall(r"`([^`]+)`", re.sub(r"\s+", " ", prose))
    return re.findall(r"^(?:.* -m rfsr_ext|rfsr) ([a-z].*)$", "\n".join([lines, *quoted]), re.MULTILINE)


def unknown(words: str) -> list[str]:
    """Of a command line of rfsr the words that it would refuse: commands and options that there are not."""
    command, left = typer.main.get_command(cli._typer), shlex.split(words, comments=True)
    while left and left[0] in getattr(command, "commands", {}):
        command = command.commands[left.pop(0)]
    options = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}
    if hasattr(command, "commands"):  # a group takes no words of its own
        return left
    return [word for word in left if word.startswith("--") and word not in options]


@pytest.mark.parametrize("name", [name for name in PAGES if commands(PAGES[name])])
def test_the_commands_shown_exist(name):
    assert {words: unknown(words) for words in commands(PAGES[name]) if unknown(words)} == {}


def test_commands_that_do_not_exist_are_seen():
    assert len(commands(PAGES["docs/commands.md"])) > 25
    assert unknown("upscale photo.jpg --modle mini  # a typing error") == ["--modle"]
    assert unknown("data tagg photos/") == ["tagg", "photos/"]


def test_targets_and_modules_that_are_named_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target for page in PAGES.values() for target in re.findall(r"(?:^|`)make\s+([\w-]+)", page, re.MULTILINE)}
    assert len(named) > 5 and named <= targets
    modules = {name for page in PAGES.values() for name in re.findall(r"-m\s+benchmarks\.(\w+)", page)}
    assert modules and all((ROOT / f"benchmarks/{name}.py").is_file() for name in modules)


def test_every_command_has_a_line():
    def names(group, *path):
        for name, command in group.commands.items():
            yield from names(command, *path, name) if hasattr(command, "commands") else [" ".join([*path, name])]

    page = "\n".join(commands(PAGES["docs/commands.md"]))
    every = list(names(typer.main.get_command(cli._typer)))
    assert len(every) > 15 and [name for name in every if not re.search(rf"^{name}\b", page, re.MULTILINE)] == []
