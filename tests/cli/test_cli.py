"""The command line as a user types it: what works, and the one sentence when something does not."""

import errno
import importlib
import importlib.util
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import threading
import types
import typing

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader

from rfsr_ext.cli import _typer, errors
from rfsr_ext.cli.config import choose_device
from rfsr_ext.cli.evaluate import step_figures
from rfsr_ext.cli.upscale import find_images
from rfsr_ext.data.datasets import CheckedSamples
from rfsr_ext.training import load_config
from tests.odd import ODD


def test_doctor_says_what_serves_each_device(rfsr):
    code, printed = rfsr("doctor")
    assert code == 0
    assert all(f"on {device}" in printed.out for device in ("cpu", "cuda", "other"))
    assert "vgg19-dcbb9e9d.pth" in printed.out
    assert "MISSING" not in printed.out


def test_config_show_prints_every_setting(rfsr):
    code, printed = rfsr("config", "show", "mini", "--set", "mixed_precision=no", "--set", "learning_rate=5e-6")
    assert code == 0
    values = yaml.safe_load(printed.out)
    assert (values["learning_rate"], values["mixed_precision"], values["iterations"]) == (5e-6, "no", 80)
    assert "# of Adam\nlearning_rate: 5.0e-06\n" in printed.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "absent.yaml"], "config 'absent.yaml' is neither a file nor one of the presets mini, paper"),
        (["train", "mini", "--set", "lerning_rate=1"], "unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
        (["train", "mini", "--set", "seed"], "--set must be KEY=VALUE, got 'seed'"),
        (
            ["train", "mini", "--set", "output_dir=20261130"],
            "output_dir must be text that is not empty, got 20261130; in",
        ),
        (
            ["train", "mini", "--set", "rewards={mini-iqa: 1, mini-iqa: 2}"],
            "(key 'mini-iqa' stands twice, in lines 1 a",
        ),
        (["upscale", "x.png", "--output=~/up"], "'~/up' begins with a '~' that no shell has written out; give"),
        (["evaluate", ".", "--metrics", "psnr, sim"], "got 'sim'"),
        (["ablate", "--variants", "rfsr, magic"], "got 'magic'"),
        (["train", "mini", "--set", "rewards={a"], "--set rewards must have a YAML value, got '{a'"),
        (["train", "mini", "--set", "seed=.nan"], "preset mini: seed must be a whole number (at least 0, below 42949"),
        (
            ["train", "mini", "--set", "model=my_absent_objects:Name"],
            "model 'my_absent_objects:Name' must name a module",
        ),
        (
            ["config", "show", "absent.yaml"],
            "config 'absent.yaml' is neither a file nor one of the presets mini, paper",
        ),
        (["train", "mini", "--set", "model=nowhere"], "model folder 'nowhere' does not exist, and nothing is down"),
        (
            ["upscale", "x.png", "--model", "minii"],
            "model folder 'minii' does not exist, and nothing is downloaded; did ",
        ),
        (["upscale", "x.png", "--model", "sesr"], "; did you mean 'seesr'?"),
        (["upscale", "x.png", "--model", "owner/name"], "give a folder on disk or one of mini, "),
        (
            ["train", "mini", "--set", "rewards={magic: 1}"],
            "reward must be one of mini-iqa, mini-preference, clipiqa, ",
        ),
        (["evaluate", "mini", "--crops", "100000"], "--crops must be at most"),
        (
            ["train", "mini", "--set", "validation_crops=100000"],
            "validation_crops must be at most 52 for crops of 64 p",
        ),
        (["demo", "--crops", "100000"], "--crops must be at most"),
        (["evaluate", "mini", "--gt", "."], "--gt and --cases are for folders of pictures, and 'mini' is none; give"),
        (["evaluate", "absent", "--gt", "."], "--gt and --cases are for folders of pictures, and 'absent' is none; g"),
        (["evaluate", ".", "--gt", "x.png"], "folder 'x.png' is a file; give a folder of pictures"),
        (["evaluate", ".", "--gt", "absent"], "folder 'absent' does not exist; give a folder of pictures"),
        (["train", "mini", "--set", "data=x.png"], "data folder 'x.png' is a file; give a folder of images"),
        (["evaluate", "mini", "."], "targets must be all models or all folders of pictures, got mini ."),
        (["evaluate", ".", "--preset", "magic"], "preset must be one of basic, rfsr-paper, seesr,"),
        (["evaluate", ".", "--metrics", "psnr"], "preset 'custom' has only metrics that compare with a ground truth"),
        (["evaluate", ".", "--by", "psnr"], "--by must be one of judge, got 'psnr'"),
        (["evaluate", ".", "--output", "table.xlsx"], "output must end in .csv or .parquet, got 'table.xlsx'"),
        (["weights", "fetch", "magic"], "name must be one of vgg19, "),
        (["ablate", "--variants", "magic"], "variants must be among rfsr, "),
        (["evaluate", ".", "--channel", "z"], "--channel must be rgb or y, got 'z'"),
        (["upscale", "x.png", "--dtype", "int8"], "--dtype must be float32, bfloat16 or float16, got 'int8'"),
        (["upscale", "x.png", "--weights", "."], "weights is for published models, which 'mini' is not; leave it out"),
        (
            ["upscale", "x.png", "--color-fix", "sepia"],
            "--color-fix must be one of recipe, wavelet, adain, none, got 'sepia'",
        ),
        (["upscale", "x.png", "--steps", "-1"], "--steps must be a whole number from 1 to 1000, got '-1'"),
        (["upscale", "x.png", "--tile", "8", "--overlap", "32"], "overlap must be at least 0 and smaller than tile"),
        (
            ["evaluate", "mini", "--size", "63"],
            "--size must be a whole number from 32 to 1000000000, a multiple of 4, ",
        ),
        (["evaluate", "mini", "--size", "60", "--crops", "2"], "--size must be a multiple of 8 for this model, got 60"),
        (
            ["evaluate", "mini", "--size", "60", "--best-of", "2"],
            "--size must be a multiple of 8 for this model, got 6",
        ),
        (["ablate", "--size", "60", "--crops", "2"], "size of the samples must be a multiple of 8 for this model, got"),
        (["train", "mini", "--set", "validation_size=60"], "validation_size must be a multiple of 8 for this model, g"),
        (["upscale", "x.png", "--output", "x.png"], "'x.png' must be a folder, but 'x.png' is a file; give another"),
        (["upscale", "x.png", "--output", "x.png/out"], "'x.png/out' must be a folder, but 'x.png' is a file"),
        (["evaluate", ".", "--output", "x.png/table.csv"], "'x.png' must be a folder, but 'x.png' is a file"),
    ],
)
def test_one_sentence(rfsr, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("x.png")
    code, _ = rfsr(*arguments)
    assert str(code).startswith("rfsr: ")
    assert sentence in str(code)
    assert "\n" not in str(code)
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


@pytest.mark.parametrize("given", ["foo", "cuda:7", "meta", ""])
def test_a_device_that_is_not_there_is_refused_before_the_work(rfsr, tmp_path, monkeypatch, given):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    wanted = f"--device must be one that torch finds here (cpu, cuda, cuda:0, cuda:1), got {given!r}; give one"
    monkeypatch.chdir(tmp_path)
    for command in (["upscale", "x.png"], ["data", "tag", "."], ["mini", "build", "."]):
        code, _ = rfsr(*command, "--device", given)
        assert code == f"rfsr: {wanted}"
    assert not list(tmp_path.iterdir())
    assert choose_device("cuda:1") == "cuda:1"


def test_an_error_of_a_loader_process_is_one_sentence():
    with pytest.raises(ValueError) as error:
        next(iter(DataLoader(CheckedSamples([], 8, 4), sampler=[5], num_workers=1)))
    assert "Traceback" in str(error.value)
    sentence = errors.sentence(error.value)
    assert sentence.startswith("dataset must give a sample for every index") and "\n" not in sentence


def numbers():
    """Every parameter whose value is a number, with its command and what typer was told of it."""

    def below(app, name):
        for group in app.registered_groups:
            yield from below(group.typer_instance, f"{name} {group.name}")
        for command in app.registered_commands:
            for parameter in inspect.signature(command.callback).parameters.values():
                kind, *told = typing.get_args(parameter.annotation) or [parameter.annotation]
                if {int, float} & {kind, *typing.get_args(kind)}:
                    yield pytest.param(parameter.name, *told, id=f"{name} {command.callback.__name__} {parameter.name}")

    return list(below(_typer, "rfsr"))


def test_there_are_numbers():
    assert len(numbers()) == 26


@pytest.mark.parametrize(("name", "told"), numbers())
def test_odd_numbers_are_of_use_or_refused_in_one_sentence(name, told):
    accepted = set()
    for odd, value in ODD.items():
        typed = "" if value is None else str(value)
        assert told.parser(typed) == typed
        try:
            told.callback(types.SimpleNamespace(opts=[name]), typed)
        except ValueError as error:
            assert str(error).startswith(f"{name} must be a ") and str(error).endswith(f", got {typed[:40]!r}")
            assert "\n" not in str(error) and len(str(error)) < 150
        else:
            accepted.add(odd)
    takes = dict.fromkeys(("seed", "overlap", "border", "crop_size"), {"zero"}) | {"guidance_scale": {"half"}}
    assert accepted == takes.get(name, set())


def test_upscale_writes_what_it_can_and_names_the_rest(rfsr, tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (13, 10), dtype=np.uint8)).save(tmp_path / "gray.png")
    Image.fromarray(rng.integers(0, 255, (9, 40, 4), dtype=np.uint8)).save(tmp_path / "alpha.png")
    (tmp_path / "text.png").write_text("no image")
    files = [tmp_path / name for name in ("gray.png", "text.png", "alpha.png")]
    code, printed = rfsr("upscale", *files, "--output", tmp_path / "out", "--steps", 2)
    assert str(code) == f"rfsr: 1 of 3 files could not be upscaled: {tmp_path / 'text.png'}"
    assert f"skipped {tmp_path / 'text.png'}: cannot identify image file" in printed.err
    with Image.open(tmp_path / "out" / "gray_x4.png") as image:
        assert image.size == (40, 52)
    with Image.open(tmp_path / "out" / "alpha_x4.png") as image:
        assert image.size == (160, 36) and image.mode == "RGBA"
        with Image.open(tmp_path / "alpha.png") as small:
            opacity = small.getchannel("A").convert("F").resize((160, 36), Image.Resampling.BICUBIC)
        np.testing.assert_allclose(np.asarray(image.getchannel("A")), np.asarray(opacity).clip(0, 255), atol=0.51)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["alpha_x4.png", "gray_x4.png"]


