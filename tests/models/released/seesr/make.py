"""How expected.safetensors and keys.json were made: with the authors' code, by hand, never by a test.

Repository github.com/cswry/SeeSR, commit 8edecc71c4f3efa01cd26078f2e8dffd1ce80a6a (RFSR's copy, sxpro/RFSR at
a9932fa3e8c95fc05caba38ff3fb663c2ec9cedc, has the same networks and pipeline); Python 3.11, torch 2.14.1,
torchvision 0.29.1, diffusers 0.21.0, transformers 4.40.2, tokenizers 0.19.1, huggingface_hub 0.23.5, timm 0.9.16,
loralib 0.1.2, einops 0.8; an empty package stands in for fairscale, which only other models of the repository need.

    PYTHONPATH=OLD_PACKAGES:SEESR:. python -W ignore -m tests.models.released.seesr.make

What differs from the authors' own script: float32 on the CPU; sizes are those of layout.py; every noise is layout.py's;
the VAE's encoding is the mode of its posterior, where the script draws from it; RAM sees the low-resolution image
resized bicubically, as in the authors' training, where the script does so bilinearly; images are run one by one,
because the pipeline starts every image of a batch from the first one's latents.
"""

import hashlib
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.models.vae import DiagonalGaussianDistribution
from models.controlnet import ControlNetModel
from models.unet_2d_condition import UNet2DConditionModel
from pipelines.pipeline_seesr import StableDiffusionControlNetPipeline
from ram.models import ram_lora
from ram.models import utils as ram_utils
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertConfig, CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from utils.wavelet_color_fix import adaptive_instance_normalization

from tests.models.released.seesr import layout

FULL_UNET = {
    "sample_size": 64, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True,
}  # fmt: skip


class Tokenizer(list):
    """What RAM asks of BERT's: its length and that of the caption's beginning."""

    def __call__(self, text):
        return SimpleNamespace(input_ids=[0, 1, 2])


def shapes(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(x.shape) for name, x in tensors.items() if x.is_floating_point()}


def summary(found: dict[str, list[int]], parameters: int) -> dict:
    lines = "\n".join(sorted(f"{name} {shape}" for name, shape in found.items()))
    return {"parameters": parameters, "tensors": len(found), "sha256": hashlib.sha256(lines.encode()).hexdigest()}


def part(module: torch.nn.Module) -> dict:
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    config = {name: value for name, value in config.items() if name != "_use_default_values"}  # not in files
    return {"shapes": shapes(module.state_dict()), "config": config | {"_class_name": type(module).__name__}}


def reduced_ram(folder: Path, **options):
    """RAM of layout.py's sizes; the authors read theirs from files of their repository."""
    (folder / "data").mkdir(exist_ok=True)
    for name in ("ram_tag_list.txt", "ram_tag_list_chinese.txt"):
        (folder / "data" / name).write_text("\n".join(layout.TAGS))
    (folder / "data/ram_tag_list_threshold.txt").write_text("".join(f"{x}\n" for x in layout.THRESHOLDS))
    tokenizer = Tokenizer(range(layout.BERT["vocab_size"]))
    with (
        mock.patch.object(ram_lora, "read_json", lambda path: layout.SWIN),
        mock.patch.object(ram_utils, "read_json", lambda path: layout.SWIN),
        mock.patch.object(BertConfig, "from_json_file", lambda path: BertConfig(**layout.BERT)),
        mock.patch.object(ram_lora, "init_tokenizer", lambda: tokenizer),
        mock.patch.object(ram_lora, "CONFIG_PATH", folder),
    ):
        lists = {
            "tag_list": folder / "data/ram_tag_list.txt",
            "tag_list_chinese": folder / "data/ram_tag_list_chinese.txt",
        }
        return ram_lora.ram(image_size=224, vit="swin_l", **lists, **options).eval()


def full_ram():
    linspace = torch.linspace  # whose numbers are asked for, which the meta device has not
    with (
        torch.device("meta"),
        mock.patch.object(torch, "linspace", lambda *a, **o: linspace(*a, **o, device="cpu")),
        mock.patch.object(ram_lora, "init_tokenizer", lambda: Tokenizer(range(30524))),
    ):
        return ram_lora.ram(image_size=384, vit="swin_l")


def used(name: str) -> bool:
    """Whether image tokens or tags need it."""
    unused = ("tag_encoder.", "text_decoder.", "tagging_head.embeddings.")
    return not name.startswith(unused) and not name.endswith(("attn_mask", "relative_position_index"))


