"""Images on which a gradient may fail."""

import pytest
import torch

EXTREMES = {
    "black": torch.zeros(1, 3, 64, 48),
    "white": torch.ones(1, 3, 64, 48),
    "constant": torch.full((1, 3, 64, 48), 0.4),
    "noise": torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(0)),
}


@pytest.fixture(params=EXTREMES, scope="session")
def extreme(request):
    return EXTREMES[request.param]


@pytest.fixture
def gradient_reaches():
    """Check that a reward's gradient is finite and not zero all over, with weights and images of a type."""

    def check(reward, images, dtype, autocast=False):
        if not autocast:
            reward = reward.to(dtype)
            images = images.to(dtype)
        images = images.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            score = reward.score(images, ["cat, grass"])
        assert score.shape == (1,) and score.dtype == torch.float32 and score.isfinite().all()
        (gradient,) = torch.autograd.grad(score.sum(), images)
        assert gradient.dtype == images.dtype and gradient.isfinite().all()
        assert gradient.abs().sum() > 0
        assert (gradient != 0).float().mean() > 0.2

    return check