@pytest.fixture
def quick(monkeypatch):
    """What it is asked to upscale; it does so without the networks."""
    seen = []

    def upscale(model, image, prompt, **options):
        seen.append(image)
        if image.shape[-1] == 13:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: "
                "you tried to allocate 9216000000 bytes. Error code 12 (Cannot allocate memory)"
            )
        if image.shape[-1] == 14:
            raise ZeroDivisionError("anything")
        return image.repeat_interleave(4, 1).repeat_interleave(4, 2)

    monkeypatch.setattr(importlib.import_module("rfsr_ext.cli.upscale"), "upscale", upscale)
    return seen


def test_two_results_never_have_one_name(rfsr, quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/IMG_0001.png", "b/IMG_0001.jpg", "b/img_0001.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(name)
    for first, second in (("a/IMG_0001.png", "b/IMG_0001.jpg"), ("a/IMG_0001.png", "b/img_0001.webp")):
        code, _ = rfsr("upscale", first, second)
        assert str(code).startswith(f"rfsr: {first!r} and {second!r} would both become 'upscaled/")
        assert not quick and not (tmp_path / "upscaled").exists()
    code, _ = rfsr("upscale", "a/IMG_0001.png", tmp_path / "a" / "IMG_0001.png")  # one file, given twice
    assert code == 0 and len(quick) == 1


def test_results_and_inputs_are_not_overwritten(rfsr, quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("cat.png")
    (tmp_path / "upscaled").mkdir()
    (tmp_path / "upscaled" / "cat_x4.png").write_text("mine")
    code, _ = rfsr("upscale", "cat.png")
    assert code == "rfsr: 'upscaled/cat_x4.png' exists already; give another --output or --overwrite"
    assert (tmp_path / "upscaled" / "cat_x4.png").read_text() == "mine" and not quick
    assert rfsr("upscale", "cat.png", "--overwrite")[0] == 0
    Image.new("RGB", (8, 8)).save("cat_x4.png")
    code, _ = rfsr("upscale", "cat.png", "cat_x4.png", "--output", ".", "--overwrite")
    assert "the result of 'cat.png' would replace 'cat_x4.png', which is to be upscaled too" in code


def test_a_folder_is_its_pictures(rfsr, quick, tmp_path):
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    for name in ("b.JPG", "a.png", "deeper/c.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").touch()
    assert rfsr("upscale", tmp_path / "in", "--output", tmp_path / "out")[0] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_x4.png", "b_x4.png"]
    code, _ = rfsr("upscale", tmp_path, "--output", tmp_path / "none")
    assert f"folder {str(tmp_path)!r} has no picture" in code


def test_the_folder_of_a_run_is_not_its_model(rfsr, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "model_index.json").write_text("{}")
    code, _ = rfsr("upscale", "x.png", "--model", tmp_path / "run", "--output", tmp_path / "out")
    assert code.endswith(
        f"without model_index.json: {str(tmp_path / 'run')!r}; did you mean {str(tmp_path / 'run' / 'model')!r}?"
    )


def test_any_name_on_any_terminal(rfsr, quick, tmp_path, monkeypatch, caplog):
    """Names that are not UTF-8, on a terminal that lacks the arrow; and macOS's shadow of a file."""
    odd = b"a\xff.png".decode("utf-8", "surrogateescape")
    for name in (odd, "b.png"):
        Image.new("RGB", (48, 48)).save(tmp_path / name)
    (tmp_path / "._b.png").write_bytes(b"no picture")
    with monkeypatch.context() as patch, open(tmp_path / "said", "w", encoding="latin-1") as said:
        patch.setattr(sys, "stdout", said)
        code, _ = rfsr("upscale", tmp_path, "--output", tmp_path / "out")
    assert code == 0 and "not looked into" in caplog.text and "1 hidden files" in caplog.text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a\udcff_x4.png", "b_x4.png"]
    assert "a\\udcff.png 48x48 \\u2192 " in (tmp_path / "said").read_text("latin-1")
    table = tmp_path / "out" / "table.csv"
    assert rfsr("evaluate", tmp_path, "--gt", tmp_path, "--metrics", "psnr, ssim", "--output", table)[0] == 0
    assert list(pd.read_csv(table).image) == ["a\\udcff", "b"]


def test_what_a_terminal_lacks_is_escaped_in_settings(rfsr, tmp_path, monkeypatch):
    file = tmp_path / "run.yaml"
    with monkeypatch.context() as patch, open(file, "w", encoding="latin-1") as out:
        patch.setattr(sys, "stdout", out)
        assert rfsr("config", "show", "mini", "--set", "data=数据/")[0] == 0
    assert load_config(file).data == "数据/"


def test_a_large_photograph_is_no_attack(rfsr, tmp_path, monkeypatch, recwarn):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    code, printed = rfsr("data", "check", tmp_path, "--crop-size", 16)
    assert not code and "1 of 1 images can be used" in printed.out
    assert not [warning for warning in recwarn if issubclass(warning.category, Image.DecompressionBombWarning)]


def test_upscale_says_what_it_passes_over_in_a_folder(tmp_path, caplog):
    (tmp_path / "deeper").mkdir()
    for name in ("b.png", "c.HEIC", "d.gif", "notes.md", "e.gif", "a.jpg"):
        (tmp_path / name).touch()
    assert [path.name for path in find_images([tmp_path])] == ["a.jpg", "b.png"]
    assert [record.getMessage() for record in caplog.records] == [
        f"not looked into in {tmp_path}: 2 .gif, 1 .heic, 1 folders"
    ]


def test_any_error_of_one_file_leaves_the_others(rfsr, quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, width in {"big": 13, "odd": 14, "last": 8}.items():
        Image.new("RGB", (width, 8)).save(f"{name}.png")
    code, printed = rfsr("upscale", "big.png", "absent.png", "odd.png", "last.png")
    assert code == "rfsr: 3 of 4 files could not be upscaled: big.png, absent.png, odd.png"
    assert "skipped big.png: not enough memory (9.2 GB at once); give smaller or fewer images\n" in printed.err
    assert "skipped absent.png: 'absent.png' does not exist\n" in printed.err
    assert [path.name for path in (tmp_path / "upscaled").iterdir()] == ["last_x4.png"]


def test_memory_is_said_beforehand_and_what_needs_too_much_left_out(rfsr, quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("large.png")
    Image.new("RGB", (8, 8)).save("small.png")
    module = importlib.import_module("rfsr_ext.cli.upscale")
    monkeypatch.setattr(module, "available", lambda: 30_000)  # 64² pixels take 24 bytes each, six sets of latents
    code, printed = rfsr("upscale", "large.png", "small.png")
    assert str(code) == "rfsr: 1 of 2 files could not be upscaled: large.png"
    assert (
        "skipped large.png: its result of 64x64 pixels needs 0.0 GB of memory, and 0.0 GB are free; give" in printed.err
    )
    assert [image.shape for image in quick] == [(3, 8, 8)] and "will need" not in printed.err
    monkeypatch.setattr(module, "result_bytes", lambda *_: 1_340_000_000)
    monkeypatch.setattr(module, "available", lambda: None)  # not every system says
    code, printed = rfsr("upscale", "large.png")
    assert code == 0 and "large.png: the result of 64x64 pixels will need 1.3 GB of memory beside" in printed.err


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "no space left on disk"), (errno.EROFS, "read-only")])
def test_a_disk_that_takes_nothing_ends_the_batch_and_is_named(rfsr, quick, tmp_path, monkeypatch, number, words):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(name)
    files, fsync = [], os.fsync

    def full(descriptor):
        files.append(descriptor)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    code, _ = rfsr("upscale", "a.png", "b.png", "--output", "elsewhere")
    monkeypatch.setattr(os, "fsync", fsync)
    assert words in code and "'elsewhere/a_x4.png'" in code and len(files) == 1
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    ("error", "shown"), [(OSError(errno.ENOSPC, "No space left on device"), False), (ValueError(), True)]
)
def test_a_thread_leaves_a_full_disk_to_the_main_one(rfsr, capsys, error, shown):
    def fail():
        raise error

    rfsr("--help")
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    assert ("Traceback" in capsys.readouterr().err) == shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["upscale", "x.png"], "rfsr: interrupted; nothing is half written\n"),
        (["demo"], "rfsr: interrupted; the same command goes on from the last checkpoint, if there is one yet\n"),
    ],
)
def test_an_interruption_is_said(rfsr, tmp_path, monkeypatch, arguments, sentence):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.import_module("rfsr_ext.cli.upscale"), "load_model", interrupt)
    monkeypatch.setattr(importlib.import_module("rfsr_ext.cli.demo"), "run_demo", interrupt)
    code, printed = rfsr(*arguments)
    assert code == 130 and printed.err.endswith(sentence)


