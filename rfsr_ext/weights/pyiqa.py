"""The package pyiqa: imported, and its metrics built from weight files that are on disk.

pyiqa takes several seconds to import and brings about 1 GB of packages, so nothing here imports it before it is needed.
"""

import contextlib
import importlib
import importlib.util
import logging
import sys
import types
import urllib.request
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rfsr_ext.weights import registry
from rfsr_ext.weights.reading import read_tensors, reason

__all__ = ["create_metric", "import_pyiqa", "metric_settings", "offline", "with_pkg_resources"]

# pyiqa loads these files with strict=False: a wrong one would leave random numbers in the parameters named here
_HEADS = {
    "lpips": tuple(f"lin{i}.model.1.weight" for i in range(5)),
    "lpips-vgg": tuple(f"lin{i}.model.1.weight" for i in range(5)),
    "dists": ("alpha", "beta"),
}
_LATE = ("niqe", "brisque")  # hold numbers of any shape until the first image


@contextlib.contextmanager
def with_pkg_resources() -> Iterator[None]:
    """Let ``import clip`` work within the block.

    openai-clip asks for ``pkg_resources``, only to reach ``packaging`` through it; setuptools 82 removed that module.
    Where it is missing, an empty one stands in for the length of the block.
    """
    if "pkg_resources" in sys.modules or importlib.util.find_spec("pkg_resources") is not None:
        yield
        return
    stand_in = types.ModuleType("pkg_resources")
    vars(stand_in)["packaging"] = importlib.import_module("packaging")
    importlib.import_module("packaging.version")
    sys.modules["pkg_resources"] = stand_in
    try:
        yield
    finally:
        sys.modules.pop("pkg_resources", None)


def import_pyiqa(module: str = "pyiqa") -> types.ModuleType:
    """pyiqa or one of its modules.

    Raises:
        ModuleNotFoundError: if the import fails, with what to install.
    """
    try:
        with with_pkg_resources():
            importlib.import_module("pyiqa.archs.clip_imports")  # pyiqa leaves this to the first metric that needs it
            return importlib.import_module(module)
    except Exception as error:  # some of its dependencies fail with other errors than ImportError
        raise ModuleNotFoundError(
            f"the package pyiqa cannot be imported ({reason(error)}); pip install 'rfsr_ext[rewards]'", name="pyiqa"
        ) from error


def metric_settings(name: str) -> dict[str, Any]:
    """What pyiqa notes of a metric: ``metric_opts``, ``metric_mode`` and more.

    Raises:
        ModuleNotFoundError: without pyiqa.
        ValueError: if it has no such metric.
    """
    known = import_pyiqa("pyiqa.default_model_configs").DEFAULT_CONFIGS
    if name not in known:
        raise ValueError(f"metric must be one that pyiqa.list_models() lists, got {name!r}")
    return known[name]


class _WouldDownload(Exception):
    """Raised in place of a download; its text is the address."""


def _refuse(address, *args, **kwargs):
    raise _WouldDownload(getattr(address, "full_url", address))


@contextlib.contextmanager
def offline(what: str) -> Iterator[None]:
    """Within the block a download is an error of one sentence.

    pyiqa, timm, torchvision and openai-clip download whatever is not where they look, and have no option against it;
    huggingface_hub has one, which it reads from the environment once, when it is imported.  A user who only measures
    images would download gigabytes without being asked, or wait for a network that is not there.  So the two functions
    by which these packages open an address, and that option, are replaced during the block and restored after it.  This
    concerns the whole process: other threads should not download meanwhile.

    Args:
        what: needs the files, in words, for the sentence.

    Raises:
        FileNotFoundError: if the block wanted to download; the sentence names the file or the hub's own complaint.
    """
    from huggingface_hub import constants

    switches = ((urllib.request, "urlopen", _refuse), (torch.hub, "urlopen", _refuse),
                (constants, "HF_HUB_OFFLINE", True))  # fmt: skip
    before = [getattr(owner, name) for owner, name, _ in switches]
    try:
        for owner, name, value in switches:
            setattr(owner, name, value)
        yield
    except Exception as error:
        wanted = next((e for e in _causes(error) if _is_download(e)), None)
        if wanted is None:
            raise
        raise FileNotFoundError(
            f"{what} needs weights that are not on disk ({reason(wanted)}); fetch them where there is a network, for "
            f"instance by making this metric there once, and copy {torch.hub.get_dir()} and the Hugging Face cache"
        ) from error
    finally:
        for (owner, name, _), value in zip(switches, before, strict=True):
            setattr(owner, name, value)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_download(error: BaseException) -> bool:
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    return isinstance(error, (_WouldDownload, LocalEntryNotFoundError, OfflineModeIsEnabled))


def create_metric(name: str, **options) -> nn.Module:
    """``pyiqa.create_metric`` from files that are on disk: nothing is downloaded, and a wrong file is one sentence.

    Args:
        name: of the metric, in ``pyiqa.list_models()``.
        options: for pyiqa.  With ``pretrained`` or ``pretrained_model_path`` the published file is not asked for.

    Raises:
        ModuleNotFoundError: without pyiqa, or a package that this metric needs.
        FileNotFoundError: if a file is not on disk.
        ValueError: if a file is damaged, of another model, or leaves parameters as they were drawn.
    """
    pyiqa = import_pyiqa()
    published = {"pretrained", "pretrained_model_path"}.isdisjoint(options)
    paths = [registry.provide(file) for file in registry.METRIC_FILES.get(name, ()) if published]
    logging.getLogger("pyiqa").setLevel(logging.WARNING)
    try:
        with (
            offline(f"pyiqa's metric {name!r}"),
            contextlib.redirect_stdout(sys.stderr),  # it prints what it loads; results belong on stdout
        ):
            metric = pyiqa.create_metric(name, **options)
        if name in _HEADS and paths:
            read, state = read_tensors(paths[-1], "weights"), metric.net.state_dict()
            drawn = [key for key in _HEADS[name] if key not in read or not torch.equal(state[key].cpu(), read[key])]
            if drawn:
                raise ValueError(f"nothing in them for {len(drawn)} parameters such as {drawn[0]}")
        if name in _LATE:
            metric(torch.rand(1, 3, 192, 192, generator=torch.Generator().manual_seed(0)))
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"metric {name!r} cannot be loaded: {error}", name=error.name) from error
    except FileNotFoundError:
        raise
    except Exception as error:  # a wrong file makes pyiqa and torch fail in many ways
        files = f" from {', '.join(map(str, paths))}, damaged or made for another architecture" if paths else ""
        raise ValueError(f"metric {name!r} cannot be built{files} ({reason(error, 160)})") from error
    return metric
