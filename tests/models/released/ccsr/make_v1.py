"""Makes CCSR v1's part of the fixture, by its authors' code; run by hand only.

Repository: https://github.com/csslc/CCSR, main at 15778ed541daa3715b3501640235fdf9484dcdc7, whose models and samplers
are those of the later 40ba936. Versions: einops 0.7.0, omegaconf 2.3.0, open_clip_torch 2.20.0, torch 2.14.1. Command,
from the root of this project with these packages first on the path:

    PYTHONPATH=OLD_PACKAGES:. python tests/models/released/ccsr/make_v1.py CCSR_FOLDER

Stand-ins, in memory, for what does no computing here: pytorch_lightning, cv2, and taming with its discriminator and
LPIPS, of which the checkpoint's ``decoder_loss.*`` is made. OpenCLIP's text tower is theirs, but small, and its tokens
are those of `layout.vocabulary`. Noise comes from `layout.noise`, but for the one tensor that their leap draws and does
not use.
"""

import hashlib
import importlib
import json
import sys
import types
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import nn

from tests.models.released.ccsr import layout

RUNS = {  # name: (steps, t_max, t_min, guidance_scale)
    "authors": (45, 0.6667, 0.3333, 1.0),
    "two_steps": (6, 0.6667, 0.5, 1.0),
    "guided": (10, 0.8, 0.5, 3.0),
    "noisier_than_told": (20, 0.6667, 0.5, 1.0),
}
MULTIPLES = [1, 2, 3, 3]  # channels change where those of the large one do, so that all of its tensors are there
SMALL = {"model_channels": 32, "channel_mult": MULTIPLES, "num_head_channels": 16, "context_dim": 64}
VISION = {"image_size": 28, "patch_size": 14, "width": 64, "layers": 1, "head_width": 64}  # thrown away by the authors
VOCABULARY = layout.vocabulary()


def stub(name: str, **names):
    module = types.ModuleType(name)
    module.__dict__.update(names)
    module.__path__ = []
    sys.modules[name] = module


class LightningModule(nn.Module):
    @property
    def device(self):
        return next(self.parameters()).device


class Loss(nn.Module):
    def __init__(self, *arguments, **options):
        super().__init__()
        self.main = nn.Sequential(nn.Conv2d(3, 4, 4))


def stand_in() -> None:
    stub("pytorch_lightning", LightningModule=LightningModule)
    stub("pytorch_lightning.utilities")
    stub("pytorch_lightning.utilities.distributed", rank_zero_only=lambda function: function)
    stub("cv2")
    names = {"LPIPS": Loss, "NLayerDiscriminator": Loss, "weights_init": lambda module: None}
    for name in ("", ".modules", ".modules.losses", ".modules.discriminator"):
        stub(f"taming{name}")
    for name in ("losses.vqperceptual", "losses.lpips", "discriminator.model"):
        stub(f"taming.modules.{name}", hinge_d_loss=None, vanilla_d_loss=None, adopt_weight=None, **names)


def tokenize(texts) -> torch.Tensor:
    texts = [texts] if isinstance(texts, str) else texts
    rows = []
    for text in texts:
        assert text.isalpha() or not text  # one word, letter by letter
        letters = [*text[:-1], text[-1] + "</w>"] if text else []
        row = [VOCABULARY.index(token) for token in ("<|startoftext|>", *letters, "<|endoftext|>")]
        rows.append(row + [0] * (layout.LENGTH - len(row)))
    return torch.tensor(rows)


def model(public: Path, small: bool):
    import open_clip
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    def tower(arch, device=None, pretrained=None):
        text = CLIPTextCfg(layout.LENGTH, len(VOCABULARY), 64, 1, 3) if small else CLIPTextCfg(77, 49408, 1024, 16, 24)
        return CLIP(64 if small else 1024, CLIPVisionCfg(**VISION), text), None, None

    open_clip.create_model_and_transforms = tower
    open_clip.tokenize = tokenize
    config = OmegaConf.load(public / "configs" / "model" / "ccsr_stage2.yaml")
    for part in ("control_stage_config", "unet_config"):
        config.params[part].params.use_checkpoint = False
        if small:
            config.params[part].params.update(SMALL)
    if small:
        config.params.first_stage_config.params.ddconfig.update({"ch": 32, "ch_mult": MULTIPLES})
    return importlib.import_module("utils.common").instantiate_from_config(config)


