import pytest
import torch
import torch.nn.functional as F

from rfsr_ext.rewards import CallableReward, WeightedReward, check_rewards, reward_loss
from rfsr_ext.rewards.compose import RunningStatistics


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def contrast(images, prompts):
    return 10 * images.var((1, 2, 3))


def words(images, prompts):
    return images.mean((1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])


def term(function=brightness, weight=1.0, **options):
    return WeightedReward(CallableReward(function, function.__name__), weight, **options)


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gradient(terms, images, **options):
    x = images.clone().requires_grad_()
    loss, scores = reward_loss(terms, x, ["a", "b, cc", ""], **options)
    return torch.autograd.grad(loss, x)[0], loss.detach(), scores


def test_the_loss_has_the_value_and_gradient_of_the_plain_sum(images):
    ours, loss, scores = gradient([term(weight=0.5), term(contrast, weight=-0.2)], images)
    x = images.clone().requires_grad_()
    plain = -0.5 * brightness(x, None).mean() + 0.2 * contrast(x, None).mean()
    torch.testing.assert_close(ours, torch.autograd.grad(plain, x)[0])
    torch.testing.assert_close(loss, plain.detach())
    assert set(scores) == {"brightness", "contrast"} and not scores["contrast"].requires_grad


def test_the_gradient_goes_on_through_what_made_the_images(images):
    def loss(x):
        return reward_loss([term(contrast)], (3 * x).sigmoid(), ["", "", ""])[0]

    assert torch.autograd.gradcheck(loss, images.clone().requires_grad_())


def test_one_rewards_graph_is_gone_before_the_next_is_scored(images):
    alive = []

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            alive.append("forward")
            return x.mean((1, 2, 3))

        @staticmethod
        def backward(ctx, grad):
            alive.append("backward")
            return grad.view(-1, 1, 1, 1).expand(3, 3, 16, 12) / (3 * 16 * 12)

    terms = [WeightedReward(CallableReward(lambda x, p: Kept.apply(x), name), 1.0) for name in "ab"]
    gradient(terms, images)
    assert alive == ["forward", "backward"] * 2


def test_a_cap_stops_the_gradient_of_images_above_it(images):
    bright = images.clone()
    bright[0] = 0.9
    ours, loss, scores = gradient([term(cap=0.8)], bright)
    assert not ours[0].any() and (ours[1:] < 0).all()
    torch.testing.assert_close(loss, F.relu(0.8 - scores["brightness"]).mean())
    uncapped, _, _ = gradient([term()], images)
    torch.testing.assert_close(gradient([term(cap=2.0)], images)[0], uncapped)  # never reached: as without


def test_steps_decide_which_terms_count(images):
    terms = [term(steps=(4, 5)), term(contrast)]
    assert set(gradient(terms, images, step=3)[2]) == {"contrast"}
    assert set(gradient(terms, images, step=5)[2]) == {"brightness", "contrast"}
    nothing, loss, scores = gradient(terms[:1], images, step=3)
    assert not nothing.any() and loss == 0 and scores == {}


def test_balancing_makes_the_weights_the_shares_of_the_gradient(images):
    alone = [gradient([term(function)], images)[0] for function in (brightness, contrast)]
    target = sum(part.norm() for part in alone) / 2
    balanced, _, _ = gradient([term(weight=0.75), term(contrast, weight=0.25)], images, balance=True)
    wanted = sum(w * part / part.norm() * target for w, part in zip((0.75, 0.25), alone, strict=True))
    torch.testing.assert_close(balanced, wanted)
    capped, _, _ = gradient([term(cap=-1.0), term(contrast)], images, balance=True)  # the first has no gradient
    torch.testing.assert_close(capped, alone[1])


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_in_single_precision_whatever_the_images_are(images, dtype, balance):
    ours, loss, scores = gradient([term(), term(contrast)], images.to(dtype), balance=balance)
    assert (ours.dtype, loss.dtype, scores["contrast"].dtype) == (dtype, torch.float32, torch.float32)


