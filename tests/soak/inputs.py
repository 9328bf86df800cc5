"""Fuzzed pictures, checkpoints, configurations, model folders and weight files: each read right, or refused in one
sentence of the kind of error that the command line knows.

Trial i damages one good file in one to four places.  A checksum for every bit is no file's here but PNG's, so that of
safetensors the header and the length are damaged, not the numbers.
"""

import contextlib
import functools
import io
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image, ImageCms

from rfsr_ext.cli.errors import sentence
from rfsr_ext.data.images import read_header, read_image
from rfsr_ext.files import load_tensors, save_tensors
from rfsr_ext.models import load_model
from rfsr_ext.presets import read_settings
from rfsr_ext.rewards import WeightedReward
from rfsr_ext.training import RFSRConfig, RFSRTrainer
from rfsr_ext.weights.reading import load_strictly, read_tensors
from tests.odd import ODD
from tests.tiny import tiny_model
from tests.training.conftest import Brightness, Pixels, TinyData

Rng = np.random.Generator


def damaged(rng: Rng, data: bytes, end: int | None = None) -> bytes:
    """Other bytes in one to four places before ``end``, or the file cut off or lengthened."""
    found = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(0, max(1, min(len(found), end or len(found)))))
        how = rng.integers(6)
        if how == 0:
            found[at : at + 1] = bytes([rng.integers(256)])
        elif how == 1:
            found[at : at + 1] = bytes([found[at] ^ (1 << int(rng.integers(8)))]) if found else b""
        elif how == 2:
            del found[at : at + int(rng.integers(1, 40))]
        elif how == 3:
            found[at:at] = rng.bytes(int(rng.integers(1, 40)))
        elif how == 4:
            length = int(rng.integers(1, 40))
            found[at : at + length] = bytes(length)
        else:
            del found[at:]
    return bytes(found)


def refusal(call: Callable, kinds: tuple[type[Exception], ...]):
    """What the call gives, or the error of these kinds that it refuses with.

    Raises:
        AssertionError: if the error is of another kind or more than a sentence.
    """
    try:
        return call()
    except kinds as error:
        said = sentence(error)
        assert said and "\n" not in said and len(said) < 1000, f"{type(error).__name__} says {said[:300]!r}"
        return error
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {str(error)[:300]}") from error


# -- pictures ----------------------------------------------------------------------------------------------------------


@functools.cache
def pictures() -> list[tuple[bytes, np.ndarray]]:
    """Content and pixels of good files, in every mode that people have."""
    found = []
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
    image = Image.fromarray(pixels)
    turned = Image.Exif()
    turned[0x0112] = 6
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for kind, mode, options in (
        ("png", "RGB", {}), ("png", "RGBA", {}), ("png", "P", {}), ("png", "L", {}), ("png", "1", {}),
        ("png", "RGB", {"icc_profile": srgb}), ("png", "RGB", {"exif": turned}), ("jpeg", "RGB", {}),
        ("jpeg", "L", {}), ("jpeg", "CMYK", {}), ("jpeg", "RGB", {"progressive": True, "exif": turned}),
        ("jpeg", "RGB", {"icc_profile": srgb}), ("webp", "RGB", {"lossless": True}), ("webp", "RGBA", {}),
        ("bmp", "RGB", {}), ("bmp", "P", {}), ("tiff", "RGB", {}), ("tiff", "RGB", {"compression": "tiff_lzw"}),
        ("tiff", "CMYK", {}), ("gif", "P", {}),
    ):  # fmt: skip
        buffer = io.BytesIO()
        image.convert(mode).save(buffer, kind, **options)
        found.append((buffer.getvalue(), read_image(buffer.getvalue())))
    return found


def picture(rng: Rng) -> None:
    number = int(rng.integers(len(pictures())))
    data, pixels = pictures()[number]
    data = damaged(rng, data)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        path = Path(folder) / "x.png"
        path.write_bytes(data)
        header = refusal(lambda: read_header(path), (OSError,))
        image = refusal(lambda: read_image(path), (OSError,))
        if isinstance(image, OSError):
            return
        assert image.dtype == np.float32 and image.ndim == 3 and image.shape[2] == 3 and np.isfinite(image).all()
        assert image.min() >= 0 and image.max() <= 1
        assert not isinstance(header, OSError) and header[:2] == image.shape[:2], "the header says another size"
        if number == 0:  # every byte of a plain PNG stands under a checksum
            assert np.array_equal(image, pixels), "other pixels"


# -- checkpoints -------------------------------------------------------------------------------------------------------


def trainer(folder: Path, iterations: int) -> RFSRTrainer:
    data = TinyData()
    values = {
        "crop_size": 32, "structure_window": [1, 2], "reward_window": None, "lambda_structure": 1.0,
        "style_loss": "none", "rewards": {}, "validate_every": 100, "checkpoint_every": 1, "iterations": iterations,
        "batch_size": 1, "output_dir": str(folder / "run"),
    }  # fmt: skip
    return RFSRTrainer(
        RFSRConfig.from_dict(values), Pixels(), dataset=data, rewards=[WeightedReward(Brightness(), 1.0)],
        validation=[data[500]], judges={},
    )  # fmt: skip