def on_the_cpu(schedule):
    """It computes numbers, which the meta device has none of."""

    def compute(*arguments, **options):
        with torch.device("cpu"):
            return schedule(*arguments, **options)

    return compute


def shapes_of(network: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in network.state_dict().items()}


def main(public: Path) -> None:
    stand_in()
    sys.path.insert(0, str(public))
    sampler_class = importlib.import_module("model.q_sampler").SpacedSampler

    ddpm = importlib.import_module("ldm.models.diffusion.ddpm_ccsr_stage2")
    for name in ("register_schedule", "register_schedule_inter"):
        setattr(ddpm.LatentDiffusion, name, on_the_cpu(getattr(ddpm.LatentDiffusion, name)))
    full = {}
    with torch.device("meta"):
        large = model(public, small=False)
    for prefix in ("control_model", "model.diffusion_model", "first_stage_model", "cond_encoder", "cond_stage_model"):
        network = large.get_submodule(prefix)
        lines = "\n".join(sorted(f"{name} {shape}" for name, shape in shapes_of(network).items()))
        full[prefix] = {
            "parameters": sum(p.numel() for p in network.parameters()),
            "sha256": hashlib.sha256(lines.encode()).hexdigest(),
        }

    ldm = model(public, small=True)
    shapes = shapes_of(ldm)
    table = layout.HERE / "keys.json"
    known = json.loads(table.read_text()) if table.exists() else {}
    runs = {name: list(values) for name, values in RUNS.items()}
    table.write_text(json.dumps(known | {"v1": {"shapes": shapes, "full": full, "runs": runs}}) + "\n")
    own = ldm.state_dict()
    ldm.load_state_dict(layout.v1_tensors())
    for name, tensor in own.items():  # the schedule's numbers are made by the class
        if "." not in name:
            getattr(ldm, name).copy_(tensor)
    ldm.eval().requires_grad_(False)

    image = layout.enlarged(layout.lr_images(16))
    latents = torch.cat([layout.noise(i, 0, 8) for i in range(2)])
    timestep = torch.tensor([999, 13])
    condition = ldm.apply_condition_encoder(image)
    text = ldm.get_learned_conditioning(["", "blurry"])
    control = ldm.control_model(x=latents, hint=condition, timesteps=timestep, context=text)
    expected = {
        "input_ids": tokenize(["", "blurry"]),
        "condition_latents": condition,
        "text": text,
        "controlnet.down.0": control[0],
        "controlnet.down.5": control[5],
        "controlnet.down.11": control[11],
        "controlnet.mid": control[12],
        "unet": ldm.apply_model(latents, timestep, {"c_latent": [condition], "c_crossattn": [text]}),
        "encoded": ldm.encode_first_stage(image * 2 - 1).mode() * ldm.scale_factor,
    }

    drawn = {"draw": 0}

    def draw(*arguments, **options):
        drawn["draw"] += 1
        which = max(drawn["draw"] - 1, 0)  # the first draw is thrown away
        return torch.cat([layout.noise(i, which, 8) for i in range(2)])

    torch.randn_like = draw
    for name, (steps, t_max, t_min, guidance_scale) in RUNS.items():
        drawn["draw"] = 0
        sampler = sampler_class(ldm, var_type="fixed_small")
        decode, found = ldm.decode_first_stage, []
        ldm.decode_first_stage = lambda z, found=found, decode=decode: found.append(z) or decode(z)
        pixels = sampler.sample_ccsr(
            steps=steps, t_max=t_max, t_min=t_min, shape=latents.shape, cond_img=image, positive_prompt="sharp",
            negative_prompt="blurry", x_T=latents, cfg_scale=guidance_scale, color_fix_type="none",
        )  # fmt: skip
        ldm.decode_first_stage = decode
        expected[f"run.{name}"] = found[0]
        if name == "two_steps":
            expected["image.two_steps"] = pixels
        print(name, expected[f"run.{name}"].std().item(), drawn)

    file = layout.HERE / "expected.safetensors"
    stored = load_file(file) if file.exists() else {}
    stored = {k: v for k, v in stored.items() if not k.startswith("v1.")}
    save_file(stored | {f"v1.{k}": v.detach().contiguous() for k, v in expected.items()}, file)


if __name__ == "__main__":
    with torch.no_grad():
        main(Path(sys.argv[1]))
