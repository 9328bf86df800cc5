"""The build's own machinery at a tiny scale; what the shipped weights can do is in test_weights.py."""

import time

import pytest
import torch
from torch import nn

from rfsr_ext.mini import architecture, build
from rfsr_ext.mini.linear_start import LinearAutoencoder, LinearEstimator, load_linear_estimate, load_linear_map
from rfsr_ext.mini.scores import similarity
from rfsr_ext.mini.stage import train_stage
from rfsr_ext.models import Process


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 10_000

    def __getitem__(self, index):
        return {"x": torch.full((1,), float(index % 7))}


def test_tokenizer_is_the_same_every_time_and_reads_back():
    first, second = architecture.tokenizer(), architecture.tokenizer()
    assert first.get_vocab() == second.get_vocab()
    text = "cat, whiskers, ünknown wörds 8k"
    assert first.decode(first(text).input_ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
    assert len(first.tokenize("astronaut")) == 1


def test_similarity_matches_skimage():
    from skimage.metrics import structural_similarity

    torch.manual_seed(0)
    original = torch.rand(2, 3, 24, 24)
    noisy = (original + 0.1 * torch.randn_like(original)).clamp(0, 1)
    for value, x, y in zip(similarity(noisy, original), noisy.mean(1).numpy(), original.mean(1).numpy(), strict=True):
        # skimage averages over windows that lie wholly inside, with the population covariance here
        expected = structural_similarity(x, y, win_size=7, data_range=1.0, use_sample_covariance=False)
        assert value.item() == pytest.approx(expected, abs=1e-4)


def train(folder, iterations=40, stop=None):
    torch.manual_seed(0)
    module, calls = nn.Linear(1, 1), []

    def loss(batch, generator):
        calls.append(batch["x"][0].item())
        if stop is not None and len(calls) > stop:
            raise KeyboardInterrupt
        noise = torch.randn(1, generator=generator)
        return (module(batch["x"]) - 2 * batch["x"] + 0.01 * noise).square().mean()

    train_stage("linear", {"m": module}, Numbers(), loss, folder, iterations=iterations, batch_size=4,
                learning_rate=0.1, ema_decay=0.9, bf16=False, checkpoint_every=10)  # fmt: skip
    return module, calls


def test_a_stage_learns_and_a_resumed_one_equals_an_uninterrupted_one(tmp_path):
    whole, seen = train(tmp_path / "whole")
    assert len(seen) == 40
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", stop=25)
    resumed, rest = train(tmp_path / "cut")
    assert len(rest) == 20  # from the checkpoint at 20
    assert rest == seen[20:]
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    again, none = train(tmp_path / "whole")
    assert none == []  # a finished stage is not trained twice
    assert torch.equal(again.weight, whole.weight)


@pytest.mark.parametrize(("slow", "pays"), [(torch.bfloat16, False), (torch.float32, True)])
def test_the_build_runs_in_the_faster_type(monkeypatch, slow, pays):
    def conv2d(x, weight, padding):
        time.sleep(0.02 if x.dtype == slow else 0)
        return x

    monkeypatch.setattr(build, "conv2d", conv2d)
    assert build.bf16_pays("cpu") == pays


def test_a_linear_map_survives_in_the_stock_class():
    torch.manual_seed(0)
    linear, vae = LinearAutoencoder(architecture.LATENT_CHANNELS), architecture.autoencoder()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    load_linear_map(vae, linear)
    with torch.no_grad():
        latents = linear.encode(images)
        found = vae.encode(images).latent_dist.mode()
        assert (found - latents).std() < 0.01 * latents.std()
        decoded = linear.decode(latents)
        assert (vae.decode(latents).sample - decoded).std() < 0.01 * decoded.std()


def test_sampling_starts_where_training_does():
    """α z_0 + σ ε with the noise of training is the noised LR latent; its level is what the scheduler says."""
    process = Process(architecture.scheduler(), 50)
    alpha, sigma = process.level(process.timesteps[0])
    assert process.timesteps.tolist() == list(range(999, 0, -20))
    assert sigma.item() == pytest.approx(architecture.START_NOISE, abs=1e-3)
    truth, start, noise = torch.randn(3, 1, 4, 2, 2, dtype=torch.float64)
    noised = process.add_noise(truth, noise + (start - truth) * alpha / sigma, process.timesteps[0])
    torch.testing.assert_close(noised, process.add_noise(start, noise, process.timesteps[0]))


def test_a_linear_estimate_survives_in_the_stock_classes_whatever_the_noise():
    torch.manual_seed(0)
    unet, controlnet = architecture.denoiser()
    linear = LinearEstimator(architecture.LATENT_CHANNELS, architecture.LINEAR_WIDTHS)
    load_linear_estimate(unet, controlnet, linear)
    images, text = torch.rand(2, 3, 32, 32), torch.randn(2, 4, architecture.TEXT_WIDTH)
    latents, timestep = torch.randn(2, architecture.LATENT_CHANNELS, 8, 8), torch.tensor([1, 900])
    with torch.no_grad():
        down, middle = controlnet(latents, timestep, text, images, return_dict=False)
        found = unet(latents, timestep, text, down_block_additional_residuals=down,
                     mid_block_additional_residual=middle).sample  # fmt: skip
        assert (found - linear(images)).std() < 0.02 * linear(images).std()
