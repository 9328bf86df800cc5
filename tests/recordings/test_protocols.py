"""Every protocol on a stand-in: what it measures, row by row."""

import pytest
import torch

from rfsr_ext.data import PHOTOGRAPHS, Degradation, evaluation_crops, photographs
from rfsr_ext.evaluation import enlarge_bicubic
from rfsr_ext.losses import VGGGramLoss
from rfsr_ext.metrics import psnr
from rfsr_ext.models.catalog import PUBLISHED
from rfsr_ext.recordings import PROTOCOLS, protocols, record
from rfsr_ext.rewards import CallableReward, MiniIQA, MiniPreference
from tests.tiny import PixelModel

CONTRAST = {  # 1000 times; of the pictures of clip-iqa, mean over photographs and strengths
    "truth": 23.6, "bicubic": 11.0, "blur": 11.4, "noise": 89.6, "jpeg": 21.8, "sharpen": 62.1, "pattern": 66.9,
    "climbed": 80.9,
}  # fmt: skip


@pytest.fixture(scope="module")
def versions():
    return protocols.quality_versions()


def test_quality_is_scored_for_truth_faults_and_pattern(versions, monkeypatch):
    monkeypatch.setattr(protocols, "quality_versions", lambda: versions)  # the same, made once
    recording = record("clip-iqa", MiniIQA.from_pretrained(), {}, stand_in=False)
    rows = recording.rows
    assert recording.stand_in, "the reward says that it is one"
    assert len(rows) == 60 and set(rows["photograph"]) == set(photographs("test"))
    assert rows["score"].tolist() == rows["mini_iqa"].tolist(), "here both are MiniIQA"
    scores = rows.groupby(["version", "strength"])["score"].mean()
    assert scores["bicubic", 0] < scores["climbed", 10] < scores["climbed", 30]
    assert scores["truth", 0] > scores["blur", 0.5] > scores["blur", 1]


def test_what_quality_is_asked_of_stays_what_it_is(versions):
    """Whoever has to change these numbers changes the protocol: raise its version."""
    contrast: dict[str, list[float]] = {}
    for _, version, _, picture in versions:
        assert picture.shape == (1, 3, 256, 256) and picture.min() >= 0 and picture.max() <= 1
        contrast.setdefault(version, []).append(1000 * picture.diff(dim=-1).abs().mean().item())
    assert PROTOCOLS["clip-iqa"].version == 1
    assert {name: sum(values) / len(values) for name, values in contrast.items()} == pytest.approx(CONTRAST, rel=0.02)


def test_every_picture_meets_every_prompt():
    preference = MiniPreference.from_pretrained()
    rows = record("image-reward", preference, {}, stand_in=True).rows
    assert len(rows) == 49 and rows["own"].sum() == 7
    assert (rows["own"] == (rows["photograph"] == rows["prompt_of"])).all()
    assert rows.groupby("photograph")["score"].nunique().eq(7).all(), "every prompt has its own score"

    def words(images, prompts):
        return torch.tensor([float(len(prompt)) for prompt in prompts])

    rows = record("image-reward", CallableReward(words, "words"), {}, stand_in=True).rows
    lengths = {name: len(", ".join(photograph.tags)) for name, photograph in PHOTOGRAPHS.items()}
    assert rows["score"].tolist() == [lengths[name] for name in rows["prompt_of"]]


def test_patches_of_one_texture_are_nearer():
    recording = record("vgg19", VGGGramLoss(weights="random"), {}, stand_in=False)
    rows = recording.rows
    assert recording.stand_in, "random weights are no ImageNet's"
    assert len(rows) == 15 and rows["same"].sum() == 3
    assert rows[rows["same"]]["distance"].mean() < rows[~rows["same"]]["distance"].mean()


def test_a_model_is_measured_beside_bicubic():
    rows = record("seesr", PixelModel(), {}, stand_in=True).rows
    assert list(rows["way"]) == ["bicubic", "model"] * 3 and list(rows["photograph"][::2]) == photographs("test")
    assert {"psnr", "ssim", "judge"} < set(rows) and (rows["seconds"] > 0).all()
    (crop,) = evaluation_crops(["coffee"], 256, 1, 0, Degradation.preset("realesrgan-a"))
    wanted = psnr(enlarge_bicubic(crop["lr"][None], 4), crop["gt"][None]).item()
    assert rows["psnr"][0] == pytest.approx(wanted, rel=1e-4) and rows["psnr"][1] != rows["psnr"][0]


def test_every_published_model_has_a_protocol(monkeypatch, no_weights):
    assert PUBLISHED.keys() < PROTOCOLS.keys()
    for name in PUBLISHED:
        required = [file.path for file in PUBLISHED[name].files if not file.optional]
        assert [file for file, place in PROTOCOLS[name].files().items() if place is None] == required


def test_files_of_folders_are_listed_one_by_one(tmp_path):
    for file in ("seesr/unet/a.safetensors", "seesr/unet/config.json", "DAPE.pth"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    files = PROTOCOLS["seesr"].files(weights=tmp_path)
    assert {file for file, place in files.items() if place} == {"seesr/unet/a.safetensors", "DAPE.pth"}
    assert files["seesr/controlnet"] is None and "ram_tag_list.txt" not in files
