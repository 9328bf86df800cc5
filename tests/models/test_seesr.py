"""SeeSR against its authors' code, from every layout its files come in, and files that are wrong."""

import copy
import hashlib
import json
import re
import shutil

import peft
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from rfsr_ext.models import load_model
from rfsr_ext.models.seesr import SEESR, SeeSRModel
from rfsr_ext.networks.seesr import SeeSRControlNet, SeeSRUNet
from rfsr_ext.sampling import Tiled, Tiles, inference_condition, sample, upscale
from rfsr_ext.sampling.color import COLOR_FIXES
from tests.models.released.seeded import seeded
from tests.models.released.seesr import layout
from tests.models.released.seesr.model import seesr_model

pytestmark = pytest.mark.usefixtures("no_weights")

EXPECTED = load_file(layout.HERE / "expected.safetensors")
LR = layout.uniform("lr", [2, 3, 12, 10])
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def weights(tmp_path):
    return layout.write_layout(tmp_path / "preset/models")


@pytest.fixture
def model():
    return seesr_model()


def relative(x, y):
    return ((x - y).abs().max() / y.abs().max()).item()


def run(unet, controlnet, **changes):
    """Both networks on the fixture's inputs: the ControlNet's residuals, then the U-Net's output."""
    inputs = {
        "encoder_hidden_states": layout.uniform("text", [2, 5, unet.config.cross_attention_dim], -1, 1),
        "image_encoder_hidden_states": layout.uniform("tokens", [2, 7, 512], -1, 1),
        "return_dict": False,
    } | changes
    inputs = {name: value for name, value in inputs.items() if value is not None}
    latents, timestep = layout.uniform("latents", [2, 4, 8, 8], -1, 1), torch.tensor([900, 17])
    side = 8 * 2 ** (len(controlnet.config.conditioning_embedding_out_channels) - 1)
    down, mid = controlnet(latents, timestep, controlnet_cond=layout.uniform("image", [2, 3, side, side]), **inputs)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    return [*down, mid, unet(latents, timestep, **residuals, **inputs)[0]]


def sample_as_the_authors(model, monkeypatch, count, steps, guidance_scale):
    """Sampling with the fixture's noises and prompts, without tags."""
    drawn = iter(layout.noise(1 + steps, (1, 4, 24, 20)))

    def randn_tensor(*args, **options):
        return next(drawn).expand(count, -1, -1, -1)

    monkeypatch.setattr("rfsr_ext.models.base.randn_tensor", randn_tensor)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", randn_tensor)
    monkeypatch.setattr(model, "describe", lambda lr: [""] * len(lr))
    monkeypatch.setattr(model, "recipe", type(model.recipe)(**model.recipe.to_dict() | {"added_prompt": ""}))
    result = sample(model, LR[:count], ["cat, 8k"] * count, None, steps, guidance_scale, "blur")
    assert next(drawn, None) is None  # every noise was used, and none of another source
    return result


# -- the authors' numbers ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_networks_agree_with_the_authors(model):
    *down, mid, output = run(model.unet, model.controlnet)
    for k, residual in enumerate(down):
        assert relative(residual, EXPECTED[f"controlnet.down.{k}"]) < 1e-5
    assert f"controlnet.down.{len(down)}" not in EXPECTED
    assert relative(mid, EXPECTED["controlnet.mid"]) < 1e-5
    assert relative(output, EXPECTED["unet"]) < 1e-5


def test_sampling_agrees_with_the_authors(model, monkeypatch):
    result = sample_as_the_authors(model, monkeypatch, 2, 5, 5.5)
    assert relative(result, EXPECTED["sample"]) < 1e-4
    assert relative(COLOR_FIXES["adain"](EXPECTED["sample"].clone(), model.first_stage(LR)), EXPECTED["adain"]) < 1e-4


def test_turbo_agrees_with_the_authors(weights, monkeypatch):
    layout.write_base(weights / "sd-turbo", seed=1, turbo=True)
    model = SeeSRModel.from_released(weights, base_unet=True)
    assert model.process().timesteps.tolist() == [999, 499]
    assert (model.recipe.num_inference_steps, model.recipe.guidance_scale) == (2, 1)
    assert relative(sample_as_the_authors(model, monkeypatch, 1, 2, 1.0), EXPECTED["turbo.sample"]) < 1e-4


