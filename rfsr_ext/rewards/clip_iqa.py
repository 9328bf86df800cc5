"""CLIP-IQA (arXiv 2207.12396), the first reward of the paper, with pyiqa's networks and published weights.

The extra ``rewards`` installs pyiqa.  ``pip check`` then reports nothing; what it does not show (openai-clip's missing
``pkg_resources``, two builds of OpenCV) is explained next to the extra in pyproject.toml.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfsr_ext.rewards.base import Reward
from rfsr_ext.weights import registry
from rfsr_ext.weights.pyiqa import import_pyiqa, metric_settings
from rfsr_ext.weights.reading import load_strictly, read_tensors, reason

__all__ = ["CLIPIQA", "prompt_pair_score"]

# pyiqa's five pairs, each good before bad; the paper of CLIP-IQA has one
PROMPTS = (
    "Good image", "bad image", "Sharp image", "blurry image", "sharp edges", "blurry edges",
    "High resolution image", "low resolution image", "Noise-free image", "noisy image",
)  # fmt: skip
_CLIP_FILES = {"RN50": "clip-rn50", "ViT-L/14": "clip-vit-l14"}  # in rfsr_ext.weights.registry


class CLIPIQA(Reward):
    """How much more an image looks to CLIP like "Good image" than like "bad image", in [0, 1].

    r = mean_k softmax(s · cos(image, good_k), s · cos(image, bad_k))₁ with CLIP's own scale s and, for ``clipiqa``,
    five fixed pairs of `PROMPTS`; the ``clipiqa+`` variants have one pair of learned ones.  The text features are
    constants: they are computed once and CLIP's text encoder is not kept, which is the only difference to pyiqa's own
    forward pass.

    Images of any size from 32 pixels.  Computes in the type of its weights (``.to(torch.bfloat16)``), or as autocast
    says; the comparison with the text is in single precision at least.

    Args:
        variant: one of `CLIPIQA.VARIANTS`.
        clip: a file with the weights of CLIP, in place of OpenAI's; TorchScript, ``torch.save`` or safetensors.
        prompts: a file with learned prompts, in place of the published one.

    Raises:
        ModuleNotFoundError: without pyiqa.
        FileNotFoundError: if a file of weights is not on disk; nothing is ever downloaded.
        ValueError: if a file is damaged or of another model, or there is no such variant.
    """

    VARIANTS = ("clipiqa", "clipiqa+", "clipiqa+_rn50_512", "clipiqa+_vitL14_512")
    MIN_SIZE = 32

    def __init__(self, variant: str = "clipiqa", *, clip: str | Path | None = None, prompts: str | Path | None = None):
        super().__init__()
        if variant not in self.VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(self.VARIANTS)}, got {variant!r}")
        self.name = variant
        options = metric_settings(variant)["metric_opts"]
        self.pos_embedding = options.get("pos_embedding", False)
        network = _load_clip(options.get("backbone", "RN50"), clip)
        with torch.no_grad():
            if variant == "clipiqa":
                tokenize = import_pyiqa("pyiqa.archs.clip_imports").clip.tokenize
                text = network.encode_text(tokenize(list(PROMPTS)))
            else:
                text = _learned_prompts(network, variant, prompts)(network)
        self.visual = _plain_layer_norms(network.visual).requires_grad_(False)
        self.register_buffer("text", F.normalize(text, dim=-1))
        self.register_buffer("scale", network.logit_scale.detach().exp())
        constants = import_pyiqa("pyiqa.archs.constants")
        for name, values in (("mean", constants.OPENAI_CLIP_MEAN), ("std", constants.OPENAI_CLIP_STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))
        self.eval()

    def score(self, images: Tensor, prompts: list[str] | None = None) -> Tensor:
        if min(images.shape[-2:]) < self.MIN_SIZE:
            raise ValueError(f"images must be at least {self.MIN_SIZE} pixels wide and high, got {list(images.shape)}")
        pixels = (images.to(self.get_buffer("mean").dtype) - self.mean) / self.std
        features = self.visual(pixels, pos_embedding=self.pos_embedding)
        with torch.autocast(images.device.type, enabled=False):
            return prompt_pair_score(features, self.text, self.scale)


def prompt_pair_score(features: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """mean_k softmax(s · cos(image, good_k), s · cos(image, bad_k))₁, in single precision at least.

    Args:
        features: of the images, ``[N, D]``, of any length.
        text: features of the prompts, ``[2K, D]``, of unit length: good, bad, good, bad, …
        scale: s, by which CLIP multiplies its cosines.

    Returns:
        ``[N]`` scores in [0, 1].
    """
    exact = torch.promote_types(text.dtype, torch.float32)
    logits = scale.to(exact) * F.normalize(features.to(exact), dim=-1) @ text.to(exact).t()
    return logits.unflatten(1, (-1, 2)).softmax(-1)[..., 0].mean(1)


def _load_clip(backbone: str, path: str | Path | None) -> nn.Module:
    clip_model = import_pyiqa("pyiqa.archs.clip_model")
    what = "CLIP's weights"
    path = registry.locate(_CLIP_FILES[backbone]) if path is None else Path(path)
    tensors = read_tensors(path, what)
    # three numbers that only OpenAI's files hold beside the weights; pyiqa leaves them out itself
    for name in ("input_resolution", "context_length", "vocab_size"):
        tensors.pop(name, None)
    try:
        with torch.random.fork_rng(devices=[]):
            network = clip_model.build_model(dict(tensors)).float().eval()
    except (KeyError, ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{str(path)!r} is not a CLIP model: {reason(error, 200)}") from error
    load_strictly(network, tensors, path, "a CLIP model")  # in full precision: building rounds to half
    return network


def _learned_prompts(network: nn.Module, variant: str, path: str | Path | None) -> nn.Module:
    """pyiqa's module that makes the text features, with the prompts of a file in it."""
    what = f"learned prompts of {variant}"
    path = registry.locate(variant) if path is None else Path(path)
    tensors = read_tensors(path, what)
    learner = nn.ModuleDict({"prompt_learner": import_pyiqa("pyiqa.archs.clipiqa_arch").PromptLearner(network)})
    if set(tensors) == {""}:  # the file of clipiqa+ is one tensor
        tensors = learner.state_dict() | {"prompt_learner.ctx": tensors[""]}
    load_strictly(learner, tensors, path, what)
    return learner["prompt_learner"]


def _plain_layer_norms(network: nn.Module) -> nn.Module:
    """PyTorch's own layer norms in place of CLIP's, which compute in single precision whatever their weights are in."""
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.LayerNorm):
            plain = nn.LayerNorm(module.normalized_shape, module.eps)
            plain.load_state_dict(module.state_dict())
            network.set_submodule(name, plain)
    return network
