"""Tags beside pictures: written once, never over what is there, by RAM, a captioner or a user's own function."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from rfsr_ext.cli import app
from rfsr_ext.data.images import to_image
from rfsr_ext.data.tags import tag_folder
from rfsr_ext.networks.ram import RAM
from rfsr_ext.networks.taggers import load_tagger
from tests.models.released.seesr import layout

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def color(images):
    """A tagger that can be checked: the brightest channel."""
    assert images.ndim == 4 and images.shape[1] == 3 and images.min() >= 0 and images.max() <= 1
    return [list(COLORS)[k] for k in images.mean((2, 3)).argmax(1)]


class Color:
    __call__ = staticmethod(color)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    (root / "more").mkdir(parents=True)
    for path, name in (("b.png", "red"), ("a.jpg", "green"), ("more/c.png", "blue")):
        Image.new("RGB", (9, 7), COLORS[name]).save(root / path)
    return root


@pytest.fixture
def rfsr(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rfsr", "data", "tag", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            app()
        return stopped.value.code, capsys.readouterr()

    return run


def texts(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*.txt"))}


def test_every_picture_gets_its_tags(folder):
    result = tag_folder(folder, color, progress=False)
    assert texts(folder) == {"a.txt": "green\n", "b.txt": "red\n", "more/c.txt": "blue\n"}
    assert (len(result.written), result.kept, result.shared, result.skipped) == (3, [], [], {})
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".png", ".jpg", ".txt"}


def test_what_is_there_stays(folder):
    (folder / "a.txt").write_text("mine")
    (folder / "b.txt").touch()  # of a picture without tags
    result = tag_folder(folder, color, progress=False)
    assert texts(folder) == {"a.txt": "mine", "b.txt": "", "more/c.txt": "blue\n"}
    assert [len(result.written), len(result.kept)] == [1, 2]
    tag_folder(folder, color, overwrite=True, progress=False)
    assert texts(folder) == {"a.txt": "green\n", "b.txt": "red\n", "more/c.txt": "blue\n"}


def test_it_goes_on_after_an_interruption(folder):
    seen = []

    def interrupted(images):
        seen.append(images)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return color(images)

    with pytest.raises(KeyboardInterrupt):
        tag_folder(folder, interrupted, progress=False)
    assert texts(folder) == {"a.txt": "green\n"}
    result = tag_folder(folder, color, progress=False)
    assert [len(result.written), len(result.kept)] == [2, 1]


def test_pictures_of_one_name_share_a_file(folder):
    Image.new("RGB", (9, 7), COLORS["blue"]).save(folder / "a.png")  # after a.jpg
    result = tag_folder(folder, color, overwrite=True, progress=False)
    assert texts(folder)["a.txt"] == "green\n" and result.shared == [str(folder / "a.png")]


def test_broken_pictures_are_left_out(folder):
    (folder / "broken.png").write_bytes(b"\x89PNG")
    result = tag_folder(folder, color, progress=False)
    assert list(result.skipped) == [str(folder / "broken.png")] and len(result.written) == 3
    assert not (folder / "broken.txt").exists()


def test_a_tag_file_is_one_line(folder):
    tag_folder(folder, lambda images: ["a cat,\n on   a mat "], progress=False)
    assert set(texts(folder).values()) == {"a cat, on a mat\n"}


@pytest.mark.parametrize("given", ["red", ["red", "blue"], [1], None])
def test_a_wrong_tagger(folder, given):
    with pytest.raises(ValueError, match="tagger must give a list of one text for one image, got "):
        tag_folder(folder, lambda images: given, progress=False)
    assert texts(folder) == {}


def test_no_pictures(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no picture; give a folder of images"):
        tag_folder(tmp_path, color, progress=False)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        tag_folder(tmp_path / "nowhere", color, progress=False)


# -- taggers by name, and the command ---------------------------------------------------------------------------------


def test_ram_from_the_command_line(folder, rfsr, tmp_path):
    layout.write_ram(tmp_path / "ram")
    picture = torch.from_numpy(np.array(Image.open(folder / "b.png"))).permute(2, 0, 1)[None] / 255
    probabilities = RAM.from_released(tmp_path / "ram", dape=False).logits(picture).sigmoid()[0].tolist()
    threshold = sorted(probabilities)[9]
    (tmp_path / "ram/ram_tag_list_threshold.txt").write_text(f"{threshold}\n" * 20)
    wanted = ", ".join(name for name, x in zip(layout.TAGS, probabilities, strict=True) if x > threshold)
    code, printed = rfsr(folder, "--weights", tmp_path / "ram")
    assert code == 0 and "3 files of tags are new, 0 pictures had one" in printed.out
    assert texts(folder)["b.txt"] == f"{wanted}\n" and wanted.count(",") == 9
    code, printed = rfsr(folder, "--weights", tmp_path / "ram")
    assert code == 0 and "0 files of tags are new, 3 pictures had one" in printed.out
    code, printed = rfsr(folder, "--weights", tmp_path / "ram", "--tagger", "dape", "--overwrite")
    dape = RAM.from_released(tmp_path / "ram", dape=True).tags(picture)[0]
    assert code == 0 and texts(folder)["b.txt"] == f"{dape}\n" != f"{wanted}\n"


def test_without_weights(folder, rfsr, tmp_path, monkeypatch):
    monkeypatch.delenv("RFSR_WEIGHTS", raising=False)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    code, printed = rfsr(folder)
    assert code == "rfsr: " + code.removeprefix("rfsr: ") and "`rfsr weights fetch ram` gets it" in code
    layout.write_ram(tmp_path / "ram")
    (tmp_path / "ram/ram_tag_list.txt").unlink()
    assert "`rfsr weights fetch ram-tags ram-thresholds`" in rfsr(folder, "--weights", tmp_path / "ram")[0]
    assert "does not exist; give a folder of images" in rfsr(tmp_path / "nowhere")[0]


@pytest.mark.parametrize("name", ["my_tagger:color", "my_tagger:Color"])
def test_a_tagger_of_ones_own(folder, rfsr, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "my_tagger", sys.modules[__name__])
    code, printed = rfsr(folder, "--tagger", name)
    assert code == 0 and texts(folder)["b.txt"] == "red\n"


def test_broken_pictures_are_named(folder, rfsr, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_tagger", sys.modules[__name__])
    (folder / "broken.png").write_bytes(b"\x89PNG")
    code, printed = rfsr(folder, "--tagger", "my_tagger:color")
    assert code == "rfsr: 1 pictures could not be read; the reasons stand above"
    assert f"left out {folder / 'broken.png'}: cannot be read" in printed.err and len(texts(folder)) == 3


def test_names_that_are_none(tmp_path):
    with pytest.raises(
        ValueError, match="tagger must be ram, dape, hf:NAME_OR_FOLDER or package.module:Name, got 'tag'"
    ):
        load_tagger("tag")
    with pytest.raises(
        ValueError, match=r"captioner '.*nowhere' cannot be opened from the disk \(.*\); fetch it first"
    ):
        load_tagger(f"hf:{tmp_path / 'nowhere'}")


def test_a_captioner_of_transformers(tmp_path, monkeypatch):
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
        BlipTextConfig,
        BlipVisionConfig,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "cat", "dog", "fur", "red", "sky", "sun"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    special = {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(
        text_config=BlipTextConfig(vocab_size=len(words), max_position_embeddings=16, **small, **special).to_dict(),
        vision_config=BlipVisionConfig(image_size=16, patch_size=8, **small).to_dict(),
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias.copy_(torch.arange(len(words)) / 5)  # words, not the first symbols
    model.save_pretrained(tmp_path)
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"), additional_special_tokens=["[DEC]", "[ENC]"])
    processor = BlipProcessor(BlipImageProcessor(size={"height": 16, "width": 16}), tokenizer)
    processor.save_pretrained(tmp_path)
    images = layout.uniform("captioned", [2, 3, 20, 24])
    seen = []
    generate = BlipForConditionalGeneration.generate

    def watched(self, **inputs):
        seen.append(inputs["pixel_values"])
        return generate(self, **inputs)

    monkeypatch.setattr(BlipForConditionalGeneration, "generate", watched)
    captions = load_tagger(f"hf:{tmp_path}")(images)
    assert len(captions) == 2 and all(caption and set(caption.split()) <= set(words[7:]) for caption in captions)
    pictures = [Image.fromarray(to_image(image)) for image in images]
    torch.testing.assert_close(seen[0], processor(images=pictures, return_tensors="pt").pixel_values)
