import numpy as np
import pytest
import torch

from rfsr_ext.metrics import Judge
from rfsr_ext.metrics.judge import natural_scene_statistics


def test_statistics_are_finite_even_for_blank_images():
    for images in (torch.zeros(2, 3, 32, 32), torch.ones(1, 3, 33, 47), torch.rand(2, 3, 64, 64)):
        assert natural_scene_statistics(images).isfinite().all()


def test_statistics_of_a_batch_are_those_of_its_images():
    images = torch.rand(3, 3, 48, 40)
    alone = torch.cat([natural_scene_statistics(images[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(natural_scene_statistics(images), alone, atol=1e-5, rtol=1e-4)


def test_the_finest_haar_spread_is_what_numpy_says():
    import pywt

    image = torch.rand(1, 3, 32, 32)
    luma = np.tensordot([0.299, 0.587, 0.114], image[0].numpy(), 1)
    _, details = pywt.dwt2(luma, "haar")
    spreads = sorted(np.log(np.sqrt((band**2).mean()) + 1e-4) for band in details)
    statistics = natural_scene_statistics(image)[0]
    for spread in spreads:
        assert (statistics - spread).abs().min() < 1e-4


def test_the_judge_gives_no_gradient():
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    assert not Judge().score(images).requires_grad


def test_too_small_images():
    with pytest.raises(ValueError, match=r"images must be at least 32 pixels high and wide, got \[31, 64\]"):
        Judge().score(torch.rand(1, 3, 31, 64))


def test_save_and_load(tmp_path):
    judge, images = Judge(), torch.rand(2, 3, 40, 40)
    judge.save_pretrained(tmp_path)
    torch.testing.assert_close(Judge.from_pretrained(tmp_path).score(images), judge.score(images))
    with pytest.raises(FileNotFoundError, match="judge weights .* do not exist"):
        Judge.from_pretrained(tmp_path / "elsewhere")
