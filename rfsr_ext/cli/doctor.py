"""``rfsr doctor``: what is here, what is not, and what to do about it."""

import importlib.util
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

import torch
import typer

import rfsr_ext
from rfsr_ext.losses.gram import vgg19_weights_path
from rfsr_ext.weights import WEIGHTS

__all__ = ["examine"]

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "PyWavelets", "scikit-image",
             "scikit-learn")  # fmt: skip
_OPTIONAL = {"peft": "LoRA (pip install 'rfsr_ext[lora]')",
             "pyiqa": "published metrics (pip install 'rfsr_ext[metrics]')",
             "jupyterlab": "notebooks (pip install 'rfsr_ext[notebooks]')"}  # fmt: skip


def _line(name: str, value: str) -> None:
    typer.echo(f"  {name:28s} {value}")


def examine() -> None:
    """Print the report."""
    typer.echo(f"rfsr_ext {rfsr_ext.__version__}, Python {platform.python_version()}, {platform.platform()}")
    typer.echo("\npackages")
    for name in _PACKAGES:
        try:
            _line(name, version(name))
        except PackageNotFoundError:
            _line(name, "MISSING; pip install 'rfsr_ext[train]'")
    for name, purpose in _OPTIONAL.items():
        _line(name, version(name) if importlib.util.find_spec(name) else f"not installed; only needed for {purpose}")
    typer.echo("\ncompute")
    _line("CPU threads", str(torch.get_num_threads()))
    _line("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none; everything runs on the CPU")
    _line("free disk here", f"{shutil.disk_usage('.').free / 2**30:.1f} GiB")
    typer.echo("\noperators")
    for device, served in rfsr_ext.build_info()["devices"].items():
        remedy = f"; {served['remedy']}" if served["remedy"] else ""
        _line(f"on {device}", f"{served['backend']}: {served['why']}{remedy}")
    typer.echo("\nweights")
    for name in ("model/unet", "model/controlnet", "model/vae", "rewards", "judge"):
        files = list((WEIGHTS / name).glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files) / 2**20
        _line(f"mini {name}", f"{size:.1f} MiB" if files else "MISSING; run `rfsr mini build`")
    try:
        _line("VGG19 (ImageNet)", str(vgg19_weights_path()))
    except (FileNotFoundError, ValueError) as error:
        _line("VGG19 (ImageNet)", str(error))
