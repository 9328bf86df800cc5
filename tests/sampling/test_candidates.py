"""Candidates: their noise, what is kept of them, interruptions, and files that have gone."""

import json

import pytest
import torch

from rfsr_ext.data.candidates import CandidateFolder
from rfsr_ext.sampling import candidates as module
from rfsr_ext.sampling import decode_candidates, generators, sample, sample_candidates
from tests.tiny import PixelModel
from tests.training.conftest import TinyData


@pytest.fixture(scope="module")
def model():
    return PixelModel()


@pytest.fixture
def folder(model, tmp_path):
    sample_candidates(model, TinyData(), tmp_path / "set", 3, 4, seed=7, batch_size=3)
    return tmp_path / "set"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("[!.]*.*")}


def test_each_candidate_is_a_sample_of_its_own_noise(model, folder):
    found = CandidateFolder(folder)
    assert (len(found), found.candidates) == (3, 4)
    for group in range(3):
        latents, prompt = found.latents(group)
        lr, gt = found.images(group)
        assert latents.dtype == torch.float16 and latents.shape == (4, 3, 32, 32)
        assert prompt == TinyData()[group]["prompt"]
        assert (gt - TinyData()[group]["gt"]).abs().max() <= 0.5 / 255 + 1e-6
        for number in range(4):
            noise = generators(7, [group + number * 2**32])
            wanted = sample(model, lr[None], [prompt], noise)
            torch.testing.assert_close(model.decode(latents[number : number + 1].float()).clamp(0, 1), wanted,
                                       atol=2e-3, rtol=0)  # fmt: skip
        assert len({tuple(x.flatten().tolist()) for x in latents}) == 4
        chosen, _ = found.latents(group, [2, 0])
        assert torch.equal(chosen, latents[[2, 0]])


def test_pictures_are_as_upscaling_gives_them(folder):
    fixed = PixelModel()
    fixed.recipe = fixed.recipe.replace(color_fix="adain")
    found = CandidateFolder(folder)
    latents, lr = found.latents(0)[0], found.lr(0)
    images = decode_candidates(fixed, latents, lr, batch_size=3)
    assert torch.equal(images, (images * 255).round() / 255)
    torch.testing.assert_close(images.mean((2, 3)), lr.mean((1, 2)).expand(4, 3), atol=0.05, rtol=0)
    fixed.recipe = fixed.recipe.replace(color_fix=None)
    plain = fixed.decode(latents.float()).clamp(0, 1)
    assert (decode_candidates(fixed, latents, lr) - plain).abs().max() <= 0.5 / 255 + 1e-6


def test_an_interrupted_sampling_goes_on_and_a_finished_one_has_nothing_to_do(model, folder, tmp_path, monkeypatch):
    made, group = [], module._group

    def interrupted(model, sample, number, *rest):
        if made == [0]:
            raise KeyboardInterrupt
        made.append(number)
        return group(model, sample, number, *rest)

    monkeypatch.setattr(module, "_group", interrupted)
    arguments = (model, TinyData(), tmp_path / "again", 3, 4)
    with pytest.raises(KeyboardInterrupt):
        sample_candidates(*arguments, seed=7, batch_size=3)
    with pytest.raises(FileNotFoundError, match="are not there; `rfsr preferences sample` makes them"):
        CandidateFolder(tmp_path / "again")
    made.append(None)
    sample_candidates(*arguments, seed=7, batch_size=3)
    assert made == [0, None, 1, 2]
    assert contents(tmp_path / "again") == contents(folder)
    sample_candidates(*arguments, seed=7, batch_size=3)
    assert made == [0, None, 1, 2]


def test_a_file_that_has_gone_is_named_and_made_again(model, folder):
    found, before = CandidateFolder(folder), contents(folder)
    (folder / "000001/latents.safetensors").unlink()
    for act in (lambda: CandidateFolder(folder), lambda: found.latents(1)):
        with pytest.raises(FileNotFoundError, match=r"000001/latents.safetensors' are not there; `rfsr preferences"):
            act()
    (folder / "000002/lr.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"000002/lr.png"):
        found.lr(2)
    sample_candidates(model, TinyData(), folder, 3, 4, seed=7, batch_size=3)
    assert contents(folder) == before


def test_sentences(model, folder, tmp_path):
    with pytest.raises(ValueError, match="made with another seed"):
        sample_candidates(model, TinyData(), folder, 3, 4, seed=8)
    with pytest.raises(FileNotFoundError, match="holds no candidates; `rfsr preferences sample` makes them"):
        CandidateFolder(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {}}))
    with pytest.raises(ValueError, match="is no manifest of candidates"):
        CandidateFolder(tmp_path)
    found, path = CandidateFolder(folder), folder / "000000/latents.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"must hold 4 candidates \(.*delete it and run `rfsr preferences sample`"):
        found.latents(0)
    with pytest.raises(FileExistsError, match="was changed after rfsr wrote it"):
        sample_candidates(model, TinyData(), folder, 3, 4, seed=7, batch_size=3)
