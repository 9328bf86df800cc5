"""RAM against the authors' own code, its Swin Transformer against torchvision's, and files that are wrong."""

import hashlib
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torchvision.models.swin_transformer import SwinTransformer

from rfsr_ext.networks.ram import RAM
from rfsr_ext.networks.swin import Swin
from tests.models.released.seeded import seeded
from tests.models.released.seesr import layout

pytestmark = pytest.mark.usefixtures("no_weights")

EXPECTED = load_file(layout.HERE / "expected.safetensors")


@pytest.fixture
def folder(tmp_path):
    layout.write_ram(tmp_path / "preset/models")
    return tmp_path / "preset/models"


def relative(x, y):
    return ((x - y).abs().max() / y.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize(("name", "dape"), [("ram", False), ("dape", True), ("dape", None)])
def test_agrees_with_the_authors_code(folder, name, dape):
    ram = RAM.from_released(folder, dape=dape)
    lr = layout.uniform("lr", [2, 3, 12, 10])
    assert relative(ram.tokens(lr)[..., ::16], EXPECTED[f"{name}.tokens"]) < 1e-5
    assert relative(ram.logits(lr), EXPECTED[f"{name}.logits"]) < 1e-5
    assert "\n".join(ram.tags(lr)).encode() == bytes(EXPECTED[f"{name}.tags"].tolist())
    torch.testing.assert_close(ram.tokens(lr[1:]), ram.tokens(lr)[1:], atol=1e-5, rtol=1e-5)


def test_full_size_has_the_public_parameters():
    with torch.device("meta"):
        ram = RAM()
    known = layout.keys()["full"]["ram"]
    lines = sorted(f"{name} {list(x.shape)}" for name, x in ram.named_parameters())
    assert ram.num_parameters() == known["parameters"] == 212_117_045
    assert len(lines) == known["tensors"]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == known["sha256"]
    assert {name for name, _ in ram.named_buffers()} == set()  # nothing that is not in the file


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "patch", "width", "depths", "heads", "window"),
    [(48, 4, 12, (1, 2, 3), (2, 3, 4), 3), (32, 2, 8, (2, 2), (1, 2), 4), (40, 5, 6, (3,), (3,), 8)],
)
def test_swin_agrees_with_torchvision(size, patch, width, depths, heads, window):
    swin = Swin(size, patch, width, depths, heads, window, mlp_ratio=2).double()
    shapes = {name: list(x.shape) for name, x in swin.state_dict().items()}
    tensors = {name: x.double() for name, x in seeded(shapes, seed=size).items()}
    swin.load_state_dict(tensors)
    other = SwinTransformer([patch] * 2, width, list(depths), list(heads), [window] * 2, 2, stochastic_depth_prob=0)
    names = {
        "patch_embed.proj": "features.0.0",
        "patch_embed.norm": "features.0.2",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.3",
    }

    def rename(name):
        name = re.sub(r"layers\.(\d+)\.blocks", lambda m: f"features.{2 * int(m[1]) + 1}", name)
        name = re.sub(r"layers\.(\d+)\.downsample", lambda m: f"features.{2 * int(m[1]) + 2}", name)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        return name

    lost = other.double().eval().load_state_dict({rename(name): x for name, x in tensors.items()}, strict=False)
    assert not lost.unexpected_keys and all(re.match(r"head|.*relative_position_index", k) for k in lost.missing_keys)
    images = layout.uniform("images", [2, 3, size, size], -2, 2).double()
    torch.testing.assert_close(swin(images), other.norm(other.features(images)).flatten(1, 2))


def test_swin_refuses_sizes_it_cannot_cut():
    with pytest.raises(ValueError, match="image_size must give every stage whole windows of 5 tokens, got 48"):
        Swin(48, 4, 12, (1, 1), (2, 2), 5)
    with pytest.raises(ValueError, match="images must be 48x48, got 48x40"):
        Swin(48, 4, 12, (1, 1), (2, 2), 3)(torch.zeros(1, 3, 48, 40))


def test_preprocess(folder):
    ram = RAM.from_released(folder)
    lr = layout.uniform("lr", [2, 3, 12, 10])
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    enlarged = F.interpolate(lr, (224, 224), mode="bicubic").clamp(0, 1)
    torch.testing.assert_close(ram.preprocess(lr) * std + mean, enlarged)
    stripes = (
        (torch.arange(900) % 2).float().expand(1, 3, 900, 900)
    )  # finer than 224 pixels can show: they must be gray
    inside = (ram.preprocess(stripes) * std + mean)[..., 2:-2, 2:-2]
    assert (inside - 0.5).abs().max() < 0.1


def test_a_saved_folder_opens_again(folder, tmp_path):
    ram = RAM.from_released(folder)
    ram.save_pretrained(tmp_path / "ram")
    again = RAM.from_pretrained(tmp_path / "ram")
    lr = layout.uniform("lr", [2, 3, 12, 10])
    assert again.tags(lr) == ram.tags(lr) and again.tags(lr)[0].startswith("tag 0, tag 1, ")
    torch.testing.assert_close(again.state_dict(), ram.state_dict(), atol=0, rtol=0)
    torch.testing.assert_close(again.logits(lr), ram.logits(lr))  # products may round otherwise at another address


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_half_precision_files_open_in_any_type(tmp_path, stored, wanted):
    layout.write_ram(tmp_path, dtype=stored)
    ram = RAM.from_released(tmp_path, torch_dtype=wanted)
    assert {x.dtype for x in ram.parameters()} == {wanted} and not any(x.requires_grad for x in ram.parameters())
    logits = ram.logits(layout.uniform("lr", [2, 3, 12, 10])).detach()
    assert logits.dtype == wanted and relative(logits.float(), EXPECTED["dape.logits"]) < 0.1


