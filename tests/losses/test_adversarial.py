"""Discriminators, hinge losses and the adaptive weight against their formulas."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from rfsr_ext.losses import DINODiscriminator, PatchDiscriminator, VGG19Features, VGGFeatureLoss
from rfsr_ext.losses.adversarial import (
    adaptive_weight,
    class_token,
    hinge_discriminator_loss,
    hinge_generator_loss,
)

TINY = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}


def tiny_vit():
    torch.manual_seed(0)
    return ViTModel(ViTConfig(**TINY, image_size=224, patch_size=56), add_pooling_layer=False)


def images(n=2, side=32, seed=0):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_hinge_losses():
    real, fake = np.random.default_rng(0).normal(size=(2, 3, 1, 5, 5))
    expected = 0.5 * (np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean())
    assert hinge_discriminator_loss(*map(torch.from_numpy, (real, fake))).item() == pytest.approx(expected)
    assert hinge_generator_loss(torch.from_numpy(fake)).item() == pytest.approx(-fake.mean())


def test_the_adaptive_weight_is_the_ratio_of_gradients():
    """y = w x: with L_rec = a mean y and L_adv = b mean y the weight is a / b, up to the 1e-4; see VQGAN, eq. 7."""
    torch.manual_seed(0)
    last = nn.Linear(3, 3, bias=False, dtype=torch.float64)
    y = last(torch.randn(7, 3, dtype=torch.float64))
    gradient = torch.autograd.grad(y.mean(), last.weight, retain_graph=True)[0].norm()
    weight = adaptive_weight(6 * y.mean(), 2 * y.mean(), last.weight)
    assert weight.item() == pytest.approx((6 * gradient / (2 * gradient + 1e-4)).item()) and not weight.requires_grad
    assert adaptive_weight(y.mean(), 0 * y.mean(), last.weight).item() == pytest.approx(gradient.item() / 1e-4)
    assert adaptive_weight(1e9 * y.mean(), 0 * y.mean(), last.weight) == 1e4  # the most
    halved = adaptive_weight(6 * y.mean(), 2 * y.mean(), last.weight, average=lambda g: g / 2)
    assert halved.item() == pytest.approx((3 * gradient / (gradient + 1e-4)).item())
    y.mean().backward()  # the graph is still there


@pytest.mark.parametrize(("side", "layers", "expected"), [(512, 3, 62), (64, 3, 6), (70, 3, 6), (64, 2, 14)])
def test_patchgan_shapes(side, layers, expected):
    network = PatchDiscriminator(8, layers)
    assert network(torch.zeros(1, 3, side, side)).shape == (1, 1, expected, expected)


def test_patchgan_is_the_published_one():
    """70 pixels of receptive field, 64 to 512 channels; parameters counted by hand (Isola et al., 6.1.2)."""
    network = PatchDiscriminator()
    counts = [64 * (3 * 16 + 1), 128 * (64 * 16 + 2), 256 * (128 * 16 + 2), 512 * (256 * 16 + 2), 512 * 16 + 1]
    assert sum(p.numel() for p in network.parameters()) == sum(counts)
    small = PatchDiscriminator(4, norm="group").eval()
    small.main = nn.Sequential(*(m for m in small.main if not isinstance(m, nn.GroupNorm)))  # which see everything
    x = torch.zeros(1, 3, 128, 128, requires_grad=True)
    logits = small(x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    seen = torch.autograd.grad(logits[0, 0, 7, 7], x)[0].abs().sum((0, 1)) > 0
    rows, columns = torch.where(seen)
    assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == 70
    assert PatchDiscriminator(8, seed=3).main[0].weight.equal(PatchDiscriminator(8, seed=3).main[0].weight)
    with pytest.raises(ValueError, match="norm must be batch or group, got 'layer'"):
        PatchDiscriminator(norm="layer")


def test_group_norm_leaves_an_image_to_itself():
    x = images(3)
    network = PatchDiscriminator(8, 2, norm="group")
    torch.testing.assert_close(network(x)[1:], network(x[1:]))
    network = PatchDiscriminator(8, 2, norm="batch")
    assert (network(x)[1:] - network(x[1:])).abs().max() > 1e-3


def test_dino_logits_by_hand():
    """Without changes: averaged to 224², normalized, tapped, a head each of two convolutions and the last."""
    vit = tiny_vit()
    network = DINODiscriminator(vit, condition_width=6)
    x, c = images(), torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    seen = []  # what goes into the first block and comes out of the last
    blocks = [module for module in vit.modules() if type(module).__name__ == "ViTLayer"]
    hooks = [blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))]
    hooks.append(blocks[-1].register_forward_hook(lambda _, inputs, output: seen.append(output)))
    found = network(x, c)
    for hook in hooks:
        hook.remove()
    assert network.taps == [0, 3] and found.shape == (2, 2 * 16)
    pixels = F.interpolate((x + 1) / 2, 224, mode="area")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    states = vit((pixels - mean[:, None, None]) / std[:, None, None], output_hidden_states=True).hidden_states
    torch.testing.assert_close(seen, [states[0], states[3]])
    expected = []
    for head, state in zip(network.heads, seen, strict=True):
        tokens = (state[:, 1:] + state[:, :1]).mT
        for part in (head.first[0], head.second[0], head.last):  # singular values are near 1, up to the iterations
            largest = torch.linalg.svdvals(part.weight.detach().flatten(1))[0].item()
            assert largest == pytest.approx(1, abs=0.05)
        hidden = head.first(tokens)
        hidden = (hidden + head.second(hidden)) / 2**0.5
        expected.append(torch.einsum("nmp,nm->np", head.last(hidden), head.condition(c)) / 8)
    torch.testing.assert_close(found, torch.cat(expected, 1))
    assert not any(p.requires_grad for p in vit.parameters())
    x.requires_grad_()
    network(x, c).sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is not None for p in network.heads.parameters())


def test_dino_changes_are_a_function_of_the_image_alone():
    network = DINODiscriminator(tiny_vit())
    x = images(3, 300)

    def seeded(*seeds):
        return [torch.Generator().manual_seed(s) for s in seeds]

    with torch.no_grad():
        both = network(x, None, seeded(1, 2, 3))
        torch.testing.assert_close(both[1:], network(x[1:], None, seeded(2, 3)))
        assert (both[0] - network(x[:1], None, seeded(2))[0]).abs().max() > 1e-4
    from rfsr_ext.losses.adversarial import _changed

    ones = torch.ones(1, 3, 200, 100)
    for seed in range(20):  # at most what is moved out and cut out is missing; resized by averaging
        kept = _changed(ones, 224, torch.Generator().manual_seed(seed)).mean().item()
        assert (1 - 0.13) ** 2 - 0.045 < kept <= 1 - 0.2 * 0.2 / 4
    with pytest.raises(ValueError, match="hidden_size of the DINO network must be a multiple of 4, got 6"):
        DINODiscriminator(ViTModel(ViTConfig(**TINY | {"hidden_size": 6}), add_pooling_layer=False))


def test_class_token():
    torch.manual_seed(0)
    vit = Dinov2Model(
        Dinov2Config(**{k: v for k, v in TINY.items() if k != "intermediate_size"}, image_size=518, patch_size=259)
    )
    x = torch.rand(2, 3, 8, 8)
    expected = vit(F.interpolate(x, 518, mode="bilinear")).last_hidden_state[:, 0]
    torch.testing.assert_close(class_token(vit, x), expected)


def test_the_feature_distance_by_hand():
    loss, layers = VGGFeatureLoss("random", ("conv1_2", "conv2_1")), ("conv1_2", "conv2_1")
    a, b = ((images(2, 16, s) + 1) / 2 for s in (0, 1))
    expected = 0
    for x, y in zip(*(VGG19Features(layers, "random")(image) for image in (a, b)), strict=True):
        x, y = (f.clamp_min(0).double() for f in (x, y))
        x, y = (f / f.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12) for f in (x, y))
        expected += (x - y).square().sum(1).mean().item()
    assert loss(a, b).item() == pytest.approx(expected, rel=1e-4) and loss(a, a) == 0
    assert loss.label == "VGG19 feature distance (random VGG19, a stand-in)"
