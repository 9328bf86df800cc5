"""The command line ``rfsr``.  Heavy imports happen inside the commands, so that ``rfsr --help`` answers at once."""

import io
import logging
import os
import sys
import threading
import warnings
from pathlib import Path
from typing import Annotated

import typer

from rfsr_ext.cli.config import Set, choose_device, model_options, parse_pairs, show_config
from rfsr_ext.cli.numbers import SEED, real, whole
from rfsr_ext.cli.preferences import preferences

__all__ = ["app"]

_typer = typer.Typer(
    name="rfsr",
    help="Reward feedback learning for diffusion super-resolution models (RFSR, arXiv 2412.03268).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_mini = typer.Typer(help="The mini model that ships with the package.", no_args_is_help=True)
_typer.add_typer(_mini, name="mini")
_config = typer.Typer(help="Settings of a training run.", no_args_is_help=True)
_typer.add_typer(_config, name="config")
_weights = typer.Typer(invoke_without_command=True)
_typer.add_typer(_weights, name="weights")

_data = typer.Typer(help="Training data.", no_args_is_help=True)
_typer.add_typer(_data, name="data")
_typer.add_typer(preferences, name="preferences")

ModelOption = Annotated[
    list[str] | None,
    typer.Option(help="KEY=VALUE of what a diffusers folder does not say, such as scale=2 or start=noise; repeatable."),
]

WeightsFolder = Annotated[
    Path | None, typer.Option(help="Folder with a published model's files; RFSR_WEIGHTS/NAME by default.")
]
BaseFolder = Annotated[Path | None, typer.Option(help="Folder of the Stable Diffusion or FLUX model under it.")]


def app() -> None:
    """Run the command line; what a user can mend is one sentence on stderr (``RFSR_DEBUG=1`` shows the traceback)."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    for noisy in ("httpx", "httpcore", "matplotlib", "PIL", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", r"Image size \(\d+ pixels\) exceeds limit"
    )  # a photograph of 90 megapixels is no attack
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: no name of a file ends the work on the others
    threading.excepthook = _failed_thread
    try:
        if (folder := _working_folder()) not in sys.path:  # settings may name package.module:Name in it
            sys.path.append(folder)
        _check_processes()
        _typer()
    except (ValueError, TypeError, RuntimeError, OSError, MemoryError, ModuleNotFoundError) as error:
        if os.environ.get("RFSR_DEBUG"):
            raise
        from rfsr_ext.cli.errors import sentence

        sys.exit(f"rfsr: {sentence(error)}")


def _failed_thread(failed: threading.ExceptHookArgs) -> None:
    """That a disk is full TensorBoard's thread tells the main one, which says it; anything else is shown as ever."""
    from rfsr_ext.cli.errors import disk_is_full

    if failed.exc_value is None or not disk_is_full(failed.exc_value):
        threading.__excepthook__(failed)


def _working_folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise FileNotFoundError("the folder one works in is gone; change to another") from None


_SHARED = (
    "train",
    "upscale",
    "evaluate",
    "data tag",
    "preferences sample",
    "preferences score",
)  # what several processes can do together


def _check_processes() -> None:
    """Refuse several processes for what one does: they would write the same files at once."""
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    command = " ".join(words[: 1 + (words[:1] in (["data"], ["preferences"]))])
    if (launched := int(os.environ.get("WORLD_SIZE", 1))) > 1 and command not in _SHARED:
        raise ValueError(
            f"{launched} processes were launched, but rfsr {command} runs in one; start it by itself (several may do: "
            f"{', '.join(_SHARED)})"
        )


@_typer.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for pictures, table and model.")] = Path("runs/demo"),
    iterations: Annotated[int | None, whole("Training iterations; the preset's by default.", 1, 10**7)] = None,
    crops: Annotated[int, whole("Held-out crops to measure.", 1)] = 24,
    seed: Annotated[int, whole("Of data and noise.", 0, SEED)] = 0,
) -> None:
    """Fine-tune the mini model on the bundled photographs and show what changed (about five minutes on two cores)."""
    from rfsr_ext.cli.demo import run_demo

    run_demo(output, iterations, crops, seed)


@_typer.command()
def train(
    config: Annotated[str, typer.Argument(help="A YAML file, or a preset: mini, paper, paper-seesr …")],
    set_: Set = None,
    fresh: Annotated[bool, typer.Option(help="Refuse to resume: the output folder must hold no checkpoint.")] = False,
) -> None:
    """Fine-tune a model as CONFIG says; the same command resumes an interrupted run."""
    from rfsr_ext.processes import process_state
    from rfsr_ext.training import RFSRTrainer, create_trainer, load_config

    trainer = create_trainer(load_config(config, parse_pairs("--set", set_)))
    is_main = process_state().is_main_process
    if is_main and isinstance(trainer, RFSRTrainer):
        held = trainer.held_memory()
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in held.items() if size)
        typer.echo(f"memory: {sum(held.values()) / 1e9:.2f} GB ({parts}), and activations on top", err=True)
    result = trainer.train(resume=not fresh)
    if is_main:
        typer.echo(result.summary)


