"""C-SD2 and C-FLUX of a few thousand parameters: random weights, real diffusers and transformers classes."""

import dataclasses
import json
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from rfsr_ext.mini import architecture
from rfsr_ext.models.csd2 import CSD2_RECIPE, CSD2ISRModel
from rfsr_ext.models.flux import FLUX_RECIPE, FluxISRModel
from tests.once import built_once
from tests.tiny import sd_scheduler, tiny_parts, tiny_tokenizer

T5_WIDTH = 24


def tiny_csd2(seed: int = 0, num_inference_steps: int = 5, **options) -> CSD2ISRModel:
    """A `CSD2ISRModel` of `tests.tiny.tiny_parts`, for small images."""
    recipe = dataclasses.replace(CSD2_RECIPE, num_inference_steps=num_inference_steps, tile=32, overlap=8, min_side=0)
    scheduler = DDPMScheduler.from_config(sd_scheduler().config, prediction_type="epsilon")
    return CSD2ISRModel(**tiny_parts(seed, scheduler), recipe=recipe, **options)


@built_once
def t5_tokenizer() -> T5TokenizerFast:
    """A unigram tokenizer of T5's format: the letters, and a few words."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(code), -6.0) for code in range(ord("a"), ord("z") + 1)]
    pieces += [(f"▁{word}", -4.0) for word in ("cat", "dog", "fur", "tree")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/tokenizer.json")
        config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 512}
        config |= {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config))
        return T5TokenizerFast.from_pretrained(folder, extra_ids=0)


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """That of FLUX.1-dev: its file's values."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
        max_image_seq_len=4096,
    )  # fmt: skip


@built_once
def tiny_flux_parts(
    seed: int = 0, layers: int = 3, single_layers: int = 2, heads: int = 2, controlnet_layers: int = 2,
    guidance_embeds: bool = True,
) -> dict:  # fmt: skip
    """The parts: 4 latent channels, 2 pixels per latent, 2×2 latents per token."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, tokenizer_2 = tiny_tokenizer(), t5_tokenizer()
        text_encoder = architecture.text_encoder(tokenizer)
        text_encoder_2 = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer_2), d_model=T5_WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=3,
                feed_forward_proj="gated-gelu",
            )
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            mid_block_add_attention=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.7,
            shift_factor=0.1,
        )
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=layers,
            num_single_layers=single_layers,
            attention_head_dim=16,
            num_attention_heads=heads,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=architecture.TEXT_WIDTH,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        )
        controlnet = FluxControlNetModel.from_transformer(
            transformer, controlnet_layers, 0, attention_head_dim=16, num_attention_heads=heads
        )
        for parameter in controlnet.parameters():
            if not parameter.any():  # zero layers, which would hide the condition
                torch.nn.init.normal_(parameter, std=0.1)
    return {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "text_encoder_2": text_encoder_2,
            "tokenizer_2": tokenizer_2, "transformer": transformer, "controlnet": controlnet,
            "scheduler": scheduler()}  # fmt: skip


def tiny_flux(seed: int = 0, num_inference_steps: int = 5, **options) -> FluxISRModel:
    """A `FluxISRModel` of `tiny_flux_parts`, for small images; T5 reads 16 tokens."""
    recipe = dataclasses.replace(FLUX_RECIPE, num_inference_steps=num_inference_steps, tile=32, overlap=8, min_side=0)
    return FluxISRModel(**tiny_flux_parts(seed), recipe=recipe, max_sequence_length=16, **options)
