"""Candidates scored once by metrics, rewards and pyiqa's; what is scored again, and what is refused."""

import pytest
import torch

from rfsr_ext.data.candidates import CandidateFolder
from rfsr_ext.evaluation import Measure, create_measures, gaps_figure, score_candidates
from rfsr_ext.evaluation.preferences import extremes_figure
from rfsr_ext.metrics import psnr, ssim
from rfsr_ext.rewards import MiniIQA
from rfsr_ext.rewards.ranking import HybridReward, pair_candidates
from rfsr_ext.sampling import decode_candidates, sample_candidates
from tests.tiny import PixelModel
from tests.training.conftest import TinyData


@pytest.fixture(scope="module")
def model():
    return PixelModel()


@pytest.fixture
def candidates(model, tmp_path):
    sample_candidates(model, TinyData(), tmp_path, 2, 3)
    return CandidateFolder(tmp_path)


def counting(name, **options):
    """A measure, and a list that gets the number of images it is given."""
    calls = []
    return Measure(name, lambda sr, gt, prompts: calls.append(len(sr)) or sr.mean((1, 2, 3)), **options), calls


def test_scores_are_the_metrics_of_the_decoded_candidates(model, candidates):
    measures = create_measures(("psnr", "ssim"), ("mini-iqa", "judge"))
    scores = score_candidates(model, candidates, measures, batch_size=2)
    assert scores.lower_better == frozenset()
    reward = MiniIQA.from_pretrained()
    for group in range(2):
        lr, gt = candidates.images(group)
        images = decode_candidates(model, candidates.latents(group)[0], lr, batch_size=2)
        in_batches = torch.cat([reward.score(part, None) for part in images.split(2)])
        wanted = {"psnr": psnr(images, gt.expand_as(images)), "ssim": ssim(images, gt.expand_as(images)),
                  "mini-iqa": in_batches}  # fmt: skip
        for name, values in wanted.items():
            assert torch.equal(scores.values[name][group], values.float())
    rewards = HybridReward(("psnr", "ssim"), ("mini-iqa",))(scores.values, scores.lower_better)
    assert extremes_figure(model, candidates, scores, rewards, [1, 0]).texts
    pairs = pair_candidates(rewards, 1)
    assert len(gaps_figure(pairs.gaps, rewards.std(1)).axes) == 2


def test_nothing_is_scored_twice(model, candidates):
    first, calls = counting("first", lower_better=True)
    before = score_candidates(model, candidates, [first])
    assert calls == [3, 3]
    second, others = counting("second")
    both = score_candidates(model, CandidateFolder(candidates.folder), [first, second])
    assert calls == [3, 3] and others == [3, 3]
    assert both.lower_better == {"first"} and torch.equal(both.values["first"], before.values["first"])
    score_candidates(model, candidates, [second])  # keeps the other one's
    score_candidates(model, candidates, [first, second])
    assert calls == [3, 3] and others == [3, 3]


def test_what_has_changed_is_scored_again(model, candidates, caplog):
    first, calls = counting("first", label="version 1")
    score_candidates(model, candidates, [first])
    score_candidates(model, candidates, [counting("first", label="version 2")[0]])
    assert "first was scored as 'version 1' before and is now 'version 2', so it is scored again" in caplog.text
    again, calls = counting("first", label="version 2")
    manifest = candidates.folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace(candidates.digest(1), "1" * 64))  # as if others had been sampled
    score_candidates(model, CandidateFolder(candidates.folder), [again])
    assert calls == [3]


def test_an_interrupted_scoring_keeps_what_is_written(model, candidates, monkeypatch):
    monkeypatch.setattr("rfsr_ext.evaluation.preferences._EVERY", -1)
    calls = []

    def score(sr, gt, prompts):
        if len(calls) == 1:
            calls.append(0)
            raise KeyboardInterrupt
        calls.append(len(sr))
        return sr.mean((1, 2, 3))

    with pytest.raises(KeyboardInterrupt):
        score_candidates(model, candidates, [Measure("first", score)])
    score_candidates(model, candidates, [Measure("first", score)])
    assert calls == [3, 0, 3]


def test_sentences(model, candidates):
    bad = Measure("moody", lambda sr, gt, prompts: sr.mean((1, 2, 3)).masked_fill(torch.arange(3) == 1, torch.nan))
    with pytest.raises(ValueError, match=r"moody gives nan for candidate 1 in '.*000000'; leave the metric out"):
        score_candidates(model, candidates, [bad])
    with pytest.raises(
        ValueError, match="full_reference must name metrics that compare with the ground truth, got 'ju"
    ):
        create_measures(("judge",), ())
    with pytest.raises(ValueError, match="no_reference must name metrics that do not compare with the .*, got 'psnr'"):
        create_measures((), ("psnr",))
    with pytest.raises(ValueError, match="reward must be one of .* got 'psrn'"):
        create_measures((), ("psrn",))
    (candidates.folder / "000000/latents.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="`rfsr preferences sample` makes them"):
        score_candidates(model, candidates, [counting("first")[0]])


def test_pyiqas_metrics_of_both_kinds(model, candidates):
    pytest.importorskip("pyiqa", reason="pyiqa is not installed (pip install 'rfsr_ext[metrics]')")
    measures = create_measures(("pyiqa:gmsd",), ("pyiqa:entropy",))
    scores = score_candidates(model, candidates, measures)
    assert scores.lower_better == {"pyiqa:gmsd"}
    assert all(values.isfinite().all() for values in scores.values.values())
    with pytest.raises(ValueError, match="no_reference must name metrics that do not compare"):
        create_measures((), ("pyiqa:gmsd",))
