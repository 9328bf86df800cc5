"""How ``keys.json`` and ``expected.safetensors`` were made, by DiffBIR's own code; runs only by hand.

    python -m tests.models.released.diffbir.make V1 V2

Both are checkouts of https://github.com/XPixelGroup/DiffBIR: V1 of commit ea13481 (the code of DiffBIR v1), V2 of
commit 3f8b530 (v1, v2 and v2.1).  Beside this project's own environment (torch 2.14.1) they need einops 0.7.0,
omegaconf 2.3.0, antlr4-python3-runtime 4.9.3, timm 0.9.16, ftfy 6.2.0, regex, torchsde 0.2.6 and trampoline.  What the
authors' modules import at their top and this script never calls (Lightning, OpenCV, LPIPS, pandas) is stood in for
below; V1's ``open_clip``, a package, is the copy of it that V2 carries.  Weights are `seeded`; the texts are this
project's token numbers in place of OpenCLIP's.
"""

import contextlib
import importlib.util
import io
import json
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tests.models.released.diffbir.inputs import STEPS, lr_image, noise, tell, text_ids, tokenizer
from tests.models.released.seeded import seeded

HERE = Path(__file__).parent


def stub(name: str, **contents):
    module = types.ModuleType(name)
    module.__dict__.update(contents)
    sys.modules[name] = module
    return module


class LightningModule(torch.nn.Module):
    @property
    def device(self):
        return next(self.parameters()).device


