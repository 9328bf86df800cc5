"""Make the files beside this one with the original package; needs an environment of its own:

pip install image-reward==1.5 transformers==4.55.4 "datasets<4" "diffusers<0.36" openai-clip "setuptools<82"
python tests/rewards/image_reward/make.py

``tiny.safetensors``: the state dict of the original network at a small size with random weights, two images, their
8-bit resized versions, and what the original makes of them: token ids, scores, image gradients at every 8th pixel.
``full.json``: names and shapes of the full-size state dict, and the settings that do not show in shapes.
"""

import importlib
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from ImageReward.models.BLIP import blip_pretrain
from ImageReward.models.BLIP.vit import VisionTransformer
from PIL import Image
from safetensors.torch import save_file
from transformers import BertTokenizer

original = importlib.import_module("ImageReward.ImageReward")  # the package hides the module behind its class
HERE = Path(__file__).parent
VISION = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 144}
TEXT = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 72}
PROMPTS = [
    "",
    "a photo of a cat, grass",
    "A CAT on Grass; 12 tigers!",
    "ein Café mit 猫 und naïve cats",
    "[DEC] cat [ENC]",
    "cat, " * 40,
]
WORDS = ["cat", "photo", "of", "on", "grass", "tiger", "ein", "mit", "und", "cafe", "naive"]


def med_config(**changes) -> dict:
    """BLIP's med_config.json."""
    return {
        "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
        "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12,
        "num_hidden_layers": 12, "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": 30524, "encoder_width": 768,
        "add_cross_attention": True,
    } | changes  # fmt: skip


def write_vocabulary() -> None:
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *letters, *(f"##{x}" for x in letters), *"0123456789,.;![]", *WORDS]
    (HERE / "vocab.txt").write_text("\n".join(words) + "\n")


def tokenizer():
    tokens = BertTokenizer(str(HERE / "vocab.txt"))
    tokens.add_special_tokens({"bos_token": "[DEC]"})  # as the package's init_tokenizer
    tokens.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokens


def build(config: dict):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "med_config.json"
        path.write_text(json.dumps(config))
        return original.ImageReward(med_config=str(path)).eval()


def full_size() -> dict:
    network = build(med_config())
    vision, text = network.blip.visual_encoder, network.blip.text_encoder.config
    return {
        "settings": {
            "vision_heads": vision.blocks[0].attn.num_heads,
            "vision_layer_norm_eps": vision.norm.eps,
            "text_heads": text.num_attention_heads,
            "text_layer_norm_eps": text.layer_norm_eps,
            "mean": network.mean,
            "std": network.std,
        },
        "shapes": {name: list(tensor.shape) for name, tensor in network.state_dict().items()},
    }


def tiny() -> dict:
    blip_pretrain.create_vit = lambda *args: (
        VisionTransformer(img_size=224, patch_size=16, embed_dim=36, depth=2, num_heads=3, drop_path_rate=0.1), 36
    )  # fmt: skip
    head = original.MLP
    original.MLP = lambda size: head(TEXT["hidden_size"])
    network = build(med_config(**TEXT, vocab_size=len(tokenizer())))
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in network.state_dict().items():
        if not tensor.is_floating_point():
            state[name] = tensor
        elif tensor.dim() == 1:
            one = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            state[name] = one + 0.1 * torch.randn(tensor.shape, generator=generator)
        else:
            spread = 1.0 if "embed" in name else tensor[0].numel() ** -0.5
            state[name] = spread * torch.randn(tensor.shape, generator=generator)
    network.load_state_dict(state)

    rng = np.random.default_rng(0)
    tensors = {f"state.{name}": tensor.contiguous() for name, tensor in state.items()}
    pixels = []
    for i, (height, width) in enumerate(((240, 230), (64, 80))):
        y, x = np.mgrid[:height, :width]
        waves = [np.sin(x / rng.uniform(3, 30) + y / rng.uniform(3, 30)) for _ in range(3)]
        image = 127 + 90 * np.stack(waves, -1) + rng.normal(0, 20, (height, width, 3))
        image[: height // 4] = 255 * (x[: height // 4, :, None] // 16 % 2)  # hard edges overshoot when resized
        image = Image.fromarray(image.clip(0, 255).astype(np.uint8))
        tensors[f"image.{i}"] = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        resized = network.preprocess.transforms[1](network.preprocess.transforms[0](image))
        tensors[f"resized.{i}"] = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()
        pixels.append(network.preprocess(image))
        scores = [network.score(prompt, image) for prompt in PROMPTS]
        tensors[f"score.{i}"] = torch.tensor(scores)
    options = {"padding": "max_length", "truncation": True, "max_length": 35, "return_tensors": "pt"}
    tokens = network.blip.tokenizer(PROMPTS, **options)
    tensors["ids"], tensors["mask"] = tokens.input_ids, tokens.attention_mask
    for i, image in enumerate(pixels):
        batch = image.expand(len(PROMPTS), -1, -1, -1).clone().requires_grad_()
        network.score_gard(tokens.input_ids, tokens.attention_mask, batch).sum().backward()
        tensors[f"gradient.{i}"] = batch.grad[:, :, ::8, ::8].contiguous()
    return tensors


if __name__ == "__main__":
    write_vocabulary()
    blip_pretrain.init_tokenizer = tokenizer
    (HERE / "full.json").write_text(json.dumps(full_size()).replace("], ", "],\n") + "\n")
    settings = {"prompts": json.dumps(PROMPTS), "vision": json.dumps(VISION), "text": json.dumps(TEXT)}
    save_file(tiny(), HERE / "tiny.safetensors", settings)
    (HERE / "tiny.safetensors").chmod(0o644)
