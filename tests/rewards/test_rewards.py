import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rfsr_ext.metrics import Judge
from rfsr_ext.rewards import MiniIQA, MiniPreference, Reward, WeightedReward, create_reward, reward_loss
from rfsr_ext.weights import WEIGHTS
from tests.tiny import tiny_tokenizer


class Constant(Reward):
    name = "constant"

    def __init__(self, values):
        super().__init__()
        self.values = values

    def score(self, images, prompts):
        return self.values


def test_reward_loss_is_the_weighted_negative_mean():
    terms = [
        WeightedReward(Constant(torch.tensor([1.0, 3.0])), 0.5),
        WeightedReward(type("Other", (Constant,), {"name": "other"})(torch.tensor([10.0, 20.0])), 0.01),
    ]
    loss, scores = reward_loss(terms, torch.zeros(2, 3, 8, 8), ["", ""])
    assert loss.item() == pytest.approx(-(0.5 * 2 + 0.01 * 15))
    assert set(scores) == {"constant", "other"}


def test_a_reward_of_the_wrong_shape_is_named():
    with pytest.raises(
        ValueError, match=r"reward 'constant' must return one score per image, shape \[2\], got \[1, 2\]"
    ):
        reward_loss([WeightedReward(Constant(torch.ones(1, 2)), 1.0)], torch.zeros(2, 3, 8, 8), ["", ""])


def test_unknown_reward():
    with pytest.raises(
        ValueError, match="reward must be one of mini-iqa, .*, pyiqa:METRIC or package.module:Name, got 'clip'"
    ):
        create_reward("clip")


@pytest.mark.parametrize("name", ["clipiqa", "clipiqa+", "pyiqa:musiq"])
def test_without_pyiqa_one_sentence_says_what_to_install(monkeypatch, name):
    for module in [module for module in sys.modules if module.partition(".")[0] == "pyiqa"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"the package pyiqa cannot be imported .*; pip install 'rfsr_ext\[rewards\]'"
    ) as error:
        create_reward(name)
    assert "\n" not in str(error.value)


def test_nothing_heavy_is_imported_before_a_reward_is_made():
    code = (
        "import sys, rfsr_ext; assert 'transformers' not in sys.modules; import rfsr_ext.rewards;"
        "heavy = {'pyiqa', 'clip', 'ImageReward', 'transformers.models.blip.modeling_blip'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("make", [MiniIQA, lambda: MiniPreference(tiny_tokenizer())])
def test_gradient_matches_finite_differences_and_sizes_are_free(make):
    torch.manual_seed(0)
    reward = make().double()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    direction = torch.randn_like(images)
    prompts = ["cat, fur", ""]

    def total(x):
        return reward.score(x, prompts).double().sum()

    gradient = torch.autograd.grad(total(images.requires_grad_()), images)[0]
    assert gradient.abs().sum() > 0
    images = images.detach()
    step = 0.5  # scores are reduced in single precision; a long step keeps the difference above its rounding
    numeric = (total(images + step * 1e-2 * direction) - total(images - step * 1e-2 * direction)) / (2 * step * 1e-2)
    assert numeric.item() == pytest.approx((gradient * direction).sum().item(), rel=2e-2, abs=1e-5)
    assert reward.score(torch.rand(1, 3, 64, 40, dtype=torch.float64), ["x"]).shape == (1,)


def test_prompts_change_the_preference_alone():
    torch.manual_seed(0)
    images = torch.rand(1, 3, 32, 32)
    preference, iqa = MiniPreference(tiny_tokenizer()), MiniIQA()
    assert preference.score(images, ["cat"]) != preference.score(images, ["rocket"])
    assert iqa.score(images, ["cat"]) == iqa.score(images, ["rocket"])


@pytest.mark.parametrize("name", ["mini-iqa", "mini-preference"])
def test_weights_are_in_single_precision_whatever_torchs_default(name):
    torch.set_default_dtype(torch.float64)
    try:
        reward = create_reward(name)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {x.dtype for x in reward.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("prompts, given", [("cat", "the text 'cat'"), (["cat"], "1"), ([], "0")])
def test_every_image_has_its_prompt(prompts, given):
    """A text is no list of letters, and one prompt is not that of all images."""
    with pytest.raises(ValueError, match=f"prompts must be a list of one per image, 3, got {given}"):
        MiniPreference(tiny_tokenizer())(torch.rand(3, 3, 32, 32), prompts)


def test_scores_of_a_batch_are_those_of_its_images():
    torch.manual_seed(0)
    images, prompts = torch.rand(3, 3, 32, 32), ["cat", "a much longer prompt than the others", ""]
    for reward in (MiniIQA(), MiniPreference(tiny_tokenizer())):
        alone = torch.cat([reward.score(images[i : i + 1], prompts[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(reward.score(images, prompts), alone)


def test_save_and_load(tmp_path):
    torch.manual_seed(0)
    reward, images = MiniIQA(), torch.rand(2, 3, 32, 32)
    reward.save_pretrained(tmp_path)
    loaded = MiniIQA.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.score(images), reward.score(images), atol=1e-3, rtol=0)  # half precision on disk
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.label == "mini-iqa (stand-in for CLIP-IQA)"
    with pytest.raises(FileNotFoundError, match="mini-preference weights .* do not exist; `rfsr mini build` makes"):
        MiniPreference.from_pretrained(tmp_path, tiny_tokenizer())


@pytest.mark.parametrize(
    ("load", "file", "other"),
    [
        (MiniIQA.from_pretrained, "rewards/mini-iqa", "judge/judge"),
        (MiniPreference.from_pretrained, "rewards/mini-preference", "rewards/mini-iqa"),
        (Judge.from_pretrained, "judge/judge", "rewards/mini-preference"),
    ],
)
def test_wrong_files_in_place_of_the_shipped_ones(tmp_path, load, file, other):
    right, wrong = ((WEIGHTS / f"{name}.safetensors").read_bytes() for name in (file, other))
    path = tmp_path / f"{Path(file).name}.safetensors"
    path.write_bytes(right)
    load(tmp_path)
    for content, sentence in ((right[:-1000], "weights .* cannot be read .*; the file is damaged or something else"),
                              (wrong, "it lacks [0-9]+ tensors such as .* and has [0-9]+ unknown ones")):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(ValueError, match=sentence) as error:
            load(tmp_path)
        assert path.name in str(error.value) and "\n" not in str(error.value)
