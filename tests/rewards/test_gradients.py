"""The gradient of the rewards without a test file of their own, and of everything composed, on extreme images.

CLIP-IQA and ImageReward: test_clip_iqa.py and test_image_reward.py.
"""

import pytest
import torch

from rfsr_ext.rewards import REWARDS, CallableReward, PyIQAReward, WeightedReward, create_reward, reward_loss

PRECISION = pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
)


@PRECISION
@pytest.mark.parametrize("name", REWARDS)
def test_small_rewards(extreme, gradient_reaches, name, dtype, autocast):
    gradient_reaches(create_reward(name), extreme, dtype, autocast)


@pytest.fixture(scope="module")
def musiq():
    pytest.importorskip("pyiqa", reason="pyiqa is not installed (pip install 'rfsr_ext[rewards]')")
    torch.manual_seed(0)
    return PyIQAReward("musiq", pretrained=False, hidden_size=48, mlp_dim=96, num_heads=2, num_layers=2)


@PRECISION
def test_a_metric_of_pyiqa(musiq, extreme, gradient_reaches, dtype, autocast):
    gradient_reaches(musiq, extreme, dtype, autocast)
    assert {p.dtype for p in musiq.parameters()} == {torch.float32}  # .to(bfloat16) moves it, and keeps its precision


@PRECISION
@pytest.mark.parametrize("balance", [False, True])
def test_compositions(extreme, dtype, autocast, balance):
    iqa, preference = (create_reward(name) for name in REWARDS)
    if not autocast:
        iqa, preference, extreme = iqa.to(dtype), preference.to(dtype), extreme.to(dtype)
    terms = [
        WeightedReward(iqa, 1.0, views=("1", "0.5", "crop-32"), normalize=True),
        WeightedReward(preference, 0.5, cap=20.0, tags="worst"),
        WeightedReward(CallableReward(lambda x, p: x.var((1, 2, 3)), "contrast"), 0.1, tags="mean", offload=True),
    ]
    for _ in range(2):  # the second time with statistics
        images = extreme.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, scores = reward_loss(terms, images, ["cat, grass"], generator=torch.Generator(), balance=balance)
        (gradient,) = torch.autograd.grad(loss, images)
        assert loss.dtype == torch.float32 and loss.isfinite()
        assert len(scores) == 3 and all(score.dtype == torch.float32 for score in scores.values())
        assert gradient.dtype == images.dtype and gradient.isfinite().all()
        assert (gradient != 0).float().mean() > 0.2