def test_a_working_folder_that_is_gone_is_said(rfsr, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert rfsr("doctor")[0] == "rfsr: the folder one works in is gone; change to another"


@pytest.mark.parametrize("package", ["typer", "torch"])
def test_an_interruption_while_packages_are_imported_is_said(tmp_path, package):
    """The first that the command line imports, and the first that takes long."""
    (tmp_path / f"{package}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    command = [sys.executable, "-m", "rfsr_ext", "upscale", "x.png"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    run = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    assert run.returncode == 130 and not run.stdout
    assert run.stderr.strip() == "rfsr: interrupted; nothing is half written"


def test_a_file_in_the_place_of_a_folder_is_named(rfsr, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afile").write_text("mine")
    code, _ = rfsr("train", "mini", "--set", "output_dir=afile", "--set", "iterations=1")
    assert str(code).startswith("rfsr: 'afile' ") and "Errno" not in code and "\n" not in code
    assert (tmp_path / "afile").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["demo", "--output", "mine"], "table.txt"),
        (["ablate", "--output", "mine", "--crops", 1], "ablation.csv"),
        (["train", "dp2o-mini", "--set", "output_dir=mine"], "results.csv"),
    ],
)
def test_results_do_not_replace_files_of_the_users_own(rfsr, tmp_path, monkeypatch, arguments, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("mine")
    code, _ = rfsr(*arguments)
    assert code == f"rfsr: folder 'mine' holds a {name!r} that rfsr did not write; move it away or give another folder"
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [name]


@pytest.fixture
def pictures(tmp_path):
    """Ground truths, results of two makers, and a file that is no picture among the first one's."""
    rng = np.random.default_rng(0)
    for maker, noise in {"gt": 0, "noisy": 30, "clean": 3}.items():
        (tmp_path / maker).mkdir()
        for i in range(5):
            image = np.kron(np.random.default_rng(i).integers(60, 200, (8, 8, 3)), np.ones((6, 6, 1)))
            image = (image + rng.normal(0, noise, image.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / maker / f"{i}.png")
    (tmp_path / "noisy" / "half.png").write_bytes((tmp_path / "noisy" / "0.png").read_bytes()[:200])
    return tmp_path


def test_evaluate_folders_measures_what_it_can_and_names_the_rest(rfsr, pictures):
    table, cases = pictures / "out" / "table.csv", pictures / "out" / "cases.png"
    code, printed = rfsr("evaluate", pictures / "noisy", pictures / "clean", "--gt", pictures / "gt", "--output", table,
                         "--cases", cases)  # fmt: skip
    broken = pictures / "noisy" / "half.png"
    assert code == f"rfsr: 1 of 11 pictures could not be measured: {broken}"
    assert f"left out {broken}: " in printed.err
    frame = pd.read_csv(table)
    assert list(frame.columns) == ["model", "image", "preset", "psnr", "ssim", "judge"] and len(frame) == 10
    assert set(frame.preset) == {"basic: seed 0, PSNR and SSIM on RGB, border 0"}
    assert "basic: seed 0" in printed.out and f"Against {pictures / 'noisy'}, 5 pictures" in printed.out
    assert "low" in printed.out and "high" in printed.out
    with Image.open(cases) as image:
        assert image.width > 3 * 320 and image.height > 5 * 320  # two makers and the truth; all five pictures


@pytest.mark.parametrize("option, name", [("--output", "kept.csv"), ("--cases", "kept.png")])
def test_evaluate_replaces_a_file_only_when_asked_to(rfsr, pictures, option, name):
    kept = pictures / name
    kept.write_text("mine")
    command = ("evaluate", pictures / "clean", pictures / "gt", "--metrics", "judge", option, kept)
    code, printed = rfsr(*command)
    assert code == f"rfsr: {str(kept)!r} exists already; give another --output or --overwrite"
    assert kept.read_text() == "mine" and printed.out == ""
    code, _ = rfsr(*command, "--overwrite")
    assert code == 0 and kept.read_bytes() != b"mine"


@pytest.mark.parametrize(
    "options, beside",
    [
        (("--stability",), ".stability.csv"),
        (("--stability",), ".stability.png"),
        (("--steps",), ".steps.csv"),
        (("--steps",), ".mini.png"),
        (("--best-of", "2"), ".png"),
        (("--pairs", ".", ".", "--best-of", "2"), ".best_of.csv"),
        (("--pairs", ".", ".", "--stability", "--seeds", "2"), ".stability.png"),
    ],
)
def test_evaluate_refuses_to_replace_what_lies_beside_its_table(rfsr, tmp_path, options, beside):
    (tmp_path / f"table{beside}").write_text("mine")
    code, _ = rfsr("evaluate", "mini", "--output", tmp_path / "table.csv", *options)
    assert code == f"rfsr: {str(tmp_path / f'table{beside}')!r} exists already; give another --output or --overwrite"


def test_models_that_are_called_alike_have_figures_of_their_own():
    assert step_figures(["mini", "a/model"]) == [".mini.png", ".model.png"]
    assert step_figures(["a/model", "/b/model", "mini"]) == [".a-model.png", ".b-model.png", ".mini.png"]


def test_evaluate_one_good_folder_exits_with_0(rfsr, pictures):
    code, printed = rfsr("evaluate", pictures / "clean", "--gt", pictures / "gt", "--metrics", "psnr,ssim", "--channel",
                         "y", "--border", 4)  # fmt: skip
    assert code == 0
    assert "custom: seed 0, PSNR and SSIM on Y, border 4" in printed.out


def test_evaluate_without_ground_truths_says_what_is_left_out(rfsr, pictures):
    code, printed = rfsr("evaluate", pictures / "clean")
    assert code == 0 and "without --gt there is no psnr, ssim" in printed.out


def test_parquet_needs_pyarrow(rfsr, pictures):
    table = pictures / "table.parquet"
    code, _ = rfsr("evaluate", pictures / "clean", "--output", table)
    if importlib.util.find_spec("pyarrow"):
        assert code == 0 and len(pd.read_parquet(table)) == 5
    else:
        assert code == "rfsr: writing .parquet needs pyarrow (pip install 'rfsr_ext[metrics]'); give a .csv instead"
        assert not table.exists()


def test_missing_weights_are_named_before_anything_runs(rfsr, pictures, monkeypatch):
    pytest.importorskip("pyiqa", reason="pyiqa is not installed (pip install 'rfsr_ext[metrics]')")
    monkeypatch.setenv("TORCH_HOME", str(pictures / "torch"))
    monkeypatch.setenv("RFSR_WEIGHTS", str(pictures / "mine"))
    code, printed = rfsr("evaluate", pictures / "clean", "--gt", pictures / "gt", "--metrics", "psnr,musiq")
    assert "lacks the weights musiq (musiq_koniq_ckpt-e95806b9.pth)" in code and "\n" not in code
    assert printed.out == ""


def test_evaluate_models_by_a_preset(rfsr, tmp_path):
    code, printed = rfsr("evaluate", "mini", "--crops", 3, "--seeds", 1, "--preset", "basic", "--output",
                         tmp_path / "table.csv")  # fmt: skip
    assert code == 0 and "basic: seed 0" in printed.out
    frame = pd.read_csv(tmp_path / "table.csv")
    assert {"bicubic", "mini"} == set(frame.model) and frame.preset.notna().all() and frame.judge.notna().all()


def test_weights_are_listed(rfsr, tmp_path, monkeypatch):
    monkeypatch.setenv("RFSR_WEIGHTS", str(tmp_path))
    (tmp_path / "musiq_koniq_ckpt-e95806b9.pth").write_bytes(b"x")
    code, printed = rfsr("weights")
    assert code == 0
    (line,) = (line for line in printed.out.splitlines() if line.startswith("musiq "))
    assert re.match(r"musiq +yes +\? +\? +MUSIQ \(KonIQ-10k\) +musiq_koniq_ckpt-e95806b9.pth +https://", line)
    assert str(tmp_path) in printed.out
    code, printed = rfsr("weights", "--json")
    (row,) = (row for row in json.loads(printed.out) if row["name"] == "musiq")
    assert row["found"] == row["looked_for"][0] == str(tmp_path / "musiq_koniq_ckpt-e95806b9.pth")
    assert row["sha256"] == "" and row["mib"] is None


def test_fetching_what_is_there_says_where(rfsr, tmp_path, monkeypatch):
    monkeypatch.setenv("RFSR_WEIGHTS", str(tmp_path))
    (tmp_path / "musiq_koniq_ckpt-e95806b9.pth").write_bytes(b"x")
    code, printed = rfsr("weights", "fetch", "musiq")
    assert code == 0 and printed.out == f"musiq: {tmp_path / 'musiq_koniq_ckpt-e95806b9.pth'}\n"


def test_commands_that_one_process_runs_refuse_several(rfsr, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in (["demo", "--output", tmp_path], ["mini", "build"], ["data", "check", tmp_path]):
        code, _ = rfsr(*command)
        assert (
            code.startswith("rfsr: 2 processes were launched, but rfsr ") and "runs in one; start it by itself" in code
        )
    monkeypatch.delenv("LOCAL_RANK", raising=False)  # of a launcher that nobody here knows
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    code, _ = rfsr("upscale", tmp_path / "x.png")
    assert "must work together, but of 2 (WORLD_SIZE) each is alone" in code
