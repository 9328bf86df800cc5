"""pyiqa's metrics from files: random weights in the published places and forms, made by pyiqa's own architectures.

The networks are narrower than the published ones; pyiqa's classes, its loaders and the registry are the real ones.
"""

import dataclasses
import hashlib
import shutil
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rfsr_ext.data import evaluation_crops
from rfsr_ext.metrics import METRICS, PRESETS, Preset, Suite
from rfsr_ext.rewards import CLIPIQA, PyIQAReward, create_reward
from rfsr_ext.weights import registry
from rfsr_ext.weights.registry import FILES, METRIC_FILES

pytest.importorskip("pyiqa", reason="pyiqa is not installed (pip install 'rfsr_ext[metrics]')")

import pyiqa  # noqa: E402
import scipy.io  # noqa: E402
import timm  # noqa: E402
import torchvision  # noqa: E402

from rfsr_ext.weights.pyiqa import import_pyiqa  # noqa: E402
from tests.rewards import tiny  # noqa: E402

clip = import_pyiqa("pyiqa.archs.clip_imports").clip
NAMES = [name for name in METRIC_FILES if name not in CLIPIQA.VARIANTS[1:]]  # those: tests/rewards/test_clip_iqa.py
NARROW = {
    "maniqa": {"embed_dim": 24, "num_heads": [2, 2], "dim_mlp": 48, "test_sample": 1},
    "musiq": {"hidden_size": 24, "mlp_dim": 48, "num_heads": 2, "num_layers": 2},
    "topiq": {"inter_dim": 32, "num_heads": 2},
}
TRUNKS = {  # timm's model, what stands for it here, and its sizes
    "vit_base_patch8_224": ("vit_base_patch8_224", {"depth": 10, "embed_dim": 24, "num_heads": 2}),
    "resnet50": ("resnet10t", {}),
    "inception_resnet_v2": ("resnet10t", {}),
}
KEYS = {"nima": "params", "topiq_nr": "params", "topiq_fr": "params"}  # whose state dict lies under a key
HEADS = {"lpips": "lin", "lpips-vgg": "lin", "dists": ("alpha", "beta")}  # whose file holds no trunk
CPU = torch.device("cpu")


def timm_model(name, **options):
    """timm's model under that name: narrower, and from the very repository on the hub."""
    model, sizes = TRUNKS[name]
    overlay = {"hf_hub_id": timm.models.get_pretrained_cfg(name).hf_hub_id}
    return create_model(model, **options, **sizes, pretrained_cfg_overlay=overlay)


def torchvision_model(name, weights=None):
    """Without the fully connected layers, nine tenths of VGG16, which neither LPIPS nor DISTS has any use for."""
    options = {} if weights or name == "alexnet" else {"init_weights": False}
    with mock.patch("torch.nn.Linear", torch.nn.Identity):
        return MODELS[name](weights=weights, **options)


create_model = timm.create_model
MODELS = {"alexnet": torchvision.models.alexnet, "vgg16": torchvision.models.vgg16}


@pytest.fixture(scope="module", autouse=True)
def narrow():
    """Every network at a small size."""
    with pytest.MonkeyPatch.context() as patch:
        configs = import_pyiqa("pyiqa.default_model_configs").DEFAULT_CONFIGS
        for name in NAMES:
            options = next((options for kind, options in NARROW.items() if name.startswith(kind)), {})
            patch.setitem(configs[name], "metric_opts", configs[name]["metric_opts"] | options)
        patch.setattr(timm, "create_model", timm_model)
        for name in MODELS:
            patch.setattr(torchvision.models, name, partial(torchvision_model, name))
        yield