def make_keys(folder: Path) -> None:
    unet = UNet2DConditionModel(**layout.UNET, use_image_cross_attention=True)
    controlnet = ControlNetModel(
        **{k: v for k, v in layout.UNET.items() if k not in ("sample_size", "up_block_types")},
        conditioning_embedding_out_channels=layout.EMBEDDING,
        use_image_cross_attention=True,
    )
    ram = shapes(reduced_ram(folder).state_dict())
    with torch.device("meta"):
        full_unet = UNet2DConditionModel(**FULL_UNET, use_image_cross_attention=True)
        full_controlnet = ControlNetModel.from_unet(full_unet, use_image_cross_attention=True)
    counted = {}
    for name, module in (("unet", full_unet), ("controlnet", full_controlnet), ("ram", full_ram())):
        named = module.named_parameters(remove_duplicate=False)  # the tagging head shares some with what is not used
        wanted = {k: x for k, x in named if name != "ram" or (used(k) and "lora_" not in k)}
        counted[name] = summary({k: list(x.shape) for k, x in wanted.items()}, sum(x.numel() for x in wanted.values()))
    for name, module in (("unet", full_unet), ("controlnet", full_controlnet)):
        counted[name]["config"] = {k: v for k, v in module.config.items() if not k.startswith("_")}
    found = {
        "unet": part(unet),
        "base_unet": part(UNet2DConditionModel(**layout.UNET)),
        "controlnet": part(controlnet),
        "vae": part(AutoencoderKL(**layout.VAE)),
        "text_encoder": part(CLIPTextModel(CLIPTextConfig(**layout.TEXT))),
        "ram": {"shapes": {k: s for k, s in ram.items() if "lora_" not in k and not k.endswith("attn_mask")}},
        "dape": {"shapes": {k: s for k, s in ram.items() if "lora_" in k}},
        "full": counted,
    }
    del found["base_unet"]["config"]["use_image_cross_attention"]  # stock diffusers has no such entry
    (layout.HERE / "keys.json").write_text(json.dumps(found, indent=None, sort_keys=True) + "\n")


@torch.no_grad()
def make_expected(folder: Path) -> None:
    models = layout.write_layout(folder / "models")
    expected = {}

    # the networks by themselves, at different timesteps
    unet = UNet2DConditionModel.from_pretrained(str(models / "seesr"), subfolder="unet").eval()
    controlnet = ControlNetModel.from_pretrained(str(models / "seesr"), subfolder="controlnet").eval()
    latents = layout.uniform("latents", [2, 4, 8, 8], -1, 1)
    common = {
        "timestep": torch.tensor([900, 17]),
        "encoder_hidden_states": layout.uniform("text", [2, 5, 24], -1, 1),
        "image_encoder_hidden_states": layout.uniform("tokens", [2, 7, 512], -1, 1),
        "return_dict": False,
    }
    down, mid = controlnet(latents, controlnet_cond=layout.uniform("image", [2, 3, 16, 16]), **common)
    expected |= {f"controlnet.down.{k}": x for k, x in enumerate(down)} | {"controlnet.mid": mid}
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    expected["unet"] = unet(latents, **common, **residuals)[0]

    # RAM and DAPE
    lr = layout.uniform("lr", [2, 3, 12, 10])
    resized = F.interpolate(lr, (224, 224), mode="bicubic").clamp(0, 1)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    resized = (resized - mean) / std
    for name, options in (("ram", {}), ("dape", {"pretrained_condition": models / "DAPE.pth"})):
        ram = reduced_ram(folder, pretrained=str(models / "ram_swin_large_14m.pth"), **options)
        tokens, logits, _ = ram.condition_forward(resized, only_feature=False)
        tags, _ = ram.generate_tag(resized)
        expected |= {f"{name}.tokens": tokens[..., ::16], f"{name}.logits": logits}
        expected[f"{name}.tags"] = torch.tensor(list("\n".join(tags).encode()), dtype=torch.uint8)

    # the whole pipeline
    pipeline = make_pipeline(models / "stable-diffusion-2-base", unet, controlnet)
    image = F.interpolate(lr, scale_factor=4, mode="bicubic").clamp(0, 1)
    options = {"num_inference_steps": 5, "guidance_scale": 5.5, "negative_prompt": ["blur"]}
    expected["sample"] = torch.cat([run(pipeline, image[k : k + 1], tokens[k : k + 1], options) for k in range(2)])
    expected["adain"] = adaptive_instance_normalization(expected["sample"], image)

    # the same over another base
    turbo = models / "sd-turbo"
    layout.write_base(turbo, seed=1, turbo=True)
    unet = UNet2DConditionModel.from_pretrained_orig(
        str(turbo), str(models / "seesr"), subfolder="unet", use_image_cross_attention=True
    )
    pipeline = make_pipeline(turbo, unet.eval(), controlnet)
    options = {"num_inference_steps": 2, "guidance_scale": 1.0}
    expected["turbo.sample"] = run(pipeline, image[:1], tokens[:1], options)
    save_file({k: x.contiguous() for k, x in expected.items()}, layout.HERE / "expected.safetensors")


def make_pipeline(base: Path, unet, controlnet) -> StableDiffusionControlNetPipeline:
    pipeline = StableDiffusionControlNetPipeline(
        vae=AutoencoderKL.from_pretrained(str(base), subfolder="vae").eval(),
        text_encoder=CLIPTextModel.from_pretrained(str(base), subfolder="text_encoder").eval(),
        tokenizer=CLIPTokenizer.from_pretrained(str(base), subfolder="tokenizer"),
        unet=unet,
        controlnet=controlnet,
        scheduler=DDPMScheduler.from_pretrained(str(base), subfolder="scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline, image: Tensor, tokens: Tensor, options: dict) -> Tensor:
    drawn = iter(layout.noise(1 + options["num_inference_steps"], (1, 4, 24, 20)))
    with (
        mock.patch("pipelines.pipeline_seesr.randn_tensor", lambda *args, **options: next(drawn)),
        mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **options: next(drawn)),
        mock.patch.object(DiagonalGaussianDistribution, "sample", lambda self: self.mode()),
    ):
        return pipeline(
            prompt=["cat, 8k"], image=image, height=48, width=40, start_point="lr", output_type="pt",
            ram_encoder_hidden_states=tokens, **options,
        ).images  # fmt: skip


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        make_keys(Path(made))
        make_expected(Path(made))
