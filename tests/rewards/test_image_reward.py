"""ImageReward against what the original package made of the same weights (``image_reward/make.py``)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from rfsr_ext.rewards import ImageReward, create_reward, image_reward
from rfsr_ext.rewards.image_reward import PIXEL_MEAN, PIXEL_STD, ImageRewardModel, convert_names
from tests.rewards.tiny import FILES, OriginalImageReward

IMAGES = 2


@pytest.fixture(scope="module")
def original():
    return OriginalImageReward()


@pytest.fixture
def published(original, tmp_path, monkeypatch):
    """A folder in which a tiny ImageReward.pt passes for the published one."""
    vision, text = original.sizes()
    monkeypatch.setattr(image_reward, "VISION", vision)
    monkeypatch.setattr(image_reward, "TEXT", text)
    monkeypatch.setenv("RFSR_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no-hub"))
    torch.save(original.state, tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_bytes((FILES / "vocab.txt").read_bytes())
    return tmp_path


def normalized(image):
    return ((image.float() / 255) - torch.tensor(PIXEL_MEAN).view(3, 1, 1)) / torch.tensor(PIXEL_STD).view(3, 1, 1)


def test_tokens_are_the_originals(original):
    ids, mask = original.reward().tokens(original.prompts)
    assert torch.equal(ids, original["ids"])
    assert torch.equal(mask, original["mask"])


@pytest.mark.parametrize("image", range(IMAGES))
def test_scores_and_image_gradients_are_the_originals(original, image):
    model, n = original.reward().model, len(original.prompts)
    pixels = normalized(original[f"resized.{image}"]).expand(n, -1, -1, -1).clone().requires_grad_()
    scores = model(original["ids"], original["mask"], pixels)
    scores.sum().backward()
    torch.testing.assert_close(scores.detach(), original[f"score.{image}"], atol=1e-5, rtol=0)
    gradient = original[f"gradient.{image}"]
    assert gradient.abs().max() > 1e-4
    torch.testing.assert_close(
        pixels.grad[:, :, ::8, ::8], gradient, atol=1e-5 * gradient.abs().max().item(), rtol=1e-5
    )


def test_the_settings_that_no_shape_shows_matter_and_are_the_originals(original):
    settings = json.loads((FILES / "full.json").read_text())["settings"]
    assert (image_reward.VISION["num_attention_heads"], image_reward.TEXT["num_attention_heads"]) == (16, 12)
    assert settings == {
        "vision_heads": image_reward.VISION["num_attention_heads"],
        "vision_layer_norm_eps": image_reward.VISION["layer_norm_eps"],
        "text_heads": image_reward.TEXT["num_attention_heads"],
        "text_layer_norm_eps": image_reward.TEXT["layer_norm_eps"],
        "mean": image_reward.REWARD_MEAN,
        "std": image_reward.REWARD_STD,
    }
    vision, text = original.sizes()
    wrong = ImageRewardModel(vision, text | {"num_attention_heads": 2})
    wrong.load_state_dict(convert_names(original.state))  # fits, and is wrong
    pixels = normalized(original["resized.0"]).expand(len(original.prompts), -1, -1, -1)
    scores = wrong(original["ids"], original["mask"], pixels)
    assert (scores - original["score.0"]).abs().max() > 1e-3


def test_every_name_and_shape_of_the_full_model():
    shapes = json.loads((FILES / "full.json").read_text())["shapes"]
    assert len(shapes) == 625
    with torch.device("meta"):
        model = ImageRewardModel()
        published = {name: torch.empty(shape) for name, shape in shapes.items()}
    model.load_state_dict(convert_names(published), strict=True)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(446.7e6, rel=2e-3)


@pytest.mark.parametrize("size", [(300, 230), (64, 80), (224, 224), (225, 512), (512, 512)])
def test_preprocessing_is_the_originals_to_8_bits(original, size):
    theirs = Compose(
        [Resize(224, interpolation=InterpolationMode.BICUBIC), CenterCrop(224), ToTensor(),
         Normalize(PIXEL_MEAN, PIXEL_STD)]
    )  # fmt: skip
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image[: size[0] // 2, ::2] = 255  # overshoots when resized
    ours = original.reward().preprocess(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255)
    steps = (ours[0] - theirs(Image.fromarray(image))) * torch.tensor(PIXEL_STD).view(3, 1, 1) * 255
    assert ours.shape == (1, 3, 224, 224)
    # Pillow rounds after each of two passes: half a step each, a little more through the kernel's negative lobes
    assert steps.abs().max() < 1.25
    assert steps.abs().mean() < 0.4


@pytest.mark.parametrize("image", range(IMAGES))
def test_scores_of_whole_images_are_the_originals_but_for_8_bit_rounding(original, image):
    pixels = original[f"image.{image}"].float()[None] / 255
    scores = original.reward().score(pixels.expand(len(original.prompts), -1, -1, -1), original.prompts)
    torch.testing.assert_close(scores, original[f"score.{image}"], atol=5e-3, rtol=0)


def test_gradient_of_the_preprocessing(original):
    reward = original.reward()
    x = 0.4 + 0.2 * torch.rand(1, 3, 12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction = torch.randn(1, 3, 224, 224, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(lambda v: (reward.preprocess(v) * direction).sum(), x.requires_grad_())


def test_gradient_of_the_score_in_double_precision(original):
    reward = original.reward().double()
    generator = torch.Generator().manual_seed(0)
    x = 0.3 + 0.4 * torch.rand(2, 3, 40, 32, dtype=torch.float64, generator=generator)
    direction = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    (gradient,) = torch.autograd.grad(reward.score(x.requires_grad_(), ["cat", ""]).sum(), x)
    with torch.no_grad():
        ahead, behind = (reward.score(x + h * direction, ["cat", ""]).sum() for h in (1e-5, -1e-5))
    assert ((ahead - behind) / 2e-5).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
)
def test_gradient_on_extreme_images(original, extreme, gradient_reaches, dtype, autocast):
    gradient_reaches(original.reward(), extreme, dtype, autocast)


def test_bfloat16_scores_are_close(original):
    images = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    exact = original.reward().score(images, original.prompts)
    rounded = original.reward().bfloat16().score(images.bfloat16(), original.prompts)
    torch.testing.assert_close(rounded, exact, atol=5e-2, rtol=0)


def test_prompts_are_tokenized_once(original):
    reward, seen = original.reward(), []
    tokenizer = reward.tokenizer
    reward.tokenizer = lambda text, **options: seen.append(text) or tokenizer(text, **options)
    images = torch.rand(3, 3, 32, 32)
    first = reward.score(images, ["cat", "grass", "cat"])
    torch.testing.assert_close(reward.score(images, ["cat", "grass", "cat"]), first)
    assert sorted(seen) == ["cat", "grass"]
    with pytest.raises(ValueError, match="prompts must be a list of one per image, 3, got 1"):
        reward.score(images, ["cat"])


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_loading(original, published, kind):
    if kind == "safetensors":
        (published / "ImageReward.pt").unlink()
        save_file({k: v.contiguous() for k, v in original.state.items()}, published / "ImageReward.safetensors")
        reward = ImageReward.from_pretrained(published / "ImageReward.safetensors")
    else:
        reward = create_reward("image-reward")
    images = torch.rand(6, 3, 48, 64)
    torch.testing.assert_close(
        reward.score(images, original.prompts), original.reward().score(images, original.prompts)
    )
    assert not any(p.requires_grad for p in reward.parameters()) and not reward.training
    assert reward.label == "image-reward"


def test_a_missing_file_is_named_with_its_places(published):
    (published / "ImageReward.pt").unlink()
    with pytest.raises(FileNotFoundError) as error:
        create_reward("image-reward")
    text = str(error.value)
    assert "ImageReward.pt (ImageReward) is not in" in text and str(published) in text
    assert "`rfsr weights fetch image-reward` gets it from" in text and "\n" not in text
    with pytest.raises(FileNotFoundError, match="'nowhere.pt' does not exist"):
        ImageReward.from_pretrained("nowhere.pt")


def test_a_missing_vocabulary_is_named(published):
    (published / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match="vocab.txt .tokenizer of ImageReward. is not in .*; with"):
        ImageReward.from_pretrained()
    (published / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    with pytest.raises(ValueError, match="tokenizer must have the vocabulary of bert-base-uncased .* got 7"):
        ImageReward.from_pretrained()


def damage(original, path, how):
    state = dict(original.state)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:100_000])
    elif how == "not weights":
        path.write_bytes(b"<!doctype html><title>404</title>" * 100)
    elif how == "code":
        torch.save({"weight": Path("x")}, path)
    elif how == "renamed":
        torch.save({"conv.weight": torch.zeros(3)}, path)
    elif how == "one missing":
        state.pop("mlp.layers.7.bias")
        torch.save(state, path)
    elif how == "wrong architecture":
        name = "blip.visual_encoder.pos_embed"
        torch.save(state | {name: torch.zeros(1, 577, 36)}, path)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("truncated", "cannot be read .*; the file is damaged or something else, fetch it again"),
        ("not weights", "cannot be read"),
        ("code", "cannot be read"),
        ("renamed", "is not ImageReward: it lacks .* tensors such as .* and has 1 unknown ones such as conv.weight"),
        ("one missing", "it lacks 1 tensors such as head.7.bias and has no unknown ones"),
        ("wrong architecture", r"of this architecture: vision.embeddings.position_embedding must have shape "
                               r"\[1, 197, 36\], got \[1, 577, 36\]"),
    ],
)  # fmt: skip
def test_wrong_files(original, published, how, sentence):
    damage(original, published / "ImageReward.pt", how)
    with pytest.raises(ValueError, match=sentence) as error:
        create_reward("image-reward")
    assert "\n" not in str(error.value)


def test_a_truncated_safetensors_file(original, published):
    path = published / "ImageReward.safetensors"
    save_file({k: v.contiguous() for k, v in original.state.items()}, path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="cannot be read"):
        ImageReward.from_pretrained(path)


def test_an_unknown_backend():
    with pytest.raises(ValueError, match="backend must be transformers or image-reward, got 'magic'"):
        ImageReward.from_pretrained(backend="magic")