def random_network(name, folder):
    """The metric by pyiqa itself, with random weights, and its file as the publisher has it."""
    path = folder / FILES[METRIC_FILES[name][-1]].file
    if name == "niqe":
        rng = np.random.default_rng(0)
        spread = rng.normal(size=(36, 40))
        scipy.io.savemat(path, {"mu_prisparam": rng.random((1, 36)), "cov_prisparam": spread @ spread.T / 40})
        return pyiqa.create_metric(name, device=CPU, pretrained_model_path=path)
    if name == "brisque":
        torch.save((10 * torch.randn(50, 1), torch.randn(50, 36)), path)
        return pyiqa.create_metric(name, device=CPU, pretrained_model_path=path)
    if name == "clipiqa":
        network = tiny.clip_network("RN50")
        torch.save(network.state_dict(), path)
        with mock.patch("pyiqa.archs.clipiqa_arch.load", lambda *_: network):
            return pyiqa.create_metric(name, device=CPU)
    if name == "laion_aes":
        network = tiny.clip_network("ViT-L/14")
        tiny.save_archive(network, folder / FILES["clip-vit-l14"].file)
        network = clip.model.build_model(dict(network.state_dict())).float()
        with mock.patch.object(clip, "load", lambda *_: (network, None)):
            metric = pyiqa.create_metric(name, pretrained=False, device=CPU)
        torch.save(metric.net.mlp.state_dict(), path)
        return metric
    options = {"num_class": 10} if name == "musiq-ava" else {}
    with mock.patch.object(timm, "create_model", lambda name, **more: timm_model(name, **more | {"pretrained": False})):
        metric = pyiqa.create_metric(name, pretrained=False, device=CPU, **options)
    if name.startswith("maniqa"):
        torch.nn.init.ones_(metric.net.fc_score[3].bias)  # ends in relu, which random weights may well leave at zero
    state = metric.net.state_dict()
    if name in HEADS:
        state = {key: value for key, value in state.items() if key.startswith(HEADS[name]) and "lins" not in key}
    torch.save({KEYS[name]: state} if name in KEYS else state, path)
    return metric


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Metrics with random weights by name, and the folder of their files; trunks of timm lie in ``hub``."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        for name in MODELS:
            net = torchvision_model(name)
            torch.save(net.state_dict(), folder / FILES[name].file)
            patch.setattr(torchvision.models, name, lambda weights=None, net=net: net)
        metrics = {name: random_network(name, folder) for name in NAMES}
    for file, name in {"maniqa-vit": "vit_base_patch8_224", "topiq-trunk": "resnet50",
                       "nima-trunk": "inception_resnet_v2"}.items():  # fmt: skip
        snapshot = folder / "hub" / f"models--{FILES[file].source.replace('/', '--')}"
        (snapshot / "refs").mkdir(parents=True)
        (snapshot / "refs" / "main").write_text("abc")
        (snapshot / "snapshots" / "abc").mkdir(parents=True)
        save_file(timm.create_model(name).state_dict(), snapshot / "snapshots" / "abc" / FILES[file].file)
    return metrics, folder


@pytest.fixture
def published(made, tmp_path, monkeypatch):
    """A user's folder with links to every file, which may be replaced, and nothing anywhere else."""
    _, folder = made
    mine = tmp_path / "mine"
    mine.mkdir()
    monkeypatch.setenv("RFSR_WEIGHTS", str(mine))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("pyiqa.utils.download_util.DEFAULT_CACHE_DIR", str(tmp_path / "torch" / "hub" / "pyiqa"))
    shutil.copytree(folder / "hub", tmp_path / "hf")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    for path in folder.iterdir():
        if path.is_file():
            (mine / path.name).symlink_to(path)
    for name, file in FILES.items():
        if file.sha256 and (folder / file.file).is_file():
            digest = hashlib.sha256((folder / file.file).read_bytes()).hexdigest()
            monkeypatch.setitem(FILES, name, dataclasses.replace(file, sha256=digest[: len(file.sha256)]))
            if name == "clip-vit-l14-aesthetic":
                monkeypatch.setitem(clip.clip._MODELS, "ViT-L/14", f"https://nowhere/{digest}/{file.file}")
    return mine


@pytest.fixture(scope="module")
def photographs():
    """Two photographs, and noisy versions of them."""
    gt = torch.stack([sample["gt"] for sample in evaluation_crops(["coffee", "chelsea"], 192, 2)])
    noise = torch.randn(gt.shape, generator=torch.Generator().manual_seed(0))
    return (gt + torch.tensor([0.03, 0.1]).view(2, 1, 1, 1) * noise).clamp(0, 1), gt


def own(name):
    """The file that is this metric's alone."""
    return FILES[METRIC_FILES[name][-1]].file


def replace(path, content):
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)


def suite(name):
    return Suite(Preset("x", (name,)))


