"""The package image-reward in this environment, whatever releases of transformers and timm it has, against our network.

It is no part of the test extra: ``pip install --no-deps image-reward`` and timm.
"""

import importlib
import importlib.util
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from transformers import modeling_utils

from rfsr_ext.rewards import ImageReward, image_reward
from rfsr_ext.rewards.image_reward_package import import_package
from tests.rewards.tiny import OriginalImageReward

absent = [name for name in ("ImageReward", "timm") if importlib.util.find_spec(name) is None]
needs_package = pytest.mark.skipif(
    bool(absent), reason=f"{' and '.join(absent)} not installed (pip install --no-deps image-reward; pip install timm)"
)
LENT = ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer")


@pytest.fixture
def network_sizes(monkeypatch):
    """Have the package, whose sizes are fixed, build its network as small as the stored one."""
    import_package()
    package, blip, vit = (
        importlib.import_module(f"ImageReward.{name}")
        for name in ("ImageReward", "models.BLIP.blip_pretrain", "models.BLIP.vit")
    )
    head = package.MLP
    monkeypatch.setattr(blip, "create_vit", lambda *args: (
        vit.VisionTransformer(img_size=224, patch_size=16, embed_dim=36, depth=2, num_heads=3), 36
    ))  # fmt: skip
    monkeypatch.setattr(package, "MLP", lambda size: head(36))


@pytest.fixture
def both(network_sizes, tmp_path, monkeypatch):
    """Our reward and the package's, read from one file."""
    original = OriginalImageReward()
    vision, text = original.sizes()
    monkeypatch.setattr(image_reward, "VISION", vision)
    monkeypatch.setattr(image_reward, "TEXT", text)
    torch.save(original.state, tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_bytes((Path(__file__).parent / "image_reward" / "vocab.txt").read_bytes())
    ours, theirs = (
        ImageReward.from_pretrained(tmp_path / "ImageReward.pt", backend=backend)
        for backend in ("transformers", "image-reward")
    )
    assert type(theirs.model.network).__module__ == "ImageReward.ImageReward"
    return ours, theirs, original


@needs_package
@pytest.mark.parametrize("size", [(224, 224), (64, 80), (300, 230)])
def test_scores_and_image_gradients_are_ours(both, size):
    ours, theirs, original = both
    images = torch.rand(len(original.prompts), 3, *size, generator=torch.Generator().manual_seed(0))
    results = []
    for reward in (ours, theirs):
        x = images.clone().requires_grad_()
        score = reward.score(x, original.prompts)
        results.append((score.detach(), torch.autograd.grad(score.sum(), x)[0]))
    (score, gradient), (their_score, their_gradient) = results
    assert score.std() > 1e-3 and gradient.abs().max() > 0
    torch.testing.assert_close(their_score, score, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(their_gradient, gradient, atol=1e-5 * gradient.abs().max().item(), rtol=0)


@needs_package
def test_scores_are_those_of_the_releases_it_was_made_for(both):
    """Stored by ``image_reward/make.py`` with transformers 4.55 and timm 0.6.13."""
    _, theirs, original = both
    for image in range(2):
        pixels = original[f"image.{image}"].float()[None] / 255
        scores = theirs.score(pixels.expand(len(original.prompts), -1, -1, -1), original.prompts)
        torch.testing.assert_close(scores, original[f"score.{image}"], atol=5e-3, rtol=0)


@needs_package
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_computes_in_other_types(both, dtype):
    ours, theirs, original = both
    images = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    scores = [reward.to(dtype).score(images.to(dtype), original.prompts) for reward in (ours, theirs)]
    torch.testing.assert_close(*scores, atol=5e-2 if dtype == torch.bfloat16 else 1e-6, rtol=0)


@needs_package
def test_its_own_load_works(both, tmp_path, monkeypatch):
    """``ImageReward.load`` and ``score`` as its README shows them, with configuration and vocabulary on disk."""
    _, theirs, original = both
    (tmp_path / "bert").mkdir()
    (tmp_path / "vocab.txt").rename(tmp_path / "bert" / "vocab.txt")
    plain = transformers.BertTokenizer.from_pretrained(tmp_path / "bert")
    monkeypatch.setattr(transformers.BertTokenizer, "from_pretrained", {"bert-base-uncased": plain}.__getitem__)
    config = image_reward.TEXT | {"encoder_width": 36, "add_cross_attention": True}
    (tmp_path / "med_config.json").write_text(json.dumps(config))
    package = import_package()
    model = package.load(str(tmp_path / "ImageReward.pt"), "cpu", med_config=str(tmp_path / "med_config.json"))
    assert model.blip.tokenizer.enc_token_id == len(theirs.tokenizer) - 1
    image = Image.fromarray(original["image.0"].permute(1, 2, 0).numpy())
    scores = torch.tensor([model.score(prompt, image) for prompt in original.prompts])
    torch.testing.assert_close(scores, original["score.0"], atol=1e-5, rtol=0)


@needs_package
def test_nothing_outside_the_package_stays_changed():
    before = {name for name in LENT if hasattr(modeling_utils, name)}
    verbosity = transformers.logging.get_verbosity()
    for name in [name for name in sys.modules if name.partition(".")[0] == "ImageReward"]:
        del sys.modules[name]
    filters = list(warnings.filters)
    import_package()
    assert {name for name in LENT if hasattr(modeling_utils, name)} == before
    assert transformers.logging.get_verbosity() == verbosity and warnings.filters == filters
    stand_ins = [name for name in ("clip", "datasets", "fairscale", "pkg_resources") if name in sys.modules]
    assert all(sys.modules[name].__spec__ is not None for name in stand_ins)


@needs_package
def test_without_what_no_score_needs(monkeypatch):
    """As where image-reward and timm are all that was installed."""
    spec, hidden = importlib.util.find_spec, ("clip", "datasets", "fairscale")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in hidden else spec(name))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("ImageReward", *hidden)]:
        monkeypatch.delitem(sys.modules, name)
    package = import_package()
    assert not [name for name in sys.modules if name.partition(".")[0] in hidden]
    with pytest.raises(
        ModuleNotFoundError, match="image-reward needs datasets.load_dataset for this, which is not inst"
    ):
        package.ReFL.load_dataset("refl")
    vit = importlib.import_module("ImageReward.models.BLIP.vit")
    with pytest.raises(
        ModuleNotFoundError, match="needs fairscale.*checkpoint_wrapper for this, which is not installed"
    ):
        vit.VisionTransformer(
            img_size=32, embed_dim=36, depth=1, num_heads=3, use_grad_checkpointing=True, ckpt_layer=1
        )
    assert vit.VisionTransformer(img_size=32, embed_dim=36, depth=1, num_heads=3)(torch.rand(1, 3, 32, 32)).ndim == 3


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "ImageReward"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    sentence = (
        r"the package image-reward cannot be imported \(.*\); pip install --no-deps image-reward, and timm, or take"
    )
    with pytest.raises(ModuleNotFoundError, match=sentence) as error:
        ImageReward.from_pretrained(backend="image-reward")
    assert "\n" not in str(error.value)
