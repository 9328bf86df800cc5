"""Makes CCSR v2's part of the fixture, by its authors' code; run by hand only.

Repository: https://github.com/ducchung0002/CCSRv2, branch CCSR-v2.0 at c5f7d4e37b191473028be2777f35f355af195d36,
which is the authors' own history. Versions: diffusers 0.21.0, transformers 4.40.2, huggingface_hub 0.23.5, torch
2.14.1.
Command, from the root of this project with these old packages first on the path:

    PYTHONPATH=OLD_PACKAGES:. python tests/models/released/ccsr/make_v2.py CCSRV2_FOLDER

Changed in their pipeline, in memory: it computes in float32 where it casts to float16, takes the mode of the VAE's
posterior instead of a sample, does not wait for a GPU, and takes noise from `layout.noise`. Their first step is given
the negative prompt whenever there is guidance, although there is none in that step: it takes the first half of
[negative, positive]. "negative_first" is that; for the others the second half is taken, the positive prompt.
"""

import hashlib
import importlib
import json
import sys
import types
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.models.released.ccsr import layout

FULL_UNET = {  # unet/config.json of Stable Diffusion 2.1-base where it differs from diffusers' defaults
    "sample_size": 64,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
UNET = {
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 32,
    "norm_num_groups": 16,
    "use_linear_projection": True,
}
VAE = {
    "block_out_channels": [8, 8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
}
TEXT = {
    "vocab_size": len(layout.vocabulary()),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": layout.LENGTH,
    "hidden_act": "gelu",
}
RUNS = {  # name: (num_inference_steps, t_max, t_min, guidance_scale)
    "one_step": (1, 0.6667, 0.0, 1.0),
    "two_steps": (6, 0.6667, 0.5, 4.5),
    "negative_first": (6, 0.6667, 0.5, 4.5),
    "many_steps": (20, 0.6667, 0.0, 4.5),
    "no_leap": (6, 1, 0.5, 4.5),
}


def pipeline_module(public: Path, negative_first: bool):
    text = (public / "pipelines" / "pipeline_ccsr.py").read_text()
    for old, new in (
        ("torch.float16", "torch.float32"),
        ("torch.cuda.synchronize()", "pass"),
        (".latent_dist.sample()", ".latent_dist.mode()"),
    ):
        assert old in text, old
        text = text.replace(old, new)
    if not negative_first:
        assert text.count("prompt_embeds.chunk(2)[0]") == 1
        text = text.replace("prompt_embeds.chunk(2)[0]", "prompt_embeds.chunk(2)[1]")
    module = types.ModuleType("pipeline_ccsr")
    exec(compile(text, "pipeline_ccsr.py", "exec"), module.__dict__)
    return module


def count(network: torch.nn.Module) -> dict:
    shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    lines = "\n".join(sorted(f"{name} {shape}" for name, shape in shapes.items()))
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
    }


def main(public: Path) -> None:
    sys.path.insert(0, str(public))
    public_controlnet = importlib.import_module("models.controlnet").ControlNetModel

    unet = UNet2DConditionModel(**UNET, up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"])
    networks = {
        "unet": unet,
        "controlnet": public_controlnet(**UNET, use_vae_encode_condition=True),
        "vae": AutoencoderKL(**VAE),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT)),
    }
    parts = {}
    for name, network in networks.items():
        config = json.loads(network.config.to_json_string() if name == "text_encoder" else network.to_json_string())
        shapes = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
        network.load_state_dict(layout.weights(name, shapes))
        network.eval().requires_grad_(False)
        parts[name] = {"config": config, "shapes": shapes}
    with torch.device("meta"):
        full = {
            "unet": count(UNet2DConditionModel(**FULL_UNET)),
            "controlnet": count(
                public_controlnet(
                    **{name: value for name, value in FULL_UNET.items() if name != "sample_size"},
                    use_vae_encode_condition=True,
                )
            ),
        }

    lr = layout.lr_images()
    image = layout.enlarged(lr)
    condition = networks["vae"].encode(image * 2 - 1).latent_dist.mode() * networks["vae"].config.scaling_factor
    latents = torch.cat([layout.noise(i, 0) for i in range(2)])
    tokenizer_folder = Path(sys.argv[2]) if len(sys.argv) > 2 else Path("/tmp/ccsr-tokenizer")
    if not tokenizer_folder.exists():
        layout.write_tokenizer(tokenizer_folder)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    ids = tokenizer(
        [layout.PROMPT, layout.NEGATIVE_PROMPT],
        padding="max_length",
        max_length=layout.LENGTH,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    text = networks["text_encoder"](ids)[0]
    timestep = torch.tensor([999, 13])
    down, mid = networks["controlnet"](
        latents, timestep, text, image, vae_encode_condition_hidden_states=condition, return_dict=False
    )
    output = networks["unet"](
        latents,
        timestep,
        text,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
        return_dict=False,
    )[0]
    expected = {
        "input_ids": ids,
        "condition_latents": condition,
        "text": text,
        **{f"controlnet.down.{i}": residual for i, residual in enumerate(down)},
        "controlnet.mid": mid,
        "unet": output,
    }

    drawn = {"image": 0, "draw": 0}

    def draw(*arguments, **options):
        drawn["draw"] += 1
        return layout.noise(drawn["image"], drawn["draw"])

    import diffusers.schedulers.scheduling_ddpm as ddpm

    ddpm.randn_tensor = draw
    torch.randn_like = draw
    for name, (steps, t_max, t_min, guidance_scale) in RUNS.items():
        module = pipeline_module(public, negative_first=name == "negative_first")
        pipeline = module.StableDiffusionControlNetPipeline(
            vae=networks["vae"],
            text_encoder=networks["text_encoder"],
            tokenizer=tokenizer,
            unet=unet,
            controlnet=networks["controlnet"],
            scheduler=DDPMScheduler.from_config(layout.SCHEDULER),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        results = []
        for i in range(2):
            drawn.update(image=i, draw=0)
            _, result = pipeline(
                t_max,
                t_min,
                False,
                512,
                256,
                prompt=layout.PROMPT,
                image=image[i : i + 1],
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                negative_prompt=layout.NEGATIVE_PROMPT,
                latents=layout.noise(i, 0),
                output_type="latent",
                start_steps=999,
                start_point="lr",
                use_vae_encode_condition=True,
            )
            results.append(result.images)
        expected[f"run.{name}"] = torch.cat(results)
        print(name, expected[f"run.{name}"].std().item(), drawn)
    decoded = networks["vae"].decode(expected["run.two_steps"] / networks["vae"].config.scaling_factor).sample
    expected["image.two_steps"] = decoded / 2 + 0.5

    file, table = layout.HERE / "expected.safetensors", layout.HERE / "keys.json"
    stored = load_file(file) if file.exists() else {}
    stored = {k: v for k, v in stored.items() if not k.startswith("v2.")}
    save_file(stored | {f"v2.{k}": v.detach().contiguous() for k, v in expected.items()}, file)
    known = json.loads(table.read_text()) if table.exists() else {}
    runs = {name: list(values) for name, values in RUNS.items()}
    table.write_text(json.dumps(known | {"v2": {"parts": parts, "full": full, "runs": runs}}) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        main(Path(sys.argv[1]))
