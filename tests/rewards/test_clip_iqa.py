"""CLIP-IQA and other pyiqa metrics as rewards, with a tiny random CLIP in the place of OpenAI's.

pyiqa is no part of the test extra: with its dependencies it is more than 1 GB.  The extra ``rewards`` has it.
"""

import dataclasses
import hashlib
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import save_file

from rfsr_ext.rewards import CLIPIQA, PyIQAReward, WeightedReward, check_rewards, create_reward
from rfsr_ext.weights import registry

pytest.importorskip("pyiqa", reason="CLIP-IQA needs the package pyiqa (pip install 'rfsr_ext[rewards]')")

from rfsr_ext.weights.pyiqa import import_pyiqa  # noqa: E402
from tests.rewards.tiny import CLIP_SIZES, clip_network, save_archive  # noqa: E402

architecture, clip_model = import_pyiqa("pyiqa.archs.clipiqa_arch"), import_pyiqa("pyiqa.archs.clip_model")

BACKBONE = {variant: "ViT-L/14" if "vitL14" in variant else "RN50" for variant in CLIPIQA.VARIANTS}


@pytest.fixture(scope="module")
def networks():
    return {name: clip_network(name) for name in CLIP_SIZES}


@pytest.fixture(scope="module")
def files(networks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, network in networks.items():
        torch.save(network.state_dict(), folder / clip_model._MODELS[name].rsplit("/", 1)[-1])
    torch.manual_seed(1)
    for variant, address in architecture.default_model_urls.items():
        metric = theirs(networks, variant)
        context = torch.nn.Parameter(metric.prompt_learner.ctx + 3e-3 * torch.randn_like(metric.prompt_learner.ctx))
        metric.prompt_learner.ctx.data = context.data
        file = context if variant == "clipiqa+" else {"params": metric.state_dict()}
        torch.save(file, folder / address.rsplit("/", 1)[-1])
    return folder


@pytest.fixture
def published(files, tmp_path, monkeypatch):
    """A folder in which tiny files pass for all the published ones; links, to be replaced and not written to."""
    monkeypatch.setenv("RFSR_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "no-hub"))
    for path in files.iterdir():
        (tmp_path / path.name).symlink_to(path)
    for name in CLIP_SIZES:
        path = files / clip_model._MODELS[name].rsplit("/", 1)[-1]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        known = {"RN50": "clip-rn50", "ViT-L/14": "clip-vit-l14"}[name]
        monkeypatch.setitem(registry.FILES, known, dataclasses.replace(registry.FILES[known], sha256=digest))
    return tmp_path


def theirs(networks, variant, folder=None):
    """pyiqa's own metric with the same files."""
    configs = import_pyiqa("pyiqa.default_model_configs").DEFAULT_CONFIGS
    options = {k: v for k, v in configs[variant]["metric_opts"].items() if k != "type"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(architecture, "load", lambda name, device="cpu": networks[BACKBONE[variant]])
        metric = architecture.CLIPIQA(**options, pretrained=False).eval()
    if folder is not None and variant != "clipiqa":
        file = torch.load(folder / architecture.default_model_urls[variant].rsplit("/", 1)[-1])
        if variant == "clipiqa+":
            metric.prompt_learner.ctx.data = file.data
        else:
            metric.load_state_dict(file["params"])
    return metric


def test_the_variants_are_all_of_pyiqa():
    configs = import_pyiqa("pyiqa.default_model_configs").DEFAULT_CONFIGS
    assert set(CLIPIQA.VARIANTS) == {name for name in configs if name.startswith("clipiqa")}


@pytest.mark.parametrize("variant", CLIPIQA.VARIANTS)
@pytest.mark.parametrize("size", [(224, 224), (96, 131)])
def test_scores_and_gradients_are_pyiqas(networks, published, variant, size):
    reward, metric = create_reward(variant), theirs(networks, variant, published)
    images = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(0))
    images = images * torch.tensor([0.1, 0.5, 1.0]).view(3, 1, 1, 1)
    results = []
    for score in (lambda x: reward.score(x, ["", "", ""]), lambda x: metric(x).squeeze(1)):
        x = images.clone().requires_grad_()
        value = score(x)
        results.append((value.detach(), torch.autograd.grad(value.sum(), x)[0]))
    (ours, our_gradient), (wanted, gradient) = results
    assert wanted.shape == (3,) and wanted.std() > 2e-5  # far above the tolerance
    torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-6)
    assert gradient.abs().max() > 0
    torch.testing.assert_close(our_gradient, gradient, atol=1e-5 * gradient.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("variant", ["clipiqa", "clipiqa+_vitL14_512"])
def test_gradient_in_double_precision(published, variant):
    reward = create_reward(variant).double()
    x = 0.2 + 0.6 * torch.rand(1, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(reward.score, x.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
)
@pytest.mark.parametrize("variant", CLIPIQA.VARIANTS)
def test_gradient_on_extreme_images(published, extreme, gradient_reaches, variant, dtype, autocast):
    gradient_reaches(create_reward(variant), extreme, dtype, autocast)


def test_images_below_the_smallest_size(published):
    with pytest.raises(ValueError, match="images must be at least 32 pixels wide and high, got"):
        create_reward("clipiqa").score(torch.rand(1, 3, 31, 64))


def test_prompts_and_batching_change_nothing(published):
    reward, images = create_reward("clipiqa"), torch.rand(3, 3, 64, 48)
    alone = torch.cat([reward.score(images[i : i + 1], ["cat"]) for i in range(3)])
    torch.testing.assert_close(reward.score(images, ["", "", ""]), alone)
    assert not any(p.requires_grad for p in reward.parameters()) and not reward.training
    assert reward.label == "clipiqa"


@pytest.mark.parametrize("kind", ["torchscript", "safetensors"])
def test_other_kinds_of_files(networks, published, kind):
    path = published / "other"
    if kind == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file({k: v.contiguous() for k, v in networks["RN50"].state_dict().items()}, path)
    else:
        save_archive(networks["RN50"], path)
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(CLIPIQA(clip=path).score(images), create_reward("clipiqa").score(images))


@pytest.mark.parametrize("variant", CLIPIQA.VARIANTS)
def test_missing_files_are_named(published, variant):
    if variant != "clipiqa":
        (published / architecture.default_model_urls[variant].rsplit("/", 1)[-1]).unlink()
        with pytest.raises(FileNotFoundError, match=rf"is not in .*`rfsr weights fetch {re.escape(variant)}` gets it"):
            create_reward(variant)
    (published / ("ViT-L-14.pt" if "vitL14" in variant else "RN50.pt")).unlink()
    with pytest.raises(FileNotFoundError, match=r"(RN50|ViT-L-14).pt \(CLIP of CLIP-IQA.*\) is not in .*; with"):
        create_reward(variant)


def test_wrong_clip_files(networks, published):
    path = published / "RN50.pt"
    truncated = path.read_bytes()[:100_000]
    path.unlink()
    path.write_bytes(truncated)
    with pytest.raises(ValueError, match="RN50.pt' is damaged or another file: its SHA-256 must .*; fetch it again"):
        create_reward("clipiqa")
    path.unlink()
    shutil.copy(published / "ViT-L-14.pt", path)  # a right file under a wrong name
    with pytest.raises(ValueError, match="its SHA-256 must start with"):
        create_reward("clipiqa")
    with pytest.raises(FileNotFoundError, match="CLIP's weights 'nowhere.pt' does not exist"):
        CLIPIQA(clip="nowhere.pt")
    own = published / "own.pt"
    own.write_bytes(truncated)
    with pytest.raises(ValueError, match="CLIP's weights .* cannot be read"):
        CLIPIQA(clip=own)
    torch.save({"conv.weight": torch.zeros(3)}, own)
    with pytest.raises(ValueError, match="is not a CLIP model"):
        CLIPIQA(clip=own)
    torch.save(networks["RN50"].state_dict() | {"visual.bn1.weight": torch.zeros(5)}, own)
    with pytest.raises(ValueError, match="is not a CLIP model"):
        CLIPIQA(clip=own)


@pytest.mark.parametrize("variant", ["clipiqa+", "clipiqa+_rn50_512"])
def test_wrong_prompt_files(published, variant):
    path = published / architecture.default_model_urls[variant].rsplit("/", 1)[-1]
    truncated = path.read_bytes()[:500]
    path.unlink()
    path.write_bytes(truncated)
    with pytest.raises(ValueError, match="learned prompts of .* cannot be read"):
        create_reward(variant)
    torch.save({"params": {"head.weight": torch.zeros(3)}}, path)
    with pytest.raises(ValueError, match="is not learned prompts of .*: it lacks .* and has 1 unknown ones"):
        create_reward(variant)
    torch.save(torch.zeros(2, 16, 512), path)
    with pytest.raises(ValueError, match=r"prompt_learner.ctx must have shape \[2, 16, 64\], got \[2, 16, 512\]"):
        create_reward(variant)


def test_the_stand_in_for_pkg_resources_is_gone_again():
    module = sys.modules.get("pkg_resources")
    assert module is None or module.__spec__ is not None  # setuptools' own, if it still has one


def test_unknown_variant():
    with pytest.raises(ValueError, match="variant must be one of clipiqa, clipiqa.*, got 'clipiqa2'"):
        CLIPIQA("clipiqa2")


# -- any metric of pyiqa -------------------------------------------------------------------------------------------


def test_a_metric_without_weights_is_a_reward():
    reward = create_reward("pyiqa:piqe")
    assert reward.name == "pyiqa:piqe" and reward.sign == -1  # lower PIQE is better
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    metric = import_pyiqa().create_metric("piqe", device="cpu")
    torch.testing.assert_close(reward.score(images), -metric(images).reshape(2))


def test_musiq_has_a_gradient_and_the_value_of_pyiqa():
    torch.manual_seed(0)
    reward = PyIQAReward("musiq", pretrained=False)
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    score = reward.score(images)
    (gradient,) = torch.autograd.grad(score.sum(), images)
    assert gradient.abs().max() > 0 and reward.differentiable
    assert reward.sign == 1
    with torch.no_grad():
        torch.testing.assert_close(score.detach(), reward.metric.net(images).reshape(2))
        assert reward.score(images.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("metric", ["piqe", "entropy"])  # one rounds, so that its gradient is zero; one has none
def test_metrics_without_a_gradient_are_refused_before_training(metric):
    reward = create_reward(f"pyiqa:{metric}")
    assert not reward.differentiable
    with pytest.raises(
        ValueError, match=f"reward 'pyiqa:{metric}' has no gradient .* leave it to a preference trainer"
    ):
        check_rewards([WeightedReward(reward, 1.0)], (4, 5))


@pytest.mark.parametrize(
    ("metric", "sentence"),
    [
        *((metric, "is not in .*; with a network, `rfsr weights fetch") for metric in ("musiq", "nima", "laion_aes")),
        ("clipiqa", "is not in .*; with a network, `rfsr weights fetch clip-rn50"),
        *((metric, f"pyiqa's metric '{metric}' needs weights that are not on disk") for metric in ("liqe", "cnniqa")),
    ],
)  # the last two are not in the registry
def test_nothing_is_downloaded(tmp_path, monkeypatch, metric, sentence):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("pyiqa.utils.download_util.DEFAULT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=sentence) as error:
        create_reward(f"pyiqa:{metric}")
    assert "\n" not in str(error.value)


def test_metrics_that_are_no_rewards():
    with pytest.raises(ValueError, match=r"metric must be one that pyiqa.list_models\(\) lists, got 'magic'"):
        create_reward("pyiqa:magic")
    with pytest.raises(ValueError, match="metric must judge an image without a reference, got 'lpips'"):
        create_reward("pyiqa:lpips")