def test_running_statistics_are_exponential_averages():
    statistics = RunningStatistics(decay=0.5)
    assert statistics(torch.tensor([3.0])).item() == 3.0
    statistics.update(torch.tensor([1.0, 3.0]))
    assert (statistics.mean, statistics.variance) == (2.0, 0.5 * 1 + 0.5 * 1)
    statistics.update(torch.tensor([float("nan"), 0.0]))
    assert (statistics.mean, statistics.variance) == (2.0, 1.0)
    statistics.update(torch.tensor([6.0, 6.0]))
    assert (statistics.mean, statistics.variance) == (4.0, 0.5 * 1 + 0.5 * 4)
    assert statistics(torch.tensor([4.0])).item() == 0.0
    again = RunningStatistics()
    again.load(statistics.state())
    assert again.state() == statistics.state()
    steady = RunningStatistics()
    for _ in range(2000):
        steady.update(5 + 0.1 * torch.randn(64, generator=torch.Generator().manual_seed(0)))
    assert steady.mean == pytest.approx(5, abs=0.05) and steady.variance == pytest.approx(0.01, rel=0.3)


def test_normalizing_divides_the_gradient_by_the_deviation(images):
    normal = term(normalize=True)
    plain, _, _ = gradient([term()], images)
    for _ in range(3):
        ours, _, scores = gradient([normal], images)
        torch.testing.assert_close(ours, plain / normal.statistics.variance**0.5)
    torch.testing.assert_close(scores["brightness"], brightness(images, None))  # as the reward gave them


def test_looking_at_the_loss_leaves_the_statistics_alone(images):
    normal = term(normalize=True)
    gradient([normal], images)
    before = normal.statistics.state()
    with torch.no_grad():
        reward_loss([normal], images + 1, ["", "", ""])
    assert normal.statistics.state() == before


@pytest.mark.parametrize(("tags", "wanted"), [("mean", [1.0, 1.5, 0.0]), ("worst", [1.0, 1.0, 0.0])])
def test_tags(tags, wanted):
    found = term(words, tags=tags).score(torch.zeros(3, 3, 4, 4), ["a", "b, cc,", ""])
    torch.testing.assert_close(found, torch.tensor(wanted))


def test_views_are_averaged_and_crops_belong_to_their_generators(images):
    seen = []

    def look(x, prompts):
        seen.append(x.detach().clone())
        return contrast(x, prompts)

    both = term(look, views=("1", "0.5", "crop-8"))

    def generators():
        return [torch.Generator().manual_seed(i) for i in range(3)]

    score = both.score(images, ["", "", ""], generators())
    torch.testing.assert_close(seen[0], images)
    torch.testing.assert_close(seen[1], F.interpolate(images, (8, 6), mode="bilinear", antialias=True))
    assert seen[2].shape == (3, 3, 8, 8)
    for crop, image in zip(seen[2], images, strict=True):
        assert any(torch.equal(crop, image[:, t : t + 8, s : s + 8]) for t in range(9) for s in range(5))
    torch.testing.assert_close(score, torch.stack([contrast(x, None) for x in seen]).mean(0).float().double())
    torch.testing.assert_close(both.score(images, ["", "", ""], generators()), score)
    alone = both.score(images[1:2], [""], generators()[1:2])
    torch.testing.assert_close(alone, score[1:2])
    assert len({tuple(term(look, views=("crop-4",)).score(images, ["", "", ""]).tolist()) for _ in range(5)}) > 1
    with pytest.raises(ValueError, match="views: crop-13 does not fit into images of 16 x 12 pixels"):
        term(views=("crop-13",)).score(images, ["", "", ""])