@pytest.mark.parametrize(("name", "kind"), [("unet", SeeSRUNet), ("controlnet", SeeSRControlNet)])
def test_full_size_has_the_public_parameters(name, kind):
    known = layout.keys()["full"][name]
    with torch.device("meta"):
        network = kind.from_config(known["config"])
    lines = sorted(f"{name} {list(x.shape)}" for name, x in network.named_parameters())
    assert network.num_parameters() == known["parameters"] == {"unet": 1_126_760_324, "controlnet": 489_031_440}[name]
    assert len(lines) == known["tensors"]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == known["sha256"]


def test_recipe():
    assert (SEESR.num_inference_steps, SEESR.guidance_scale, SEESR.color_fix) == (50, 5.5, "adain")
    assert (SEESR.start, SEESR.start_timestep, SEESR.min_side, SEESR.tile) == ("lr", 999, 512, 768)
    assert (SEESR.structure_window, SEESR.reward_window) == ((1, 20), (41, 50))


def test_sampling_starts_from_each_image_at_999(model):
    process = model.process(50)
    assert process.timesteps[[0, -1]].tolist() == [981, 1]  # as its authors sample, although the noise is of 999
    condition = model.condition(LR, ["", ""])
    generators = [torch.Generator().manual_seed(k) for k in (0, 1)]
    noise = torch.cat([torch.randn(1, 4, 24, 20, generator=torch.Generator().manual_seed(k)) for k in (0, 1)])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha = (1 - betas).prod().item()
    wanted = alpha**0.5 * model.encode(condition.image) + (1 - alpha) ** 0.5 * noise
    torch.testing.assert_close(model.initial_latents(condition, process, generators), wanted, atol=1e-5, rtol=1e-5)


# -- networks of other sizes ------------------------------------------------------------------------------------------

