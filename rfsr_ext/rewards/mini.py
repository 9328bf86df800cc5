"""Two small rewards trained by ``rfsr mini build``; they stand in for CLIP-IQA and ImageReward and always say so."""

from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTokenizer

from rfsr_ext.files import save_tensors
from rfsr_ext.rewards.base import Reward, check_prompts
from rfsr_ext.weights import WEIGHTS
from rfsr_ext.weights.reading import load_strictly, read_tensors

__all__ = ["MiniIQA", "MiniPreference"]


class _Stem(nn.Sequential):
    """Convolutions without normalization, which would hide contrast, a part of quality."""

    def __init__(self, widths: tuple[int, ...]):
        layers: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(12, widths[0], 3, padding=1), nn.SiLU()]
        for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
            layers += [nn.Conv2d(before, after, 3, stride=1 + i % 2, padding=1), nn.SiLU()]
        super().__init__(*layers)


class _SavedReward(Reward):
    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``<name>.safetensors`` in half precision."""
        save_tensors(Path(folder) / f"{self.name}.safetensors", {k: v.half() for k, v in self.state_dict().items()})

    def _load(self, folder: Path) -> Self:
        path = folder / f"{self.name}.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"{self.name} weights {str(path)!r} do not exist; `rfsr mini build` makes them")
        tensors = {key: value.float() for key, value in read_tensors(path, f"{self.name} weights").items()}
        load_strictly(self, tensors, path, self.name, assign=True)  # in single precision, whatever torch's default
        return self.requires_grad_(False).eval()


class MiniIQA(_SavedReward):
    """No-reference quality in [0, 1]; plays CLIP-IQA's part.

    r = sigmoid((q − mean) / std), with q from a small convolutional network that learned to rank blurred, downscaled,
    noisy and JPEG versions of a picture by their structural similarity to it.  Mean and deviation are those of the
    training pictures: without them most scores lie at the flat ends of the sigmoid (tried).  q tells which of two
    versions of one picture is better; scores of different pictures are not comparable.  Like CLIP-IQA it knows nothing
    of over-sharpening, and can be fooled by it.
    """

    name = "mini-iqa"
    stand_in_for = "CLIP-IQA"

    def __init__(self):
        super().__init__()
        self.features = _Stem((32, 48, 64, 64))
        self.head = nn.Conv2d(64, 1, 1)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def raw_score(self, images: Tensor) -> Tensor:
        """q, ``[N]``: the mean of a score map, so that images of any size compare."""
        return self.head(self.features(images * 2 - 1)).float().mean((1, 2, 3))

    def score(self, images: Tensor, prompts: list[str] | None = None) -> Tensor:
        return ((self.raw_score(images) - self.mean) / self.std).sigmoid()

    @classmethod
    def from_pretrained(cls, folder: str | Path = WEIGHTS / "rewards") -> Self:
        """Load what `save_pretrained` wrote; without a folder, the shipped weights."""
        return cls()._load(Path(folder))


class MiniPreference(_SavedReward):
    """How well an image suits its prompt and how good it looks, standardized; plays ImageReward's part.

    r = (q(image) + a · cos(image, text) − mean) / std, learned from pairs (Bradley–Terry): a clean picture beats a
    distorted one, and its own prompt beats another picture's.  Mean and deviation are those of the training pairs.
    """

    name = "mini-preference"
    stand_in_for = "ImageReward"

    def __init__(self, tokenizer: CLIPTokenizer, width: int = 64):
        super().__init__()
        self.tokenizer = tokenizer
        self.features = _Stem((32, 48, 64, 64, 96))
        self.quality = nn.Conv2d(96, 1, 1)
        self.image_projection = nn.Linear(96, width)
        self.words = nn.Embedding(len(tokenizer), width)
        self.text_projection = nn.Linear(width, width)
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def embed_text(self, prompts: list[str]) -> Tensor:
        """Mean word embedding of each prompt through one linear layer, ``[N, width]``, of unit length."""
        ids = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        mask = ids.attention_mask.to(self.words.weight.device)[..., None]
        words = self.words(ids.input_ids.to(self.words.weight.device)) * mask
        return F.normalize(self.text_projection(words.sum(1) / mask.sum(1)).float(), dim=-1)

    def raw_score(self, images: Tensor, text: Tensor) -> Tensor:
        """The score before standardization, ``[N]``."""
        features = self.features(images * 2 - 1)
        quality = self.quality(features).float().mean((1, 2, 3))
        image = F.normalize(self.image_projection(features.mean((2, 3))).float(), dim=-1)
        return quality + self.temperature * (image * text).sum(-1).float()

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        check_prompts(prompts, images)
        return (self.raw_score(images, self.embed_text(prompts)) - self.mean) / self.std

    @classmethod
    def from_pretrained(cls, folder: str | Path = WEIGHTS / "rewards", tokenizer: CLIPTokenizer | None = None) -> Self:
        """Load what `save_pretrained` wrote; without a folder, the shipped weights, with the mini model's tokenizer."""
        tokenizer = tokenizer or CLIPTokenizer.from_pretrained(WEIGHTS / "model" / "tokenizer")
        return cls(tokenizer)._load(Path(folder))