def test_gradients_reach_the_images_through_every_view(images):
    x = images[:, :, :6, :6].clone().requires_grad_()
    views = term(contrast, views=("1", "0.7", "crop-4", "crop-6"), tags="worst")
    generator = torch.Generator()

    def total(v):
        return reward_loss([views], v, ["a, b", "c", ""], generator=generator.manual_seed(0))[0]

    assert torch.autograd.gradcheck(total, x)


def test_offloading_brings_the_reward_in_and_out_again():
    """Images on the meta device stand for those on a GPU."""
    layer = torch.nn.Conv2d(3, 1, 3)
    weight, seen = layer.weight, []

    def score(images, prompts):
        seen.append(layer.weight.device.type)
        return layer(images).mean((1, 2, 3))

    reward = CallableReward(score, "layer")
    reward.layer = layer
    x = torch.rand(1, 3, 8, 8, device="meta")
    away = WeightedReward(reward, 1.0, offload=True)
    reward_loss([away], x, [""])
    away.measure(x, [""])
    assert seen == ["meta", "meta"] and layer.weight is weight
    away.reward.function = lambda images, prompts: score(images, prompts).no_such_thing
    with pytest.raises(AttributeError, match="no_such_thing"):
        away.measure(x, [""])
    assert len(seen) == 3 and layer.weight is weight
    with WeightedReward(reward, 1.0).on(x.device):
        assert layer.weight is weight


@pytest.mark.cuda
def test_offloading_on_a_gpu():
    reward = CallableReward(lambda x, p: layer(x).mean((1, 2, 3)), "layer")
    layer = reward.layer = torch.nn.Conv2d(3, 1, 3)
    x = torch.rand(1, 3, 8, 8, device="cuda", requires_grad=True)
    loss, _ = reward_loss([WeightedReward(reward, 1.0, offload=True)], x, [""])
    assert layer.weight.device.type == "cpu"
    assert torch.autograd.grad(loss, x)[0].abs().sum() > 0


def test_rewards_without_a_gradient_are_refused(images):
    for function in (lambda x, p: x.detach().mean((1, 2, 3)), lambda x, p: torch.ones(3, requires_grad=True)):
        flat = WeightedReward(CallableReward(function, "flat"), 1.0)
        with pytest.raises(ValueError, match="reward 'flat' has no gradient .* leave it to a preference trainer"):
            gradient([flat], images)
        reward_loss([flat], images, ["", "", ""])  # nothing asked for a gradient
    declared = WeightedReward(CallableReward(brightness, "declared", differentiable=False), 1.0)
    with pytest.raises(ValueError, match="reward 'declared' has no gradient .* leave it to a preference trainer"):
        check_rewards([declared], (1, 5))


def test_lower_is_better_turns_the_sign(images):
    reward = CallableReward(brightness, "darkness", higher_is_better=False)
    torch.testing.assert_close(reward.score(images, []), -brightness(images, None))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"weight": float("nan")}, "weight must be a finite number, got nan"),
        ({"cap": float("inf")}, "cap must be a finite number or None, got inf"),
        ({"steps": (3, 2)}, r"steps must be \[first, last\] with 1 <= first <= last, got \[3, 2\]"),
        ({"tags": "median"}, "tags must be mean or worst, got 'median'"),
        ({"views": ()}, "views must name at least one view, got none"),
        ({"views": ("1.5",)}, "views must be factors up to 1, such as 0.5, or crops, such as crop-256, got '1.5'"),
        ({"views": ("crop-0",)}, "views must be factors"),
    ],
)
def test_sentences(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        term(**options)


def test_terms_that_cannot_work_together():
    with pytest.raises(ValueError, match="rewards must have different names, got 'brightness' 2 times"):
        check_rewards([term(), term()], (1, 5))
    with pytest.raises(ValueError, match=r"steps of reward 'brightness' must overlap the reward window \[4, 5\]"):
        check_rewards([term(steps=(1, 3))], (4, 5))
    check_rewards([term(steps=(1, 4)), term(contrast)], (4, 5))
    check_rewards([], None)
