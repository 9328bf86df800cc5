"""ImageReward (arXiv 2304.05977), the second reward of the paper, on current transformers.

The same network as that of the package image-reward, built from transformers' own BLIP parts, reads the same file of
weights.  The package itself can take its place (``backend="image-reward"``): see `image_reward_package` in this folder.
"""

import re
import tempfile
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfsr_ext.rewards.base import Reward, check_prompts
from rfsr_ext.rewards.image_reward_package import build_network, import_package
from rfsr_ext.weights import registry
from rfsr_ext.weights.reading import load_strictly, read_tensors

__all__ = ["ImageReward", "ImageRewardModel", "convert_names"]

MAX_LENGTH = 35
SIZE = 224
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072

# Sizes of the published model.  Two of transformers' defaults differ without changing any shape, so that loading would
# not notice: 8 text heads instead of 12, and a vision layer-norm epsilon of 1e-5 instead of 1e-6.
VISION = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": SIZE, "patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu", "attention_dropout": 0.0,
}  # fmt: skip
TEXT = {
    "vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 512, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
    "pad_token_id": 0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
HEAD = (1024, 128, 64, 16)


class ImageRewardModel(nn.Module):
    """The network: a vision transformer, a BERT that attends to its output, and linear layers on the first token.

    r = (head(text(tokens, vision(pixels))[CLS]) − mean) / std, with the mean and deviation of the published model.

    Args:
        vision, text: of transformers' `BlipVisionConfig` and `BlipTextConfig`; the published sizes by default.
        head: widths of the linear layers before the last.
    """

    def __init__(self, vision: dict | None = None, text: dict | None = None, head: tuple[int, ...] = HEAD):
        super().__init__()
        from transformers import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        vision, text = VISION if vision is None else vision, TEXT if text is None else text
        self.vision = BlipVisionModel(BlipVisionConfig(**vision))
        text = BlipTextConfig(**text, encoder_hidden_size=vision["hidden_size"], is_decoder=True)  # for cross attention
        self.text = BlipTextModel(text, add_pooling_layer=False)
        sizes = (text.hidden_size, *head, 1)
        linear = [nn.Linear(before, after) for before, after in zip(sizes, sizes[1:], strict=False)]
        # numbered as in the published model, where dropout follows the first three
        self.head = nn.ModuleDict(dict(zip(("0", "2", "4", "6", "7"), linear, strict=True)))
        self.requires_grad_(False).eval()

    @property
    def dtype(self) -> torch.dtype:
        return self.head["0"].weight.dtype

    def forward(self, ids: Tensor, mask: Tensor, pixels: Tensor) -> Tensor:
        """Token ids and mask ``[N, L]`` and normalized pixels ``[N, 3, 224, 224]`` to ``[N]``."""
        seen = self.vision(pixel_values=pixels.to(self.dtype)).last_hidden_state
        attend = torch.ones(seen.shape[:-1], dtype=torch.long, device=seen.device)
        x = self.text(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=seen, encoder_attention_mask=attend
        ).last_hidden_state[:, 0]
        for layer in self.head.values():
            x = layer(x)
        return _standardize(x)


class ImageReward(Reward):
    """How well an image suits its prompt and how people like it: standardized over prompts, about −2 to 2, unbounded.

    Sees an image at 224 pixels: the shorter side is resized to that (bicubic, antialiased, clamped to [0, 1] after each
    of two passes) and the middle cut out, as Pillow does for the original with 8-bit images.  The gradient ignores the
    clamps: it would otherwise depend on rounding wherever an image is black or white.

    Prompts are padded and cut to 35 tokens, tokenized once each and remembered.  Computes in the type of its weights
    (``.to(torch.bfloat16)``), or as autocast says.

    Args:
        model: `ImageRewardModel`, or anything with its ``forward``.
        tokenizer: BERT's, with the tokens [DEC] and [ENC] added, see `load_tokenizer`.
    """

    name = "image-reward"

    def __init__(self, model: nn.Module, tokenizer):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self._tokens: dict[str, tuple[Tensor, Tensor]] = {}
        self.eval()

    def tokens(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask of prompts, ``[N, 35]`` each."""
        if len(self._tokens) > 100_000:  # 100 MB
            self._tokens.clear()
        for prompt in set(prompts) - self._tokens.keys():
            options = {"padding": "max_length", "truncation": True, "max_length": MAX_LENGTH, "return_tensors": "pt"}
            found = self.tokenizer(prompt, **options)
            self._tokens[prompt] = found.input_ids[0], found.attention_mask[0]
        ids, masks = zip(*(self._tokens[prompt] for prompt in prompts), strict=True)
        return torch.stack(ids), torch.stack(masks)

    def preprocess(self, images: Tensor) -> Tensor:
        """Images ``[N, 3, H, W]`` in [0, 1] to normalized pixels ``[N, 3, 224, 224]``, in single precision at least."""
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        height, width = images.shape[-2:]
        resized = [SIZE * n // min(height, width) for n in (height, width)]
        for size in ((height, resized[1]), resized):  # Pillow resizes along rows, then along columns
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
            images = images + (images.clamp(0, 1) - images).detach()
        top, left = (round((n - SIZE) / 2) for n in resized)  # where torchvision's CenterCrop starts
        images = images[..., top : top + SIZE, left : left + SIZE]
        mean, std = (images.new_tensor(x).view(3, 1, 1) for x in (PIXEL_MEAN, PIXEL_STD))
        return (images - mean) / std

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        check_prompts(prompts, images)
        ids, mask = (tokens.to(images.device) for tokens in self.tokens(prompts))
        return self.model(ids, mask, self.preprocess(images))

    @classmethod
    def from_pretrained(
        cls, path: str | Path | None = None, tokenizer: str | Path | None = None, backend: str = "transformers"
    ) -> Self:
        """The published model from files on disk; nothing is ever downloaded.

        Args:
            path: ImageReward.pt, or the same tensors as safetensors; by default where `rfsr weights`
                looks for it.
            tokenizer: a folder with the vocab.txt of bert-base-uncased; by default the folder of ``path`` if it is
                there, else the Hugging Face cache.
            backend: "transformers", or "image-reward" for the network of the package image-reward; the scores and the
                image gradients are the same.

        Raises:
            FileNotFoundError: if a file is not on disk.
            ModuleNotFoundError: if the package is asked for and cannot be imported.
            ValueError: if a file is damaged or of another model, or there is no such backend.
        """
        if backend not in ("transformers", "image-reward"):
            raise ValueError(f"backend must be transformers or image-reward, got {backend!r}")
        if backend == "image-reward":
            import_package()  # before half a minute is spent on reading weights
        what = "ImageReward's weights"
        path = registry.locate("image-reward") if path is None else Path(path)
        tensors = read_tensors(path, what)
        tokenizer = load_tokenizer(tokenizer or path.parent)
        with torch.device("meta"):  # nothing to initialize: every tensor but one is in the file
            model = ImageRewardModel()
        load_strictly(model, convert_names(tensors), path, "ImageReward", assign=True)
        positions = model.text.embeddings.position_ids
        model.text.embeddings.position_ids = torch.arange(positions.numel()).expand_as(positions)
        if len(tokenizer) != TEXT["vocab_size"]:
            raise ValueError(
                f"tokenizer must have the vocabulary of bert-base-uncased and two tokens more, {TEXT['vocab_size']}, "
                f"got {len(tokenizer)}"
            )
        if backend == "image-reward":
            config = TEXT | {"encoder_width": VISION["hidden_size"], "add_cross_attention": True}
            model = build_network(tensors, tokenizer, config)
        return cls(model.float(), tokenizer)


def load_tokenizer(folder: str | Path):
    """BERT's tokenizer with [DEC] and [ENC] after its own tokens, from ``folder/vocab.txt`` or the Hugging Face cache.

    Raises:
        FileNotFoundError: if there is no vocab.txt in either.
    """
    from transformers import BertTokenizer

    vocabulary = Path(folder) / "vocab.txt"
    if not vocabulary.is_file():
        vocabulary = registry.locate("bert-vocabulary")
    with tempfile.TemporaryDirectory() as aside:  # alone: a config.json beside it may name another tokenizer
        (Path(aside) / "vocab.txt").write_bytes(vocabulary.read_bytes())
        tokenizer = BertTokenizer.from_pretrained(aside)
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    return tokenizer


_NAMES = [
    (r"blip\.visual_encoder\.cls_token", "vision.embeddings.class_embedding"),
    (r"blip\.visual_encoder\.pos_embed", "vision.embeddings.position_embedding"),
    (r"blip\.visual_encoder\.patch_embed\.proj\.(.+)", r"vision.embeddings.patch_embedding.\1"),
    (r"blip\.visual_encoder\.norm\.(.+)", r"vision.post_layernorm.\1"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.(.+)", r"vision.encoder.layers.\1.layer_norm\2.\3"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.(.+)", r"vision.encoder.layers.\1.self_attn.qkv.\2"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.(.+)", r"vision.encoder.layers.\1.self_attn.projection.\2"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.mlp\.(.+)", r"vision.encoder.layers.\1.mlp.\2"),
    (r"blip\.text_encoder\.embeddings\.position_ids", None),  # 0, 1, 2, …
    (r"blip\.text_encoder\.(.+)", r"text.\1"),
    (r"blip\.(?:vision|text)_proj\..+", None),  # of BLIP's pre-training
    (r"mlp\.layers\.(.+)", r"head.\1"),
]


def convert_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the published file under the names of `ImageRewardModel`; unknown names stay as they are."""
    converted = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _NAMES:
            if match := re.fullmatch(pattern, name):
                if replacement is not None:
                    converted[match.expand(replacement)] = tensor
                break
        else:
            converted[name] = tensor
    return converted


def _standardize(raw: Tensor) -> Tensor:
    return (raw.squeeze(-1).to(torch.promote_types(raw.dtype, torch.float32)) - REWARD_MEAN) / REWARD_STD