def test_every_metric_with_a_file_in_the_presets_is_here():
    used = {name for preset in PRESETS.values() for name in preset.metrics}
    assert used & set(METRIC_FILES) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_right_file_gives_the_scores_of_the_network_that_wrote_it(made, published, photographs, name):
    sr, gt = photographs
    metric = made[0][name]
    pair = (sr, gt) if METRICS[name].reference else (sr,)
    wanted = torch.stack([metric(*(x[i : i + 1] for x in pair)).reshape(()) for i in range(2)]).float()
    assert wanted.isfinite().all() and (wanted[0] - wanted[1]).abs() > 1e-4 * wanted.abs().max()
    torch.testing.assert_close(suite(name)(sr, gt)[name], wanted, rtol=1e-5, atol=1e-7)
    if METRICS[name].reference or name == "clipiqa":
        return
    reward = create_reward(f"pyiqa:{name}")
    assert reward.sign == (-1 if METRICS[name].lower_better else 1)
    torch.testing.assert_close(reward.score(sr, ["", ""]).detach(), reward.sign * wanted, rtol=1e-5, atol=1e-6)


def test_the_clip_that_pyiqa_hides_belongs_to_the_reward(published, photographs):
    reward = PyIQAReward("laion_aes")
    (network,) = reward.hidden
    assert network is reward.metric.net.clip_model[0]
    assert not any(p.requires_grad for p in reward.parameters())
    images = photographs[0][:1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(images).sum(), images)
    assert gradient.isfinite().all() and gradient.any()
    assert {p.device.type for p in reward.to("meta").metric.net.clip_model[0].parameters()} == {"meta"}


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["clipiqa", "musiq"])
def test_pictures_on_the_cpu_and_metrics_on_a_gpu(published, photographs, name):
    on_cpu, on_gpu = (Suite(Preset("x", (name,)), device=device)(*photographs)[name] for device in ("cpu", "cuda"))
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_renamed_file(published, name):
    (published / own(name)).rename(published / "weights.pth")
    with pytest.raises(FileNotFoundError, match=rf"preset 'x' lacks the weights {METRIC_FILES[name][-1]} \("):
        suite(name)
    if not METRICS[name].reference:
        with pytest.raises(FileNotFoundError, match=f"is not in {published} or .*; with a network, `rfsr weights fe"):
            create_reward(f"pyiqa:{name}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["truncated", "a web page", "another network's"])
def test_a_wrong_file(published, name, how):
    path = published / own(name)
    content = path.read_bytes()
    replace(path, {"truncated": content[: len(content) // 2], "a web page": b"<html>not found</html>",
                   "another network's": {"params": {"head.weight": torch.zeros(3)}}}[how])  # fmt: skip
    with pytest.raises(ValueError, match=f"metric '{name}' cannot be built from .*, damaged or made for|damaged or an"):
        suite(name)
    if not METRICS[name].reference and name not in CLIPIQA.VARIANTS:
        with pytest.raises(ValueError, match=path.name) as error:
            PyIQAReward(name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("lpips", {"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}),  # the others would stay as they were drawn
        ("lpips", {"head.weight": torch.zeros(3)}),
        ("dists", {"alpha": torch.zeros(1, 1475, 1, 1)}),
        ("dists", {"alpha": torch.zeros(1, 7, 1, 1), "beta": torch.zeros(1, 7, 1, 1)}),
        ("musiq", {"head.weight": torch.zeros(3)}),
        ("brisque", (torch.zeros(50, 1), torch.zeros(50, 18))),
    ],
)
def test_a_file_of_another_architecture(published, name, wrong):
    replace(published / own(name), wrong)
    with pytest.raises(ValueError, match=f"metric '{name}' cannot be built from .*{own(name)}, damaged or made for"):
        suite(name)


@pytest.mark.parametrize("name", ["lpips", "dists", "laion_aes"])
def test_a_truncated_trunk(published, name):
    path = published / FILES[METRIC_FILES[name][0]].file
    replace(path, path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"{path.name}' is damaged or another file: its SHA-256 must start with"):
        suite(name)


@pytest.mark.parametrize("name", ["maniqa-pipal", "nima", "topiq_nr"])
@pytest.mark.parametrize("how", ["truncated", "another network's"])
def test_a_wrong_trunk_in_the_hugging_face_cache(published, name, how):
    path = registry.find(METRIC_FILES[name][0])
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        save_file({"conv.weight": torch.zeros(3)}, path)
    if how == "truncated" or name == "maniqa-pipal":
        with pytest.raises(
            ValueError, match=f"metric '{name}' cannot be built from .*model.safetensors, .*{own(name)}"
        ):
            suite(name)
    else:
        suite(name)


def test_which_of_two_files_is_named(published):
    """pyiqa reads its own cache before the user's folder, so that is the file to complain about."""
    cache = Path(registry.FILES["musiq"].folder()) / own("musiq")
    cache.parent.mkdir(parents=True)
    cache.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"metric 'musiq' cannot be built from {cache}, damaged"):
        suite("musiq")