SIZES = {
    "three levels, convolutions": {
        "block_out_channels": [8, 16, 24], "layers_per_block": 1, "attention_head_dim": 2, "cross_attention_dim": 20,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"], "norm_num_groups": 2,
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"],
    },
    "two transformer layers": {
        "block_out_channels": [12, 24], "layers_per_block": 2, "attention_head_dim": [3, 4], "cross_attention_dim": 8,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "norm_num_groups": 3, "upcast_attention": True,
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": True,
        "transformer_layers_per_block": 2,
    },
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_without_image_attentions_they_are_stock(sizes):
    """Where what the image attentions give is zero, the networks are diffusers' own; where not, tokens count."""
    down = {name: value for name, value in sizes.items() if name != "up_block_types"}
    down["conditioning_embedding_out_channels"] = [4, 8]
    networks, stock = [], []
    for kind, plain, config in ((SeeSRUNet, UNet2DConditionModel, sizes), (SeeSRControlNet, ControlNetModel, down)):
        network = kind(**config).eval()
        tensors = seeded({name: list(x.shape) for name, x in network.state_dict().items()}, seed=5)
        network.load_state_dict(tensors)
        networks.append(network)
        stock.append(plain(**config).eval())
        stock[-1].load_state_dict({name: x for name, x in tensors.items() if "image_attentions" not in name})
    with_image = run(*networks)
    other = run(*networks, image_encoder_hidden_states=layout.uniform("others", [2, 9, 512], -1, 1))
    assert all(relative(x, y) > 1e-3 for x, y in zip(with_image[-2:], other[-2:], strict=True))
    count = 0
    for network in networks:
        for name, parameter in network.named_parameters():
            if re.search(r"image_attentions\.\d+\.proj_out", name):
                parameter.zero_()
                count += 1
    attending = [m for network in networks for n, m in network.named_modules() if re.search(r"(?<!_)attentions$", n)]
    assert count == 2 * sum(map(len, attending)) > 0
    for ours, theirs in zip(run(*networks), run(*stock, image_encoder_hidden_states=None), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_are_the_same_with_checkpointing(model):
    found = []
    for _ in range(2):
        model.unfreeze()
        run(model.unet, model.controlnet)[-1].square().mean().backward()
        found.append({name: p.grad for name, p in model.trained_parameters().items()})
        for parameter in model.trained_parameters().values():
            parameter.grad = None
        model.unet.enable_gradient_checkpointing()
        model.controlnet.enable_gradient_checkpointing()
    assert all(found[0][name].any() for name in found[0] if ".image_attentions." in name and "to_v" in name)
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)


def test_checkpointing_recomputes_the_image_attentions(model, monkeypatch):
    """Otherwise the test above could not fail."""
    calls = []
    attention = model.unet.mid_block.image_attentions[0].transformer_blocks[0].attn2
    attention.register_forward_hook(lambda *_: calls.append(1))
    model.unfreeze()
    model.unet.enable_gradient_checkpointing()
    run(model.unet, model.controlnet)[-1].square().mean().backward()
    assert len(calls) == 2


@torch.no_grad()
def test_a_copy_attends_with_its_own_weights(model):
    reference = model.reference()
    before = run(reference.unet, reference.controlnet)
    for network in (model.unet, model.controlnet):
        for name, parameter in network.named_parameters():
            if "image_attentions" in name:
                parameter.add_(0.1)
    assert all(torch.equal(x, y) for x, y in zip(run(reference.unet, reference.controlnet), before, strict=True))
    assert relative(run(model.unet, model.controlnet)[-1], before[-1]) > 1e-2


@torch.no_grad()
def test_lora_on_the_image_attentions(model):
    before = run(model.unet, model.controlnet)[-1]
    config = peft.LoraConfig(r=2, target_modules=r".*image_attentions.*attn2\.to_[qv]", init_lora_weights=False)
    adapted = peft.get_peft_model(model.unet, config)
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 2 * 6 and all(".image_attentions." in name for name in names)  # 2 down, 1 mid, 3 up
    assert relative(run(adapted, model.controlnet)[-1], before) > 1e-3
    with adapted.disable_adapter():
        torch.testing.assert_close(run(adapted, model.controlnet)[-1], before)


def test_plain_networks_are_refused():
    with pytest.raises(ValueError, match="use_image_cross_attention must be true for SeeSRUNet, got false"):
        SeeSRUNet(**layout.UNET, use_image_cross_attention=False)


# -- conditioning -----------------------------------------------------------------------------------------------------


def test_tags_begin_the_prompt_and_tokens_are_the_same_in_both_halves(model):
    tags = bytes(EXPECTED["dape.tags"].tolist()).decode().split("\n")
    assert model.describe(LR) == tags
    condition, scale = inference_condition(model, LR, ["a cat", ""])
    added = "clean, high-resolution, 8k"
    assert scale == 5.5 and condition.prompts == [f"{tags[0]}, a cat, {added}", f"{tags[1]}, {added}"]
    assert condition.negative.prompts == ["dotted, noise, blur, lowres, smooth"] * 2
    tokens, text = (condition.shared[name] for name in ("image_encoder_hidden_states", "encoder_hidden_states"))
    assert relative(tokens[..., ::16], EXPECTED["dape.tokens"]) < 1e-5
    assert torch.equal(condition.negative.shared["image_encoder_hidden_states"], tokens)
    assert not torch.equal(condition.negative.shared["encoder_hidden_states"], text)


def test_small_results_are_made_larger_first(model, monkeypatch):
    seen = []
    model.recipe = type(model.recipe)(**model.recipe.to_dict() | {"min_side": 64, "num_inference_steps": 1})
    monkeypatch.setattr(model, "embed_image", lambda lr: seen.append(lr.shape) or type(model).embed_image(model, lr))
    result = upscale(model, LR[0], progress=False)
    assert result.shape == (3, 48, 40) and set(seen) == {(1, 3, 20, 16)}  # 4 · 16 = 64, and 19.2 padded


def test_an_image_in_tiles(model):
    """Every tile sees the tokens of the whole image."""
    shapes = []
    predict = type(model).predict
    model.predict = lambda latents, timestep, condition: (
        shapes.append((tuple(latents.shape), tuple(condition.shared["image_encoder_hidden_states"].shape)))
        or predict(model, latents, timestep, condition)
    )
    result = upscale(model, LR[0], tile=24, overlap=8, num_inference_steps=2, guidance_scale=1, progress=False)
    assert result.shape == (3, 48, 40)
    assert set(shapes) == {((4, 4, 12, 12), (4, 50, 512)), ((2, 4, 12, 12), (2, 50, 512))}


@torch.no_grad()
@pytest.mark.parametrize(
    ("share", "seam"), [(SEESR.overlap / SEESR.tile, False), (4 / 96, True)], ids=["ours", "authors'"]
)
def test_tiles_of_the_recipe_have_no_seam(model, share, seam):
    """What tiles change of the output must not change abruptly where one ends; with the authors' overlap it does."""
    overlap = round(96 * share)
    size = 24, (2 * 96 - overlap) // 4
    condition = model.condition(layout.uniform("seam", [1, 3, *size]), ["cat"])
    latents = layout.uniform("latents with a seam", [1, 4, *(2 * n for n in size)], -(3**0.5), 3**0.5)
    tiled = Tiled(model, Tiles(*(4 * n for n in size), tile=96, overlap=overlap, unit=4, batch_size=2))
    assert len(tiled.tiles.corners()) == 2
    change = (
        tiled.predict(latents, torch.tensor(600), condition) - model.predict(latents, torch.tensor(600), condition)
    )[0]
    jumps = change.diff(dim=-1).abs().mean((0, 1))
    assert (jumps.max() > 5 * jumps.median()) == seam and (jumps.max() < 2.5 * jumps.median()) != seam


# -- storage ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_saved_model_opens_again(model, tmp_path):
    model.save_pretrained(tmp_path / "ours")
    again = load_model(tmp_path / "ours")
    assert type(again) is SeeSRModel and again.fingerprint() == model.fingerprint()
    assert again.recipe == model.recipe and again.describe(LR) == model.describe(LR)
    for x, y in zip(run(again.unet, again.controlnet), run(model.unet, model.controlnet), strict=True):
        assert torch.equal(x, y)
    for part in ("unet", "controlnet"):  # the authors' code asks for it
        assert json.loads((tmp_path / "ours" / part / "config.json").read_text())["use_image_cross_attention"] is True


def same(a, b):
    return a.fingerprint() == b.fingerprint() and a.recipe == b.recipe


def test_rfsr_layout(weights, tmp_path):
    """As RFSR's script names its folders: U-Net, ControlNet and DAPE apart from the base and RAM."""
    expected = SeeSRModel.from_released(weights)
    own = tmp_path / "pretrained_models"
    (weights / "seesr").rename(own)
    (weights / "DAPE.pth").rename(own / "DAPE.pth")
    assert same(SeeSRModel.from_released(own), expected)
    elsewhere = tmp_path / "elsewhere"
    weights.rename(elsewhere)
    for part in ("unet", "controlnet"):
        (own / part).rename(own / f"{part}_target")
    assert same(SeeSRModel.from_released(own, base=elsewhere / "stable-diffusion-2-base"), expected)
    (own / "unet_target").rename(own / "unet")  # one of each is no model
    with pytest.raises(FileNotFoundError, match="unet_target and controlnet_target, got .* without controlnet; http"):
        SeeSRModel.from_released(own, base=elsewhere / "stable-diffusion-2-base")


def test_a_file_of_image_attentions_alone(weights):
    expected = SeeSRModel.from_released(weights)
    path = weights / "seesr/unet" / FILE
    tensors = load_file(path)
    path.unlink()
    save_file({name: x for name, x in tensors.items() if "image_attentions" in name}, path)
    assert same(SeeSRModel.from_released(weights), expected)


def test_the_base_may_be_another(weights):
    """With a whole U-Net in SeeSR's file, it decides itself whose U-Net that is."""
    layout.write_base(weights / "other", seed=3)
    ours = SeeSRModel.from_released(weights, base=weights / "other")
    theirs = SeeSRModel.from_released(weights, base=weights / "other", base_unet=True)
    seesr, base = load_file(weights / "seesr/unet" / FILE), load_file(weights / "other/unet" / FILE)
    assert all(torch.equal(x, seesr[name]) for name, x in ours.unet.state_dict().items())
    for name, x in theirs.unet.state_dict().items():
        assert torch.equal(x, seesr[name] if "image_attentions" in name else base[name])
    table = load_file(weights / "other/text_encoder/model.safetensors")["text_model.embeddings.token_embedding.weight"]
    assert torch.equal(ours.text_encoder.get_input_embeddings().weight, table)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_half_precision_files_open_in_any_type(tmp_path, stored, wanted):
    layout.write_layout(tmp_path, dtype=stored)
    for part in ("seesr/unet", "seesr/controlnet"):
        (tmp_path / part / FILE).rename(tmp_path / part / FILE.replace(".safe", ".fp16.safe"))
    model = SeeSRModel.from_released(tmp_path, torch_dtype=wanted)
    assert {p.dtype for network in model.networks.values() for p in network.parameters()} == {wanted}
    with torch.no_grad():
        condition = model.condition(LR, ["cat", ""])
        output = model.predict(model.encode(condition.image), torch.tensor(500), condition)
    assert output.dtype == wanted and output.isfinite().all()


def test_without_lists_of_tags_there_are_tokens(weights, caplog):
    for path in weights.glob("ram_tag_list*"):
        path.unlink()
    model = SeeSRModel.from_released(weights)
    assert model.describe(LR) == ["", ""]
    assert [r.getMessage().partition(",")[0] for r in caplog.records] == ["prompts stay without tags"]
    assert relative(model.ram.tokens(LR)[..., ::16].detach(), EXPECTED["dape.tokens"]) < 1e-5


def test_missing_folders(weights, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"weights must be a folder that holds seesr/unet and .*https://github.com"
    ):
        SeeSRModel.from_released(tmp_path)
    shutil.rmtree(weights / "seesr/controlnet")
    with pytest.raises(
        FileNotFoundError, match=r"weights must be .*models' without controlnet; https://github.com/cswry"
    ):
        SeeSRModel.from_released(weights)


def test_a_missing_base(weights):
    (weights / "stable-diffusion-2-base").rename(weights / "elsewhere")
    with pytest.raises(FileNotFoundError, match="base must be given, a diffusers folder of sd-turbo"):
        SeeSRModel.from_released(weights, base_unet=True)
    with pytest.raises(FileNotFoundError, match="base must be given, a diffusers folder of stable-diffusion-2-base"):
        SeeSRModel.from_released(weights)
    assert SeeSRModel.from_released(weights, base=weights / "elsewhere").scale == 4


@pytest.mark.parametrize("file", ["DAPE.pth", "ram_swin_large_14m.pth"])
def test_a_missing_tagger(weights, file):
    (weights / file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{file} \(RAM"):
        SeeSRModel.from_released(weights)


def edit(path, function):
    tensors = copy.deepcopy(load_file(path))
    function(tensors)
    path.unlink()
    save_file(tensors, path)


KEY = "mid_block.image_attentions.0.proj_in.weight"


@pytest.mark.parametrize("part", ["unet", "controlnet"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.update(extra=torch.zeros(1)), "has 1 unknown ones such as extra"),
        (lambda x: x.pop(KEY), f"lacks 1 weights such as {KEY}"),
        (
            lambda x: [x.pop(n) for n in list(x) if "image_attentions" in n],
            r"lacks \d+ weights such as .*image_attentions",
        ),
        (lambda x: x.update({KEY: torch.zeros(3, 3)}), KEY),
    ],
)
def test_every_key_is_accounted_for(weights, part, change, message):
    edit(weights / "seesr" / part / FILE, change)
    with pytest.raises(ValueError, match=rf"seesr/{part}' .*{message}.*; https://github.com/cswry/SeeSR says where"):
        SeeSRModel.from_released(weights)


@pytest.mark.parametrize("part", ["unet", "controlnet"])
def test_damaged_files(weights, part):
    path = weights / "seesr" / part / FILE
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"seesr/{part}.*; https://github.com/cswry/SeeSR says where its files are"):
        SeeSRModel.from_released(weights)
    path.unlink()
    with pytest.raises((FileNotFoundError, ValueError), match=rf"seesr/{part}.*; https://github.com/cswry/SeeSR says"):
        SeeSRModel.from_released(weights)


def test_image_attentions_of_another_base(weights):
    layout.write_base(weights / "other")
    config = weights / "other/unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"layers_per_block": 1}))
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(weights / "other/unet"))
    unet.save_pretrained(weights / "other/unet")
    with pytest.raises(
        ValueError, match=r"is not image_attentions of SeeSR for this base.*has \d+ unknown ones such as"
    ):
        SeeSRModel.from_released(weights, base=weights / "other", base_unet=True)


def test_an_unknown_recipe_field(weights):
    with pytest.raises(TypeError, match="recipe field must be one of .*, got 'guidance'"):
        SeeSRModel.from_released(weights, guidance=2)