@_typer.command()
def upscale(
    images: Annotated[list[Path], typer.Argument(help="Images of any size, or folders of them.")],
    model: Annotated[
        str, typer.Option(help='"mini", a name of `rfsr models`, or a folder such as runs/demo/model.')
    ] = "mini",
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("upscaled"),
    prompt: Annotated[str, typer.Option(help="What the image shows, a few words.")] = "",
    steps: Annotated[int | None, whole("Sampling steps; the model's own by default.", 1, 1000)] = None,
    tile: Annotated[int | None, whole("Side of the tiles, in output pixels; the model's own by default.", 1)] = None,
    overlap: Annotated[int | None, whole("Of neighboring tiles at least, likewise.", 0)] = None,
    color_fix: Annotated[str, typer.Option(help="wavelet, adain or none; the model's own by default.")] = "recipe",
    seed: Annotated[int, whole("Of the noise.", 0, SEED)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that exist.")] = False,
    guidance_scale: Annotated[
        float | None, real("Of classifier-free guidance, 1 for none; the model's own by default.", 0, 100)
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="Of that guidance; the model's own by default.")] = None,
    weights: WeightsFolder = None,
    base: BaseFolder = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, of all networks.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cuda if there is one, else cpu.")] = None,
    model_option: ModelOption = None,
) -> None:
    """Upscale images with the base model, a published one or a fine-tuned one."""
    from rfsr_ext.cli.upscale import upscale_files

    upscale_files(
        images, model, output, prompt, steps, tile, overlap, color_fix, seed, overwrite, guidance_scale,
        negative_prompt, model_options(model_option, weights, base, dtype), device,
    )  # fmt: skip


