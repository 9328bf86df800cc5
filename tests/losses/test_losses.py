import hashlib
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rfsr_ext.losses import HaarLLLoss, VGG19Features, VGGGramLoss
from rfsr_ext.weights import registry


@pytest.fixture(scope="module")
def vgg():
    return VGG19Features(weights="random")


def test_haar_module_is_the_formula():
    pred, target = torch.rand(2, 3, 8, 6), torch.rand(2, 3, 8, 6)
    bands = [2 * nn.functional.avg_pool2d(x, 2) for x in (pred, target)]
    torch.testing.assert_close(HaarLLLoss()(pred, target), (bands[0] - bands[1]).abs().mean())


def test_layers_are_the_named_convolutions_before_their_relu(vgg):
    with torch.device("meta"):
        network = torchvision.models.vgg19(weights=None).features.eval()
    ours = [module for module in vgg.features.values() if isinstance(module, nn.Conv2d)]
    theirs = [module for module in network if isinstance(module, nn.Conv2d)]
    for module, convolution in zip(theirs, ours, strict=True):
        module.load_state_dict(convolution.state_dict(), assign=True)
    images = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x, outputs = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1), {}
    block = position = 1
    for module in network:
        x = module(x)
        if isinstance(module, nn.Conv2d):
            outputs[f"conv{block}_{position}"] = x.clone()  # the next ReLU works in place
            position += 1
        elif isinstance(module, nn.MaxPool2d):
            block, position = block + 1, 1
    features = vgg(images)
    assert vgg.layers == ["conv1_2", "conv2_2", "conv3_4", "conv4_4", "conv5_4"]
    for layer, feature in zip(vgg.layers, features, strict=True):
        torch.testing.assert_close(feature, outputs[layer])
        assert (feature < 0).any()


def test_random_weights_are_seeded_and_leave_the_global_generator_alone(vgg):
    state = torch.get_rng_state()
    again = VGG19Features(("conv1_2",), weights="random")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again.features["conv1_2"].weight, vgg.features["conv1_2"].weight)
    other = VGG19Features(("conv1_2",), weights="random", seed=1)
    assert not torch.equal(other.features["conv1_2"].weight, again.features["conv1_2"].weight)


def test_random_weights_keep_the_variance_from_layer_to_layer(vgg):
    """He et al. (2015), eq. 14: the variance of the weights is 2 over kernel area times outputs."""
    for name, module in vgg.features.items():
        if isinstance(module, nn.Conv2d):
            weight, bound = module.weight, (6 / (9 * module.out_channels)) ** 0.5
            assert weight.abs().max() <= bound and weight.mean().abs() < 5 * weight.std() / weight.numel() ** 0.5, name
            assert weight.var().item() == pytest.approx(2 / (9 * module.out_channels), rel=5 / weight.numel() ** 0.5)
            assert not module.bias.any()


