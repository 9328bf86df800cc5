"""Make keys.json and expected.safetensors with the public code of PASD.

Repository github.com/yangxy/PASD at commit 396f9ac24f9fa2b9787658bd9eea31729e51f264, with diffusers 0.29.2 (its pin),
transformers 4.41.2, huggingface_hub 0.23.5, tokenizers 0.19.1, einops 0.8.0; torch 2.14.1.  RRDB is that of basicsr
1.4.2.  By hand, from the root of this project, with these packages in a folder P and both public sources in S:

    PYTHONPATH=P:S/PASD:. BASICSR=S/basicsr-1.4.2 python tests/models/released/pasd/make.py

Two imports of the public code cannot be satisfied and are helped: PASD-light's UpBlock2D stands in another module of
diffusers than the code says, and of basicsr only the file with RRDB is imported.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import sys
import tempfile
import types
from pathlib import Path

import diffusers.models.unets.unet_2d_blocks
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UniPCMultistepScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.models.released.pasd import layout

sys.modules["diffusers.models.transformers.unet_2d_blocks"] = diffusers.models.unets.unet_2d_blocks


def import_rrdb() -> None:
    folder = Path(os.environ["BASICSR"]) / "basicsr"
    names = ("basicsr", "basicsr.archs", "basicsr.utils", "basicsr.archs.arch_util", "basicsr.utils.registry")
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    sys.modules["basicsr.utils.registry"].ARCH_REGISTRY = types.SimpleNamespace(register=lambda: lambda kind: kind)
    for name in ("default_init_weights", "make_layer", "pixel_unshuffle"):
        setattr(sys.modules["basicsr.archs.arch_util"], name, lambda *args, **options: None)
    spec = importlib.util.spec_from_file_location("basicsr.archs.rrdbnet_arch", folder / "archs/rrdbnet_arch.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


import_rrdb()

from pasd.models.pasd.controlnet import ControlNetModel  # noqa: E402
from pasd.models.pasd.unet_2d_condition import UNet2DConditionModel  # noqa: E402
from pasd.models.pasd_light.controlnet import ControlNetModel as LightControlNetModel  # noqa: E402
from pasd.models.pasd_light.unet_2d_condition import UNet2DConditionModel as LightUNet2DConditionModel  # noqa: E402
from pasd.pipelines import pipeline_pasd  # noqa: E402

CLASSES = {
    "pasd": (UNet2DConditionModel, ControlNetModel),
    "pasd_light_rrdb": (LightUNet2DConditionModel, LightControlNetModel),
}
GUIDANCE, LEVEL = 9.0, 900
PROMPT = "a cat, clean"
NEGATIVE = "blurry, noise"


def shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(x.shape) for name, x in module.state_dict().items()}


def config(module) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        module.save_config(folder) if hasattr(module, "save_config") else module.config.save_pretrained(folder)
        return json.loads((Path(folder) / "config.json").read_text())


def summary(module: torch.nn.Module) -> dict:
    lines = sorted(f"{name} {list(x.shape)}" for name, x in module.state_dict().items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return {"parameters": sum(p.numel() for p in module.parameters()), "tensors": len(lines), "sha256": digest}


def make_keys() -> None:
    options = {k: layout.UNET[k] for k in layout.UNET if k not in ("sample_size", "up_block_types")}
    options["conditioning_embedding_out_channels"] = layout.EMBEDDING
    parts = {
        "unet": UNet2DConditionModel(**layout.UNET),
        "unet_light": LightUNet2DConditionModel(**layout.LIGHT),
        "controlnet": ControlNetModel(**options),
        "controlnet_rrdb": LightControlNetModel(**options | {"layers_per_block": 1}, use_rrdb=True),
        "vae": AutoencoderKL(**layout.VAE),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**layout.TEXT)),
    }
    known = {name: {"config": config(part), "shapes": shapes(part)} for name, part in parts.items()}
    full = {"cross_attention_dim": 768, "attention_head_dim": 8}
    with torch.device("meta"):
        known["full size"] = {
            "unet": summary(UNet2DConditionModel(**full)),
            "unet_light": summary(LightUNet2DConditionModel(**full)),
            "controlnet": summary(ControlNetModel(**full)),
            "controlnet_rrdb": summary(LightControlNetModel(**full, use_rrdb=True)),
        }
    (layout.HERE / "keys.json").write_text(json.dumps(known, separators=(",", ":")) + "\n")


def networks(checkpoint: Path, variant: str) -> dict[str, torch.Tensor]:
    """Outputs of ControlNet and U-Net, on sides that are and are not multiples of what three resolutions need."""
    unet_class, controlnet_class = CLASSES[variant]
    unet = unet_class.from_pretrained(checkpoint, subfolder="unet").eval()
    controlnet = controlnet_class.from_pretrained(checkpoint, subfolder="controlnet").eval()
    found = {}
    for name, (height, width) in {"even": (8, 4), "odd": (5, 7)}.items():
        latents = layout.uniform(f"latents {name}", [2, 4, height, width], -2, 2)
        image = layout.uniform(f"image {name}", [2, 3, 8 * height, 8 * width])
        text = layout.uniform(f"text {name}", [2, 5, 12], -1, 1)
        timestep = torch.tensor([999, 301])
        rgbs, down, mid = controlnet(latents, timestep, text, image, return_dict=False)
        found |= {f"{name}.rgb.{i}": x for i, x in enumerate(rgbs)}
        found |= {f"{name}.down.{i}": x for i, x in enumerate(down)} | {f"{name}.mid": mid}
        found[f"{name}.output"] = unet(
            latents, timestep, text, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample
    return found


def run(root: Path, checkpoint: Path, variant: str, exact: bool) -> dict[str, torch.Tensor]:
    """One whole sampling run; ``exact``: the second noise has the level of timestep 900 as the paper says.

    With diffusers 0.22 and later UniPC's add_noise takes a timestep that is not in its trajectory for the last one.
    Before, it was that of every scheduler, which here comes from DDPM's.
    """
    name = "900" if exact else "pinned"
    steps = layout.RUNS[name]
    base = root / "checkpoints/stable-diffusion-v1-5"
    unet_class, controlnet_class = CLASSES[variant]
    scheduler = UniPCMultistepScheduler.from_pretrained(base, subfolder="scheduler")
    pipeline = pipeline_pasd.StableDiffusionControlNetPipeline(
        vae=AutoencoderKL.from_pretrained(base, subfolder="vae"),
        text_encoder=CLIPTextModel.from_pretrained(base, subfolder="text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(base, subfolder="tokenizer"),
        unet=unet_class.from_pretrained(checkpoint, subfolder="unet"),
        controlnet=controlnet_class.from_pretrained(checkpoint, subfolder="controlnet"),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    if exact:
        scheduler.add_noise = DDPMScheduler.from_config(scheduler.config).add_noise
    drawn = []

    def randn_tensor(shape, **options):
        drawn.append(layout.noise(len(drawn), shape))
        return drawn[-1]

    pipeline_pasd.randn_tensor = randn_tensor
    DiagonalGaussianDistribution.sample = lambda self, generator=None: self.mode()
    lr = layout.uniform("lr", [1, 3, 8, 16])
    image = F.interpolate(lr, scale_factor=4, mode="bicubic").clamp(0, 1)
    args = argparse.Namespace(
        num_inference_steps=steps, added_noise_level=LEVEL, init_latent_with_noise=False, offset_noise_scale=0.0,
        latent_tiled_size=320, latent_tiled_overlap=8,
    )  # fmt: skip
    latents = []
    result = pipeline(
        args, PROMPT, image, num_inference_steps=steps, guidance_scale=GUIDANCE, negative_prompt=NEGATIVE,
        conditioning_scale=1.0, output_type="pt", callback=lambda step, timestep, x: latents.append(x.clone()),
    ).images  # fmt: skip
    assert len(latents) == steps and len(drawn) == 2
    return {f"run {name}.first": latents[0], f"run {name}.latents": latents[-1], f"run {name}.image": result}


@torch.no_grad()
def main() -> None:
    make_keys()
    found = {}
    for variant in CLASSES:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            checkpoint = layout.write(root, variant)
            outputs = networks(checkpoint, variant)
            outputs |= run(root, checkpoint, variant, exact=True) | run(root, checkpoint, variant, exact=False)
        found |= {f"{variant}.{name}": x.contiguous() for name, x in outputs.items()}
        for name, x in outputs.items():
            print(variant, name, list(x.shape), f"{x.abs().max():.3g}", f"{x.std():.3g}")
    assert all(np.isfinite(x.numpy()).all() for x in found.values())
    save_file(found, layout.HERE / "expected.safetensors")


if __name__ == "__main__":
    main()