def stand_in(v1: Path, v2: Path) -> None:
    stub("pytorch_lightning", LightningModule=LightningModule)
    stub("pytorch_lightning.utilities")
    stub("pytorch_lightning.utilities.types", STEP_OUTPUT=object)
    stub("pytorch_lightning.utilities.distributed", rank_zero_only=lambda f: f)
    stub("cv2")
    stub("lpips", LPIPS=lambda net: torch.nn.Linear(1, 1))
    stub("pandas")
    torch.Tuple = tuple  # a name that torch 2.2 let slip
    folder = v2 / "diffbir/model/open_clip"
    spec = importlib.util.spec_from_file_location(
        "open_clip", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    open_clip = importlib.util.module_from_spec(spec)
    sys.modules["open_clip"] = open_clip
    spec.loader.exec_module(open_clip)
    sys.path[:0] = [str(v1), str(v2)]


def config(v2: Path, width: dict):
    """The ControlLDM configuration of V2, at full width or at the one given."""
    from omegaconf import OmegaConf

    params = OmegaConf.load(v2 / "configs/inference/cldm.yaml")["params"]
    for part in (params.unet_cfg, params.controlnet_cfg):
        part.use_checkpoint = False
        part.update(width.get("unet", {}))
    params.vae_cfg.ddconfig.update(width.get("vae", {}))
    params.clip_cfg.text_cfg.update(width.get("text", {}))
    params.clip_cfg.embed_dim = params.clip_cfg.text_cfg.width
    return params


SMALL = {
    "unet": {"model_channels": 64, "channel_mult": [1, 1, 2, 2], "context_dim": 64},
    "vae": {"ch": 32, "ch_mult": [1, 1, 2, 2]},
    "text": {"width": 64, "heads": 1, "layers": 3},
}
# for whole models: no more than a sampling run needs
TINY = {
    "unet": {
        "model_channels": 64,
        "channel_mult": [1, 1],
        "context_dim": 64,
        "num_res_blocks": 1,
        "attention_resolutions": [2, 1],
    },
    "vae": {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    "text": {"width": 64, "heads": 1, "layers": 2},
}
# other depths, widths and heads, attention at other resolutions, and two transformer blocks less
OTHER = {
    "unet": {"model_channels": 32, "channel_mult": [1, 2, 3], "context_dim": 128, "num_res_blocks": 1,
             "attention_resolutions": [2, 1], "num_head_channels": 32},
    "vae": {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1},
    "text": {"width": 128, "heads": 2, "layers": 2, "vocab_size": 100, "context_length": 12},
}  # fmt: skip
SWINIR = {"embed_dim": 24, "depths": [2, 2], "num_heads": [3, 3], "img_size": 16}
RRDBNET = {"nf": 16, "nb": 2, "gc": 8}


def shapes(module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def fill(module, scale: float = 1.0) -> None:
    """Seeded weights for everything but what the class computes (SwinIR's masks and indices)."""
    own = module.state_dict()
    names = {n for n, _ in module.named_parameters()}
    weights = seeded({n: list(t.shape) for n, t in own.items() if n in names}, scale=scale)
    module.load_state_dict(own | weights)
    module.eval().requires_grad_(False)


def swinir(v2: Path, **options):
    from omegaconf import OmegaConf

    from diffbir.model import SwinIR

    return SwinIR(**(OmegaConf.to_container(OmegaConf.load(v2 / "configs/inference/swinir.yaml")["params"]) | options))


def rrdbnet(v2: Path, **options):
    from omegaconf import OmegaConf

    from diffbir.model import RRDBNet

    return RRDBNet(**(OmegaConf.to_container(OmegaConf.load(v2 / "configs/inference/bsrnet.yaml")["params"]) | options))


def networks(ldm, prefix: str, size: int, ids: torch.Tensor, out: dict) -> None:
    """Inputs and outputs of every network of a ControlLDM."""
    generator = np.random.default_rng(len(prefix))
    draw = lambda *shape: torch.from_numpy(generator.random(shape) * 2 - 1).float()  # noqa: E731
    factor = 2 ** (len(ldm.vae.encoder.down) - 1)
    latents, hint = draw(2, 4, size, size), draw(2, 4, size, size)
    context = draw(2, 5, ldm.clip.model.ln_final.weight.numel())
    timestep, image = torch.tensor([7, 640]), draw(1, 3, 4 * factor, 4 * factor)
    control = ldm.controlnet(x=latents, hint=hint, timesteps=timestep, context=context)
    out |= {
        f"{prefix}.latents": latents,
        f"{prefix}.hint": hint,
        f"{prefix}.context": context,
        f"{prefix}.timestep": timestep,
        f"{prefix}.control.first": control[0],
        f"{prefix}.control.last": control[-2],
        f"{prefix}.control.mid": control[-1],
        f"{prefix}.output": ldm(latents, timestep, {"c_txt": context, "c_img": hint}),
        f"{prefix}.image": image,
        f"{prefix}.encoded": ldm.vae.encode(image).mode(),
        f"{prefix}.decoded": ldm.vae.decode(ldm.vae.encode(image).mode()),
        f"{prefix}.ids": ids,
        f"{prefix}.text": ldm.clip(ids),
    }


def full_v1(v1: Path):
    """The class of general_full_v1.ckpt, as tiny."""
    from omegaconf import OmegaConf
    from open_clip import CLIP
    from utils.common import instantiate_from_config

    cfg = OmegaConf.load(v1 / "configs/model/cldm.yaml")
    for part in (cfg.params.unet_config, cfg.params.control_stage_config):
        part.params.update(TINY["unet"] | {"use_checkpoint": False})
    cfg.params.first_stage_config.params.ddconfig.update(TINY["vae"])
    cfg.params.preprocess_config.params.update(SWINIR)
    text = TINY["text"] | {"vocab_size": len(tokenizer()), "context_length": text_ids([""]).shape[1]}
    vision = {"image_size": 28, "layers": 1, "width": 64, "head_width": 64, "patch_size": 14}  # deleted by DiffBIR

    def create(*args, **kwargs):
        return CLIP(text["width"], vision, text), None, None

    with mock.patch("open_clip.create_model_and_transforms", create, create=True):
        return instantiate_from_config(cfg)


def sample_v1(model, out: dict) -> None:
    """v1's own sampler, from the enlarged picture to the result."""
    from model.spaced_sampler import SpacedSampler

    lr = lr_image()
    enlarged = F.interpolate(lr, scale_factor=4, mode="bicubic", antialias=True).clamp(0, 1)
    control = model.preprocess_model(enlarged)
    draws = iter(noise(STEPS + 1))
    x_T = next(draws)
    with (
        mock.patch("torch.randn_like", lambda x: next(draws)),
        mock.patch("open_clip.tokenize", lambda texts: text_ids(list(texts))),
    ):
        result = SpacedSampler(model, var_type="fixed_small").sample(
            steps=STEPS, shape=tuple(x_T.shape), cond_img=control, positive_prompt="", negative_prompt="", x_T=x_T,
            cfg_scale=1.0, color_fix_type="wavelet",
        )  # fmt: skip
    out |= {"v1.stage1": control, "v1.result": result}


def sample_v2(v2: Path, ldm, cleaner, kind: str, out: dict) -> None:
    """The newer code's pipeline: v2 (BSRNet, guidance) and v2.1 (velocity, zero SNR, diffusers' sampler)."""
    from omegaconf import OmegaConf

    from diffbir.model import Diffusion
    from diffbir.pipeline import Pipeline
    from diffbir.utils.common import wavelet_reconstruction

    name = "diffusion_v2.1.yaml" if kind == "v2.1" else "diffusion.yaml"
    diffusion = Diffusion(**OmegaConf.load(v2 / "configs/inference" / name)["params"])
    pipeline = Pipeline(cleaner, ldm, diffusion, None, "cpu")
    lr = lr_image()
    if kind == "v2":
        control = cleaner(lr)
    else:
        control = cleaner(F.interpolate(lr, scale_factor=4, mode="bicubic", antialias=True).clamp(0, 1))
    draws = iter(noise(STEPS + 1))
    x_T = next(draws)
    ldm.clip.encode = lambda texts: ldm.clip(text_ids(list(texts)))
    guidance, sampler, steps = {"v2": (4.0, "spaced", STEPS), "v2.1": (8.0, "edm_dpm++_2m_sde", 10)}[kind]
    with (
        mock.patch("torch.randn_like", lambda x: next(draws)),
        mock.patch("torch.randn", lambda *args, **kwargs: x_T),
        mock.patch("diffbir.pipeline.VRAMPeakMonitor", contextlib.nullcontext),  # asks for a GPU
        mock.patch("diffbir.sampler.k_diffusion.BrownianTreeNoiseSampler", lambda *args: lambda *sigmas: next(draws)),
    ):
        result = pipeline.apply_cldm(
            control, steps=steps, strength=1.0, vae_encoder_tiled=False, vae_encoder_tile_size=256,
            vae_decoder_tiled=False, vae_decoder_tile_size=256, cldm_tiled=False, cldm_tile_size=512,
            cldm_tile_stride=256, pos_prompt="a photo of a dog", neg_prompt="blurry", cfg_scale=guidance,
            start_point_type="noise", sampler_type=sampler, noise_aug=0, rescale_cfg=False, s_churn=0.0, s_tmin=0.0,
            s_tmax=300.0, s_noise=1.0, eta=1.0, order=1,
        )  # fmt: skip
    out[f"{kind}.result"] = wavelet_reconstruction((result + 1) / 2, control)


@torch.no_grad()
def main(v1: Path, v2: Path) -> None:
    stand_in(v1, v2)
    from diffbir.model import ControlLDM
    from diffbir.pipeline import pad_to_multiples_of

    keys: dict = {"full": {}}
    out: dict[str, torch.Tensor] = {}
    with torch.device("meta"):
        ldm = ControlLDM(**config(v2, {}))
        full = {"unet": ldm.unet, "controlnet": ldm.controlnet, "vae": ldm.vae, "text": ldm.clip.model}
        full |= {"rrdbnet": rrdbnet(v2)}
    full |= {"swinir": swinir(v2)}  # cannot be built on the meta device
    for name, module in full.items():
        keys["full"][name] = tell(shapes(module), sum(p.numel() for p in module.parameters()))

    ids = text_ids(["a photo of a dog", ""])
    for prefix, width, size in (("small", SMALL, 8), ("other", OTHER, 12), ("tiny", TINY, 0)):
        if prefix != "other":
            width = width | {"text": width["text"] | {"vocab_size": len(tokenizer()), "context_length": ids.shape[1]}}
        ldm = ControlLDM(**config(v2, width))
        parts = {"unet": ldm.unet, "controlnet": ldm.controlnet, "vae": ldm.vae, "text": ldm.clip.model}
        for module in parts.values():
            fill(module)
        keys[prefix] = {name: shapes(module) for name, module in parts.items()}
        if size:
            networks(ldm, prefix, size, ids if prefix == "small" else torch.arange(24).view(2, 12) * 4, out)

    cleaner, enlarger = swinir(v2, **SWINIR), rrdbnet(v2, **RRDBNET)
    fill(cleaner), fill(enlarger, scale=1.5)
    keys["swinir"], keys["rrdbnet"] = shapes(cleaner), shapes(enlarger)
    image = torch.from_numpy(np.random.default_rng(0).random((1, 3, 40, 72))).float()
    out["swinir.image"], out["swinir.output"] = image, cleaner(pad_to_multiples_of(image, 64))[..., :40, :72]
    out["rrdbnet.image"], out["rrdbnet.output"] = image[..., :10, :13].clone(), enlarger(image[..., :10, :13])

    model = full_v1(v1)
    own = model.state_dict()
    for prefix, module in (("model.diffusion_model", ldm.unet), ("control_model", ldm.controlnet),
                           ("first_stage_model", ldm.vae), ("cond_encoder", ldm.vae),
                           ("cond_stage_model.model", ldm.clip.model), ("preprocess_model", cleaner)):  # fmt: skip
        for name, tensor in module.state_dict().items():
            if prefix != "cond_encoder" or name.startswith(("encoder.", "quant_conv.")):
                assert own[f"{prefix}.{name}"].shape == tensor.shape
                own[f"{prefix}.{name}"] = tensor
    model.load_state_dict(own)
    model.eval()
    keys["general_full_v1"] = tell(shapes(model), sum(p.numel() for p in model.parameters()))
    keys["schedule"] = {name: list(tensor.shape) for name, tensor in own.items() if "." not in name}
    sample_v1(model, out)
    sample_v2(v2, ldm, enlarger, "v2", out)
    sample_v2(v2, ldm, cleaner, "v2.1", out)

    (HERE / "keys.json").write_text(json.dumps(keys, separators=(",", ":")) + "\n")
    save_file({name: tensor.contiguous().clone() for name, tensor in out.items()}, HERE / "expected.safetensors")
    for name, tensor in out.items():
        if tensor.is_floating_point():
            print(f"{name:24} {list(tensor.shape)!s:20} {tensor.min():9.3f} {tensor.max():9.3f}", file=sys.stderr)


if __name__ == "__main__":
    with contextlib.redirect_stdout(io.StringIO()):  # the authors' modules print what they build
        main(*map(Path, sys.argv[1:]))