@functools.cache
def checkpoint() -> tuple[dict[str, torch.Tensor], dict, bytes]:
    """Tensors, metadata and content of one."""
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
        trainer(Path(name), 1).train()
        path = Path(name) / "run/checkpoints/iteration-000001.safetensors"
        return *load_tensors(path), path.read_bytes()


def same(tensors: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return tensors.keys() == wanted.keys() and all(torch.equal(t, wanted[n]) for n, t in tensors.items())


def header(data: bytes) -> int:
    """Where the numbers of a safetensors file begin."""
    return 8 + int.from_bytes(data[:8], "little")


def checkpoint_file(rng: Rng) -> None:
    """Its bytes, as `load_tensors` reads them."""
    tensors, metadata, data = checkpoint()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(damaged(rng, data, 8))  # the length of the header; what it says is JSON without a checksum
        found = refusal(lambda: load_tensors(path), (ValueError,))
        assert isinstance(found, ValueError) or (same(found[0], tensors) and found[1] == metadata), "other numbers"


def checkpoint_facts(rng: Rng) -> None:
    """What stands in it, as a run resumes from it."""
    tensors, metadata, _ = checkpoint()
    metadata, tensors = json.loads(json.dumps(metadata)), dict(tensors)
    if rng.random() < 0.5:
        key = str(rng.choice(list(metadata)))
        change(rng, metadata, key)
    else:
        name = str(rng.choice(list(tensors)))
        if rng.random() < 0.5:
            del tensors[name]
        else:
            tensors[name] = torch.zeros(3, 5)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        iteration = metadata.pop("iteration", 1)
        save_tensors(
            folder / "run/checkpoints/iteration-000001.safetensors", tensors, metadata | {"iteration": iteration}
        )
        (folder / "run/.rfsr.lock").touch()
        with contextlib.redirect_stderr(io.StringIO()):
            refusal(lambda: trainer(folder, 2).train(), (ValueError, OSError, RuntimeError, TypeError))


# -- settings ----------------------------------------------------------------------------------------------------------


def change(rng: Rng, values: dict, key: str) -> None:
    """Take a value away or put an odd one in its place, at any depth."""
    if isinstance(values[key], dict) and values[key] and rng.random() < 0.5:
        return change(rng, values[key], str(rng.choice(list(values[key]))))
    if rng.random() < 0.2:
        del values[key]
    else:
        odd = {name: value for name, value in ODD.items() if name != "huge"}
        values[key] = odd[str(rng.choice(list(odd)))]
    return None


def settings(rng: Rng) -> None:
    """A preset with damaged bytes, or with odd values."""
    preset = str(rng.choice(RFSRConfig.presets))
    values, _ = read_settings(preset, RFSRConfig.presets, "config")
    values = RFSRConfig.load(preset).to_dict() if rng.random() < 0.5 else values
    text = yaml.safe_dump(values, allow_unicode=True).encode()
    if rng.random() < 0.5:
        text = damaged(rng, text)
    else:
        change(rng, values, str(rng.choice(list(values))))
        text = yaml.safe_dump(values).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_bytes(text)
        found = refusal(lambda: RFSRConfig.load(path), (ValueError,))
        if not isinstance(found, ValueError):
            assert RFSRConfig.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found


@functools.cache
def model_folder() -> Path:
    folder = Path(tempfile.mkdtemp())
    tiny_model().save_pretrained(folder)
    return folder


def model(rng: Rng) -> None:
    """A model's folder with one damaged file of settings, or with one weight file whose header or end is."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        shutil.copytree(model_folder(), folder)
        files = sorted(path for path in folder.rglob("*.*") if path.is_file() and path.name != ".rfsr.json")
        path = files[rng.integers(len(files))]
        data = path.read_bytes()
        if path.suffix == ".json" and rng.random() < 0.7:
            values = json.loads(data)
            change(rng, values, str(rng.choice(list(values)))) if isinstance(values, dict) and values else None
            path.write_text(json.dumps(values))
        else:
            path.write_bytes(damaged(rng, data, header(data) if path.suffix == ".safetensors" else None))
        refusal(lambda: load_model(folder), (ValueError, OSError, TypeError))


# -- weight files ------------------------------------------------------------------------------------------------------


def weights(rng: Rng) -> None:
    """A file of somebody's weights: safetensors, or what torch.save makes."""
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 5))
    with tempfile.TemporaryDirectory() as folder:
        kind = ["safetensors", "pth", "old"][rng.integers(3)]
        path = Path(folder) / f"x.{'safetensors' if kind == 'safetensors' else 'pth'}"
        if kind == "safetensors":
            save_tensors(path, network.state_dict())
        else:
            torch.save({"state_dict": network.state_dict()}, path, _use_new_zipfile_serialization=kind == "pth")
        data = path.read_bytes()
        path.write_bytes(damaged(rng, data, header(data) if kind == "safetensors" else None))
        refusal(lambda: load_strictly(network, read_tensors(path, "weights"), path, "the network"), (ValueError,))


KINDS = (picture, checkpoint_file, checkpoint_facts, settings, model, weights)


def trial(i: int) -> None:
    """File i.

    Raises:
        AssertionError: if it was read wrong, or refused by another error or by more than a sentence.
    """
    KINDS[i % len(KINDS)](np.random.default_rng((2, i)))


if __name__ == "__main__":
    for number in range(int(sys.argv[1]), int(sys.argv[2])):
        trial(number)