def test_nothing_is_drawn_that_is_not_kept():
    class Drawn(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if torch.Tag.nondeterministic_seeded in function.tags and result.device.type != "meta":
                Drawn.numbers += result.numel()
            return result

    with Drawn():
        features = VGG19Features(("conv2_2", "conv1_2"), weights="random")
    assert (
        Drawn.numbers
        == sum(p.numel() for p in features.parameters() if p.dim() == 4)
        == 9 * (3 * 64 + 64 * 64 + 64 * 128 + 128 * 128)
    )


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_random_weights_are_the_same_on_every_processor(capability):
    code = (
        "import hashlib, torch; from rfsr_ext.losses import VGG19Features\n"
        "vgg, digest = VGG19Features(weights='random'), hashlib.sha256()\n"
        "for tensor in vgg.state_dict().values(): digest.update(tensor.numpy().tobytes())\n"
        "print(torch.backends.cpu.get_cpu_capability(), digest.hexdigest())"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    used, digest = found.stdout.split()
    if used.lower() != capability:
        pytest.skip(f"this processor or this build of torch has no {capability}: it used {used}")
    assert digest == "395dde427b5c3fc60654c494997c12af9fed90e1b9112b4b01ae57706029edb4"


def test_gram_loss_is_eq_6(vgg):
    pred, target = torch.rand(2, 3, 32, 32, requires_grad=True), torch.rand(2, 3, 32, 32)
    loss = VGGGramLoss(weights="random")
    value = loss(pred, target)
    expected = 0
    for weight, f, g in zip([0.1, 0.1, 1, 1, 1], vgg(pred), vgg(target), strict=True):
        n, c, h, w = f.shape
        f, g = f.reshape(n, c, h * w), g.reshape(n, c, h * w)
        expected = expected + weight * ((f @ f.mT - g @ g.mT) / (c * h * w)).square().sum((1, 2)).mean()
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-8)
    gradients = [torch.autograd.grad(v, pred, retain_graph=True)[0] for v in (value, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-7)
    assert loss(target, target) == 0
    assert loss.label == "Gram loss (random VGG19, a stand-in)"


@pytest.mark.parametrize("layer_norm", [False, True], ids=["raw", "layer_norm"])
@pytest.mark.parametrize("criterion", ["l2", "l1", "fro"])
def test_gram_loss_takes_its_options_and_a_cached_target(vgg, criterion, layer_norm):
    pred, target = torch.rand(2, 2, 3, 32, 32)
    loss = VGGGramLoss({"conv1_2": 0.5, "conv2_2": 2.0}, "random", criterion, layer_norm)
    features = [[f.flatten(2) for f in vgg(x)[:2]] for x in (pred, target)]
    expected = 0
    for weight, f, g in zip([0.5, 2.0], *features, strict=True):
        if layer_norm:
            f, g = (nn.functional.layer_norm(x, x.shape[1:]) for x in (f, g))
        d = (f @ f.mT - g @ g.mT) / f[0].numel()
        sums = {"l2": d.square(), "l1": d.abs(), "fro": d.square()}[criterion].sum((1, 2))
        expected = expected + weight * (sums.sqrt() if criterion == "fro" else sums).mean()
    torch.testing.assert_close(loss(pred, target), expected, rtol=1e-4, atol=1e-7)
    cached = loss.target_gram(target)
    assert not any(gram.requires_grad for gram in cached)
    torch.testing.assert_close(loss(pred, target_gram=cached), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("images", "error", "sentence"),
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "got torch.uint8; divide 8-bit images by 255"),
        (torch.zeros(3, 32, 32), ValueError, r"must be \[N, 3, H, W\], .* got shape \(3, 32, 32\)"),
        (torch.zeros(1, 4, 32, 32), ValueError, r"must be \[N, 3, H, W\], .* got shape \(1, 4, 32, 32\)"),
        (torch.zeros(1, 3, 32, 15), ValueError, "at least 16 pixels high and wide for these layers"),
    ],
    ids=["uint8", "no batch", "alpha", "small"],
)
def test_images_that_are_none_get_one_sentence(vgg, images, error, sentence):
    with pytest.raises(error, match=sentence):
        vgg(images)


def test_the_smallest_images_are_taken(vgg):
    assert vgg(torch.rand(1, 3, 16, 16))[-1].shape == (1, 512, 1, 1)


def test_no_layers_are_refused():
    with pytest.raises(ValueError, match="layers must be at least one of"):
        VGGGramLoss({}, "random")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_images_are_taken_to_the_networks_dtype(dtype):
    loss, (pred, target) = VGGGramLoss({"conv1_2": 1.0}, "random"), torch.rand(2, 1, 3, 16, 16, dtype=dtype)
    torch.testing.assert_close(loss(pred, target), loss(pred.float(), target.float()))
    loss.to(torch.bfloat16)(pred, target)


def test_defaults_of_torch_do_not_divide_a_network():
    """Its weights are drawn in single precision on the CPU; all of it is of that type, on the default device."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            tensors = VGG19Features(["conv1_2"], weights="random").state_dict().values()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {(x.dtype, x.device.type) for x in tensors} == {(torch.float32, "meta")}


def test_unknown_criterion_is_refused():
    with pytest.raises(ValueError, match="criterion must be 'l2', 'l1' or 'fro', got 'huber'"):
        VGGGramLoss(weights="random", criterion="huber")


def test_missing_imagenet_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RFSR_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(
        FileNotFoundError, match=rf"vgg19-dcbb9e9d.pth .* is not in {tmp_path} or .* or choose weights='random'"
    ):
        VGGGramLoss()


def test_damaged_imagenet_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RFSR_WEIGHTS", str(tmp_path))
    (tmp_path / "vgg19-dcbb9e9d.pth").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="is damaged or another file: its SHA-256 must start with dcbb9e9d"):
        VGGGramLoss()


def test_imagenet_weights_are_loaded_from_torchvisions_file(tmp_path, monkeypatch):
    """With a file of torchvision's keys but other numbers, and its hash."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network = torchvision.models.vgg19(weights=None)
    torch.save(network.state_dict(), tmp_path / "vgg19-dcbb9e9d.pth")
    monkeypatch.setenv("RFSR_WEIGHTS", str(tmp_path))

    digest = hashlib.sha256((tmp_path / "vgg19-dcbb9e9d.pth").read_bytes()).hexdigest()
    monkeypatch.setitem(registry.FILES, "vgg19", replace(registry.FILES["vgg19"], sha256=digest))
    features = VGG19Features(("conv2_2",))
    assert torch.equal(features.features["conv2_2"].weight, network.features[7].weight)
    assert not any(p.requires_grad for p in features.parameters())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"weights": "caffe"}, "weights must be 'imagenet' or 'random', got 'caffe'"),
        ({"layers": ("conv9_9",), "weights": "random"}, "layers must be among .*, got 'conv9_9'"),
    ],
)
def test_sentences(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        VGG19Features(**arguments)