# -- where files are looked for, and what is wrong with them ----------------------------------------------------------


def move_lists(folder, target):
    target.mkdir(parents=True)
    for file in folder.glob("ram_tag_list*"):
        file.rename(target / file.name)


def test_lists_lie_in_the_authors_repository(folder):
    move_lists(folder, folder / "../../ram/data")
    assert RAM.from_released(folder).config.tag_names == layout.TAGS


def test_what_is_missing_is_found_in_rfsr_weights(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RFSR_WEIGHTS", str(folder))
    (tmp_path / "empty").mkdir()
    for given in ((), tmp_path / "empty"):
        ram = RAM.from_released(given)
        assert ram.has_tags
        assert relative(ram.logits(layout.uniform("lr", [2, 3, 12, 10])).detach(), EXPECTED["dape.logits"]) < 1e-5


def test_without_lists_there_are_tokens(folder, tmp_path):
    move_lists(folder, tmp_path / "elsewhere")
    ram, lr = RAM.from_released(folder), layout.uniform("lr", [2, 3, 12, 10])
    assert relative(ram.tokens(lr)[..., ::16].detach(), EXPECTED["dape.tokens"]) < 1e-5
    with pytest.raises(
        ValueError, match=r"RAM needs ram_tag_list.txt and .*`rfsr weights fetch ram-tags ram-thresholds`"
    ):
        ram.tags(lr)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("ram_tag_list.txt", "cat\ndog\n", r"ram_tag_list.txt' must have a line for each of 20 tags, got 2"),
        ("ram_tag_list_threshold.txt", "0.5\n" * 19, r"threshold.txt' must have a line for each of 20 tags, got 19"),
        ("ram_tag_list_threshold.txt", "x\n" * 20, r"threshold.txt' must hold a number in every line: .*'x'"),
    ],
)
def test_wrong_lists(folder, file, text, message):
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        RAM.from_released(folder)


def test_missing_files(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ram_swin_large_14m.pth \(RAM.*`rfsr weights fetch ram` gets it from"):
        RAM.from_released(tmp_path)
    (folder / "DAPE.pth").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"DAPE.pth \(.*\) is not in .*; https://github.com/cswry/SeeSR says"
    ) as told:
        RAM.from_released([folder, folder], dape=True)
    assert str(told.value).count(str(folder)) == 1, "each place once"
    lr = layout.uniform("lr", [2, 3, 12, 10])
    assert relative(RAM.from_released(folder).logits(lr).detach(), EXPECTED["ram.logits"]) < 1e-5  # plain RAM


def change(path, function):
    stored = torch.load(path, weights_only=True)
    function(stored.get("model", stored))
    torch.save(stored, path)


RAM_KEY, LORA_KEY = "visual_encoder.layers.0.blocks.1.mlp.fc2.bias", "visual_encoder.layers.0.blocks.0.attn.qkv.lora_A"


@pytest.mark.parametrize("file", ["ram_swin_large_14m.pth", "DAPE.pth"])
def test_damaged_and_foreign_files(folder, file):
    path = folder / file
    what = rf"(RAM|DAPE) \({file}, which"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{what}.* cannot be read \(.*\); the file is damaged or something else"):
        RAM.from_released(folder)
    torch.save({"model": RAM}, path)
    with pytest.raises(ValueError, match=f"{what}.* cannot be read"):
        RAM.from_released(folder)
    torch.save({"conv.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=rf"{file}' is not {what}.*: it lacks "):
        RAM.from_released(folder)


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("ram_swin_large_14m.pth", lambda x: x.update(extra=torch.zeros(1)), "lacks none and has 1 unknown .* extra"),
        ("ram_swin_large_14m.pth", lambda x: x.pop(RAM_KEY), f"lacks 1 tensors such as {RAM_KEY} and has no unknown"),
        (
            "ram_swin_large_14m.pth",
            lambda x: x.update({RAM_KEY: torch.zeros(3)}),
            rf"{RAM_KEY} must have shape \[8\], got",
        ),
        ("DAPE.pth", lambda x: x.update(extra=torch.zeros(1)), "lacks none and has 1 unknown ones such as extra"),
        ("DAPE.pth", lambda x: x.pop(LORA_KEY), f"lacks 1 tensors such as {LORA_KEY} and has no unknown"),
        ("DAPE.pth", lambda x: x.update({LORA_KEY: torch.zeros(16, 9)}), r"cannot have lora_A \[16, 9\] and lora_B"),
    ],
)
def test_every_key_is_accounted_for(folder, file, edit, message):
    change(folder / file, edit)
    with pytest.raises(ValueError, match=f"{file}' is not .*{message}"):
        RAM.from_released(folder)


def test_buffers_of_the_published_file_are_not_needed(folder):
    change(
        folder / "ram_swin_large_14m.pth",
        lambda x: x.update(
            {
                "visual_encoder.layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.long),
                "visual_encoder.layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49),
            }
        ),
    )
    assert (
        relative(
            RAM.from_released(folder).logits(layout.uniform("lr", [2, 3, 12, 10])).detach(), EXPECTED["dape.logits"]
        )
        < 1e-5
    )


def test_old_names_of_the_tagging_head(folder):
    def edit(x):
        for name in [name for name in x if name.startswith("tagging_head.")]:
            x[name.replace("tagging_head", "vision_multi")] = x.pop(name)

    change(folder / "ram_swin_large_14m.pth", edit)
    assert (
        relative(
            RAM.from_released(folder).logits(layout.uniform("lr", [2, 3, 12, 10])).detach(), EXPECTED["dape.logits"]
        )
        < 1e-5
    )