@_typer.command()
def evaluate(
    targets: Annotated[
        list[str],
        typer.Argument(
            help='Models ("mini" or model folders), or folders of pictures; others are compared with the first.'
        ),
    ],
    gt: Annotated[Path | None, typer.Option(help="Folder of ground truths, matched by name (pictures).")] = None,
    pairs: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Folders of LR images and of their ground truths (RealSR, DRealSR …) to run models on."),
    ] = None,
    pictures: Annotated[Path, typer.Option(help="Receives the pictures models make of --pairs.")] = Path("evaluated"),
    preset: Annotated[
        str | None, typer.Option(help="basic, rfsr-paper, seesr, held-out or weightless; basic for pictures.")
    ] = None,
    metrics: Annotated[str | None, typer.Option(help="Comma-separated names instead of those of the preset.")] = None,
    channel: Annotated[str | None, typer.Option(help="rgb or y, of PSNR and SSIM; the preset's by default.")] = None,
    border: Annotated[int | None, whole("Pixels PSNR and SSIM leave out along every border.", 0)] = None,
    cases: Annotated[Path | None, typer.Option(help="PNG of the best and worst cases (pictures).")] = None,
    by: Annotated[str | None, typer.Option(help="Metric that ranks the cases; the first by default.")] = None,
    crops: Annotated[int, whole("Held-out crops.", 1)] = 64,
    size: Annotated[int, whole("Their side in pixels.", 32, step=4)] = 64,
    seeds: Annotated[
        int | None, whole("Seeds of the noise, from 0; 3 on held-out crops and 1 on pairs by default.", 1)
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write every row to this .csv or .parquet file.")] = None,
    steps: Annotated[bool, typer.Option(help="Also measure every sampling step (Figure 1 of the paper).")] = False,
    stability: Annotated[
        bool, typer.Option("--stability", help="Also say how much samples of one image differ: G-STD, L-STD, a map.")
    ] = False,
    best_of: Annotated[
        int | None, whole("So many results per crop or pair: best, mean and worst of 1, 2, 4 … of them.", 2)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace tables and figures that exist.")] = False,
    model_option: ModelOption = None,
) -> None:
    """Measure folders of pictures, or models on held-out photographs or pairs, by the metrics of a preset."""
    from rfsr_ext.cli.evaluate import (
        choose_preset,
        evaluate_best_of,
        evaluate_folders,
        evaluate_models,
        evaluate_on_pairs,
        holds_pictures,
    )

    chosen = choose_preset(preset, metrics, channel, border)
    folders = [holds_pictures(target) for target in targets]
    options = parse_pairs("--model-option", model_option)
    if stability and (all(folders) or best_of is not None or (seeds or (1 if pairs else 3)) < 2):
        raise ValueError("--stability is for models and two --seeds or more, of which CCSR's authors take 10")
    if best_of is not None and (any(folders) or gt is not None or cases is not None or steps or seeds is not None):
        raise ValueError("--best-of is for models on held-out crops or --pairs, and its number is that of the seeds")
    if pairs is not None:
        if any(folders) or gt is not None or cases is not None or steps:
            raise ValueError(
                "--pairs is for models alone, without --gt, --cases and --steps; its second folder is --gt"
            )
        numbers = range(best_of or seeds or 1)
        evaluate_on_pairs(
            targets, pairs, pictures, chosen, numbers, output, options, stability, best_of is not None, overwrite
        )
    elif best_of is not None:
        evaluate_best_of(targets, crops, size, best_of, output, chosen, options, overwrite)
    elif all(folders):
        evaluate_folders([Path(target) for target in targets], gt, chosen, output, cases, by, overwrite)
    elif any(folders):
        raise ValueError(f"targets must be all models or all folders of pictures, got {' '.join(targets)}")
    elif gt is not None or cases is not None:
        raise ValueError(
            f"--gt and --cases are for folders of pictures, and {targets[0]!r} is none; give some, or leave them out "
            "to measure models on the bundled photographs"
        )
    else:
        evaluate_models(targets, crops, size, range(seeds or 3), output, steps, chosen, options, stability, overwrite)


@_typer.command()
def models(
    name: Annotated[str | None, typer.Argument(help="A published model, to list its files; all by default.")] = None,
    weights: WeightsFolder = None,
    base: BaseFolder = None,
    output: Annotated[
        Path | None, typer.Option("--convert", help="Write the model as a folder of safetensors here.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, of what is written.")] = "float32",
    model_option: ModelOption = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the published models: their files, whether they are here, the command that runs them."""
    from rfsr_ext.cli.models import convert_model, list_published

    if output is None:
        list_published(name, weights, base, json_)
    else:
        convert_model(name or "", output, model_options(model_option, weights, base, dtype))


@_typer.command()
def record(
    name: Annotated[str | None, typer.Argument(help="A protocol; without one all are listed.")] = None,
    output: Annotated[Path | None, typer.Option(help="The file; recordings/NAME.json by default.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a recording that exists.")] = False,
    weights: WeightsFolder = None,
    base: BaseFolder = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, of a published model.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cuda if there is one, else cpu.")] = None,
) -> None:
    """Measure a published network by a fixed protocol and keep a small file, which the notebooks show."""
    from rfsr_ext.cli.record import list_protocols, record_protocol

    if name is None:
        list_protocols()
    else:
        record_protocol(name, output, overwrite, model_options(None, weights, base, dtype), device)


@_weights.callback()
def weights(
    context: typer.Context,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List every published weight file that some part can use, and whether it is here; nothing is downloaded."""
    if context.invoked_subcommand is None:
        from rfsr_ext.cli.weights import list_weights

        list_weights(json_)


@_weights.command("fetch")
def weights_fetch(
    names: Annotated[list[str], typer.Argument(help="Names as `rfsr weights` lists them.")],
) -> None:
    """Download files by name into the folder RFSR_WEIGHTS names, or where the package that reads them looks."""
    from rfsr_ext.cli.weights import fetch_weights

    fetch_weights(names)


@_typer.command()
def ablate(
    config: Annotated[str, typer.Argument(help="A YAML file, or a preset.")] = "mini",
    variants: Annotated[str | None, typer.Option(help="Comma-separated; all by default.")] = None,
    seeds: Annotated[int, whole("Training seeds, from 0.", 1)] = 3,
    crops: Annotated[int, whole("Held-out crops.", 1)] = 32,
    size: Annotated[int, whole("Their side in pixels.", 32, step=4)] = 64,
    output: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs/ablation"),
) -> None:
    """Train the variants of the paper's Tables 2 to 5 over several seeds and compare them."""
    from rfsr_ext.cli.config import split_names
    from rfsr_ext.cli.evaluate import ablate_variants

    ablate_variants(config, split_names(variants), range(seeds), crops, size, output)


@_typer.command()
def compare(
    config: Annotated[str, typer.Argument(help="A YAML file of ways of training, or the preset: mini.")] = "mini",
    model: Annotated[str | None, typer.Option(help="The base model, as for a training; CONFIG's by default.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for everything; CONFIG's by default.")] = None,
    set_: Set = None,
) -> None:
    """Train a model in several ways at the same cost, over seeds, and compare quality, spread and cost."""
    from rfsr_ext.cli.compare import compare_ways

    given = {"model": model, "output_dir": output and str(output)}
    compare_ways(config, parse_pairs("--set", set_) | {key: value for key, value in given.items() if value})


@_typer.command()
def doctor() -> None:
    """Say what is installed, which backend serves each operator, which weights are there, and the remedies."""
    from rfsr_ext.cli.doctor import examine

    examine()


@_config.command("show")
def config_show(
    config: Annotated[str, typer.Argument(help="A YAML file, or a preset: mini, paper, paper-seesr …")],
    set_: Set = None,
) -> None:
    """Print every setting with its meaning, as YAML that `rfsr train` reads."""

    show_config(config, parse_pairs("--set", set_))


@_data.command("check")
def data_check(
    folders: Annotated[list[Path] | None, typer.Argument(help="Folders of sharp images, each by itself.")] = None,
    pairs: Annotated[tuple[Path, Path] | None, typer.Option(help="Folders of LR images and ground truths.")] = None,
    config: Annotated[str | None, typer.Option(help="A YAML file whose data is looked at, with its sizes.")] = None,
    crop_size: Annotated[int, whole("Side of the training crops; smaller images are not used.", 0)] = 512,
    scale: Annotated[int, whole("How many times larger the ground truths of pairs are.", 1, 64)] = 4,
    headers: Annotated[
        bool, typer.Option("--headers", help="Read no more than headers: seconds, not minutes.")
    ] = False,
) -> None:
    """Say what folders hold, what of it will not be used in training and why; exit code 1 if there is such a file."""
    from rfsr_ext.cli.data import check_data

    check_data(folders or (), pairs, config, crop_size, scale, headers)


@_data.command("degrade")
def data_degrade(
    folder: Annotated[Path, typer.Argument(help="Sharp images, searched recursively.")],
    output: Annotated[Path, typer.Option(help="Receives lr/, gt/ and manifest.json.")],
    preset: Annotated[str, typer.Option(help="realesrgan-a, realesrgan-b, realesrgan-c or mini.")] = "realesrgan-a",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE, wins over the preset, such as scale=2; repeatable.")
    ] = None,
    seed: Annotated[int, whole("Of what is drawn.", 0, SEED)] = 0,
    crops: Annotated[int | None, whole("So many random crops instead of whole images.", 1)] = None,
    size: Annotated[int, whole("Their side in pixels.", 1)] = 512,
    limit: Annotated[int | None, whole("The first so many images of the sorted list alone.", 1)] = None,
    like: Annotated[
        Path | None, typer.Option(help="Somebody's manifest.json: take its settings and compare the LR files.")
    ] = None,
) -> None:
    """Make LR images that anybody with the same versions can make again to the byte; the same command resumes."""
    from rfsr_ext.cli.data import degrade_data

    degrade_data(folder, output, preset, seed, parse_pairs("--set", set_), crops, size, limit, like)


@_data.command("tag")
def data_tag(
    folder: Annotated[Path, typer.Argument(help="Pictures, searched recursively.")],
    weights: Annotated[
        Path | None, typer.Option(help="Folder of RAM's files; RFSR_WEIGHTS and the cache by default.")
    ] = None,
    tagger: Annotated[
        str, typer.Option(help="ram; dape for degraded pictures; hf:NAME of a captioner; package.module:Name.")
    ] = "ram",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of tags that exist.")] = False,
) -> None:
    """Write what each picture shows into name.txt beside it, the prompts of training; the same command resumes."""
    from rfsr_ext.cli.data import tag_data

    tag_data(folder, tagger, weights, device, overwrite)


@_mini.command("build")
def mini_build(
    photographs: Annotated[Path, typer.Argument(help="Folder in which the photographs' Debian packages are unpacked.")],
    output: Annotated[Path | None, typer.Option(help="Receives the weights; the package itself by default.")] = None,
    work: Annotated[Path, typer.Option(help="State of unfinished stages.")] = Path("runs/mini-build"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, whole("Of weights, data and noise.", 0, SEED)] = 0,
    bf16: Annotated[bool | None, typer.Option(help="bfloat16 autocast or not; measured by default.")] = None,
) -> None:
    """Train the mini model, both small rewards and the judge; resumable.

    The photographs come from Debian packages, which need not be installed:

    apt-get download lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 mate-backgrounds plasma-workspace-wallpapers

    for package in *.deb; do dpkg-deb -x "$package" photographs/; done
    """
    from rfsr_ext.mini.build import build
    from rfsr_ext.weights import WEIGHTS

    device = choose_device(device)
    for name, seconds in build(photographs, work, output or WEIGHTS, device=device, seed=seed, bf16=bf16).items():
        typer.echo(f"{name:12s} {seconds / 60:6.1f} min")
