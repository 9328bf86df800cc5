"""CompVis and OpenCLIP names against the classes they come from (fixture) and diffusers' own conversion."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_controlnet_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from transformers import CLIPTextConfig, CLIPTextModel

from rfsr_ext.networks import compvis
from rfsr_ext.networks.controlnet import LatentControlNetModel
from rfsr_ext.weights.reading import open_network
from tests.models.released.diffbir.fixture import EXPECTED, KEYS, weights
from tests.models.released.diffbir.inputs import tell

WIDTHS = {"small": {}, "other": {"num_head_channels": 32}}
PARTS = {"unet": compvis.unet, "controlnet": compvis.controlnet, "vae": compvis.vae, "text": compvis.text_encoder}


def converted(part: str, width: str) -> compvis.Converted:
    heads = WIDTHS[width] if part in ("unet", "controlnet") else {}
    return PARTS[part](weights(part, width), **heads)


def opened(part: str, width: str) -> torch.nn.Module:
    return open_network(*converted(part, width), Path("file"), part)


def close(given: torch.Tensor, name: str) -> None:
    wanted = EXPECTED[name]
    torch.testing.assert_close(given, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("width", WIDTHS)
@torch.no_grad()
def test_unet_and_controlnet_equal_the_public_code(width):
    latents, hint, context, timestep = (EXPECTED[f"{width}.{n}"] for n in ("latents", "hint", "context", "timestep"))
    down, mid = opened("controlnet", width)(latents, timestep, context, hint, return_dict=False)
    close(down[0], f"{width}.control.first")
    close(down[-1], f"{width}.control.last")
    close(mid, f"{width}.control.mid")
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    close(opened("unet", width)(latents, timestep, context, **residuals).sample, f"{width}.output")


@pytest.mark.parametrize("width", WIDTHS)
@torch.no_grad()
def test_vae_equals_the_public_code(width):
    vae = opened("vae", width)
    close(vae.encode(EXPECTED[f"{width}.image"]).latent_dist.mode(), f"{width}.encoded")
    close(vae.decode(EXPECTED[f"{width}.encoded"]).sample, f"{width}.decoded")


@pytest.mark.parametrize("width", WIDTHS)
@torch.no_grad()
def test_text_tower_equals_the_public_code(width):
    close(opened("text", width)(EXPECTED[f"{width}.ids"])[0], f"{width}.text")


@pytest.mark.parametrize("width", WIDTHS)
def test_agrees_with_the_conversion_of_diffusers(width):
    build, ours = converted("unet", width)
    named = {f"model.diffusion_model.{n}": t for n, t in weights("unet", width).items()}
    same(ours, convert_ldm_unet_checkpoint(named, dict(build().config)))
    build, ours = converted("controlnet", width)
    same(ours, convert_controlnet_checkpoint(weights("controlnet", width), dict(build().config)))
    build, ours = converted("vae", width)
    named = {f"first_stage_model.{n}": t for n, t in weights("vae", width).items()}
    same(ours, convert_ldm_vae_checkpoint(named, dict(build().config)))
    build, ours = converted("text", width)
    theirs = convert_open_clip_checkpoint(build(), weights("text", width), prefix="")
    last = f"encoder.layers.{build().config.num_hidden_layers}."
    read = {n.removeprefix("text_model."): t for n, t in theirs.items() if last not in n and "projection" not in n}
    same({n.removeprefix("text_model."): t for n, t in ours.items()}, read)


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


FULL = {
    "unet": lambda: UNet2DConditionModel(
        **STABLE_DIFFUSION_2, up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)
    ),
    "controlnet": lambda: LatentControlNetModel(**STABLE_DIFFUSION_2, conditioning_channels=4),
    "vae": lambda: AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ),
    "text": lambda: CLIPTextModel(
        CLIPTextConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"
        )
    ),
}
STABLE_DIFFUSION_2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}

# where the small one's width stays, so that nothing adapts it
WIDER = {
    "unet": ["input_blocks.4.0.skip_connection.weight", "input_blocks.4.0.skip_connection.bias"],
    "controlnet": ["input_blocks.4.0.skip_connection.weight", "input_blocks.4.0.skip_connection.bias"],
    "vae": [
        f"{block}.block.0.nin_shortcut.{kind}"
        for block in ("encoder.down.1", "decoder.up.0")
        for kind in ("weight", "bias")
    ],
}


@pytest.mark.parametrize("part", FULL)
def test_full_size_has_the_names_of_the_public_class(part):
    """The small file's names with the shapes of Stable Diffusion 2.1's networks are those of the full public class, and
    give these networks back."""
    with torch.device("meta"):
        network = FULL[part]()
        small = {n: torch.empty(shape) for n, shape in KEYS["small"][part].items()}
        small |= {n: torch.empty(1) for n in WIDER.get(part, ())}
    shapes = {n.removeprefix("text_model."): t for n, t in network.state_dict().items()}
    _, renamed = PARTS[part](small)
    new_names = {id(t): n.removeprefix("text_model.") for n, t in renamed.items()}
    full = {n: shapes[new_names[id(t)]] for n, t in small.items() if id(t) in new_names}
    for name in small.keys() - full.keys():
        if ".mid.attn_1." in name:  # 1x1 convolutions
            width = shapes["decoder.mid_block.attentions.0.to_q.weight"].shape[0]
            full[name] = torch.empty(width, width, 1, 1, device="meta")
        elif "in_proj" in name:  # q, k and v in one
            full[name] = torch.empty(3072, *[1024] * (len(small[name].shape) - 1), device="meta")
    if part == "text":  # the last layer, at which Stable Diffusion does not look
        first, layers = "transformer.resblocks.0.", "transformer.resblocks."
        deep = {n.removeprefix(first): t for n, t in full.items() if n.startswith(first)}
        full = {n: t for n, t in full.items() if not n.startswith(layers)}
        full |= {f"{layers}{k}.{n}": t for k in range(24) for n, t in deep.items()}
        full |= {
            "logit_scale": torch.empty((), device="meta"),
            "text_projection": torch.empty(1024, 1024, device="meta"),
        }
    shapes = {n: list(t.shape) for n, t in full.items()}
    assert tell(shapes, sum(t.numel() for t in full.values())) == KEYS["full"][part]
    build, again = PARTS[part](full)
    with torch.device("meta"):
        built = build().state_dict()
    assert {n: t.shape for n, t in built.items()} == {n: t.shape for n, t in network.state_dict().items()}
    assert {n: t.shape for n, t in again.items()} == {n: t.shape for n, t in network.state_dict().items()}


def test_parts_of_a_full_checkpoint():
    tensor = torch.zeros(1)
    names = ["model.diffusion_model.out.0.bias", "control_model.a", "cond_encoder.b", "preprocess_model.c", "betas"]
    names += ["first_stage_model.d", "cond_stage_model.model.e", "model_ema.decay", "sqrt_one_minus_alphas_cumprod"]
    names += [n for n in KEYS["schedule"]]
    found = compvis.parts(dict.fromkeys(names, tensor), Path("full.ckpt"))
    assert {n: list(p) for n, p in found.items()} == {
        "unet": ["out.0.bias"], "controlnet": ["a"], "cond_encoder": ["b"], "preprocess_model": ["c"], "vae": ["d"],
        "text_encoder": ["e"],
    }  # fmt: skip
    with pytest.raises(
        ValueError, match=r"'full.ckpt' must be a latent diffusion checkpoint .* got 'conv_first.weight'"
    ):
        compvis.parts(dict.fromkeys([*names, "conv_first.weight"], tensor), Path("full.ckpt"))
    with pytest.raises(ValueError, match=r"'full.ckpt' must be .* but no name starts with model\.diffusion_model\."):
        compvis.parts({"betas": tensor}, Path("full.ckpt"))


def test_every_tensor_is_accounted_for():
    tensors = weights("unet", "other")
    tensors["output_blocks.0.3.weight"] = tensors.pop("output_blocks.0.0.in_layers.0.weight")
    lacks = "lacks 1 tensors such as up_blocks.0.resnets.0.norm1.weight"
    with pytest.raises(ValueError, match=f"{lacks} and has 1 unknown ones such as output_blocks.0.3.weight"):
        open_network(*compvis.unet(tensors, num_head_channels=32), Path("file"), "a U-Net")


def without(part: str, start: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights(part, "small").items() if not name.startswith(start)}


HINT = {"input_hint_block.0.weight": torch.zeros(1)}


@pytest.mark.parametrize(
    ("convert", "tensors", "message"),
    [
        (compvis.unet, weights("unet", "other"), "32 channels, which must be a multiple of num_head_channels, got 64"),
        (compvis.unet, weights("vae", "small"), "must have a tensor 'input_blocks.0.0.weight', got a file without it"),
        (compvis.unet, without("unet", "input_blocks.3."), "must have equally many blocks at each resolution"),
        (compvis.controlnet, HINT | weights("controlnet", "small"), "must take z_t and control latents, got one that"),
        (compvis.vae, weights("unet", "small"), "must have a tensor 'encoder.conv_in.weight'"),
        (compvis.text_encoder, without("text", "transformer.resblocks.2.ln_1.bias"), "got 'ln_1.bias' not in both"),
    ],
)
def test_another_architecture_is_refused(convert, tensors, message):
    with pytest.raises(ValueError, match=message):
        convert(tensors)
