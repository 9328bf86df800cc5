"""What the shipped weights must be able to do; the measured figures stand in their card."""

import json

import pytest
import torch

from rfsr_ext.data import DistortedCrops, PhotographCrops, evaluation_crops, photographs
from rfsr_ext.data.distortions import DISTORTIONS, INPUT_FAULTS
from rfsr_ext.evaluation import evaluate
from rfsr_ext.files import MANIFEST
from rfsr_ext.metrics import Judge
from rfsr_ext.mini.scores import similarity
from rfsr_ext.models import ControlNetISRModel, ISRModel, load_model
from rfsr_ext.rewards import create_reward
from rfsr_ext.weights import WEIGHTS


def test_they_are_small_and_have_a_card():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}]
    card = (WEIGHTS / "README.md").read_text()
    for name in ("rfsr mini build", "chelsea", "PSNR", "license"):
        assert name in card


def test_a_build_may_replace_them():
    """Each folder lists its files as ours, or the next `rfsr mini build` would refuse to write there."""
    for folder in (WEIGHTS / name for name in ("model", "rewards", "judge")):
        listed = json.loads((folder / MANIFEST).read_text())["files"]
        there = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        assert sorted([*listed, MANIFEST]) == sorted(there)


def test_the_mini_model_is_an_isr_model():
    model = load_model()
    assert isinstance(model, ISRModel)
    assert isinstance(model, ControlNetISRModel)
    assert (model.scale, model.recipe.num_inference_steps) == (4, 50)
    assert set(model.trainable_networks()) == {"unet", "controlnet"}


def held_out_versions(kinds, count=40):
    crops = PhotographCrops(photographs("test"), 64, seed=11, dead_leaves_share=0, recolor=False)
    versions = DistortedCrops(crops, kinds)
    return [versions[i] for i in range(count)]


def share_of_pairs_in_order(score, samples):
    """How often, of two versions of a picture that differ clearly in similarity, the more similar one scores higher."""
    right = total = 0
    for sample in samples:
        images = sample["images"]
        quality = similarity(images, images[:1].expand_as(images))
        with torch.no_grad():
            values = score(images, [sample["prompt"]] * len(images))
        clear = quality[:, None] > quality[None, :] + 0.05
        right += (clear & (values[:, None] > values[None, :])).sum().item()
        total += clear.sum().item()
    return right / total


@pytest.mark.parametrize("name", ["mini-iqa", "mini-preference"])
def test_rewards_rank_input_faults_of_photographs_they_never_saw(name):
    assert share_of_pairs_in_order(create_reward(name).score, held_out_versions(list(INPUT_FAULTS))) >= 0.8


def test_the_judge_also_ranks_what_rewards_invite():
    judge = Judge.from_pretrained()
    invited = [kind for kind in DISTORTIONS if kind not in INPUT_FAULTS]
    assert share_of_pairs_in_order(judge.score, held_out_versions(list(INPUT_FAULTS))) >= 0.75
    assert share_of_pairs_in_order(judge.score, held_out_versions(invited)) >= 0.75


@pytest.mark.slow
def test_the_base_model_upscales_held_out_photographs():
    frame = evaluate(load_model(), evaluation_crops(photographs("test"), 64, 12), {})
    assert frame["psnr"].mean() >= 27.6  # it reaches 27.63; bicubic enlargement reaches 27.36
