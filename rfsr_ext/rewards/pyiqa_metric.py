"""Metrics of pyiqa as rewards.  pyiqa itself (several seconds, about 1 GB of packages) is imported when one is made."""

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from rfsr_ext.rewards.base import Reward

__all__ = ["PyIQAReward", "import_pyiqa", "no_downloads"]


def import_pyiqa(module: str = "pyiqa") -> types.ModuleType:
    """pyiqa or one of its modules.

    openai-clip, which pyiqa's CLIP metrics import, asks for ``pkg_resources``, only to reach ``packaging`` through it;
    setuptools 82 removed that module.  Where it is missing, an empty one stands in during the import.

    Raises:
        ModuleNotFoundError: if the import fails, with what to install.
    """
    absent = "pkg_resources" not in sys.modules and importlib.util.find_spec("pkg_resources") is None
    try:
        if absent:
            stand_in = types.ModuleType("pkg_resources")
            stand_in.packaging = importlib.import_module("packaging")
            importlib.import_module("packaging.version")
            sys.modules["pkg_resources"] = stand_in
        importlib.import_module(
            "pyiqa.archs.clip_imports"
        )  # pyiqa itself leaves this to the first metric that needs it
        return importlib.import_module(module)
    except Exception as error:  # some of its dependencies fail with other errors than ImportError
        reason = " ".join(str(error).split())
        raise ModuleNotFoundError(
            f"the package pyiqa cannot be imported ({reason}); pip install 'rfsr_ext[rewards]'", name="pyiqa"
        ) from error
    finally:
        if absent:
            sys.modules.pop("pkg_resources", None)


class _WouldDownload(Exception):
    """Raised in place of a download; its text is the address."""


def _refuse(address, *args, **kwargs):
    raise _WouldDownload(getattr(address, "full_url", address))


@contextlib.contextmanager
def no_downloads(what: str) -> Iterator[None]:
    """Within the block, a download by urllib, torch hub or the Hugging Face hub is an error of one sentence.

    Raises:
        FileNotFoundError: if the block wanted to download; the sentence names the file or the hub's own complaint.
    """
    with contextlib.ExitStack() as stack:
        for function in ("urllib.request.urlopen", "torch.hub.urlopen"):
            stack.enter_context(mock.patch(function, _refuse))
        stack.enter_context(mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True))
        try:
            yield
        except Exception as error:
            wanted = next((e for e in _causes(error) if _is_download(e)), None)
            if wanted is None:
                raise
            reason = " ".join(str(wanted).split()).split(". ")[0]
            raise FileNotFoundError(
                f"{what} needs weights that are not on disk ({reason}); fetch them where there is a network, for "
                f"instance by making this metric there once, and copy {torch.hub.get_dir()} and the Hugging Face cache"
            ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_download(error: BaseException) -> bool:
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    return isinstance(error, (_WouldDownload, LocalEntryNotFoundError, OfflineModeIsEnabled))


class PyIQAReward(Reward):
    """Any no-reference metric of pyiqa, through its ``as_loss`` mode, which keeps the gradient.

    Runs in single precision whatever the images are.  Metrics for which lower is better get the opposite sign.

    Args:
        metric: its name in ``pyiqa.list_models()``.
        options: for ``pyiqa.create_metric``.

    Raises:
        ModuleNotFoundError: without pyiqa.
        FileNotFoundError: if its weights are not on disk.
        ValueError: if there is no such metric, or it compares with a reference image, which rewards do not have.
    """

    def __init__(self, metric: str, **options):
        super().__init__()
        pyiqa = import_pyiqa()
        configs = importlib.import_module("pyiqa.default_model_configs").DEFAULT_CONFIGS
        if metric not in configs:
            raise ValueError(f"metric must be one that pyiqa.list_models() lists, got {metric!r}")
        if configs[metric].get("metric_mode", "NR") != "NR":
            raise ValueError(f"metric must judge an image without a reference, got {metric!r}, which compares with one")
        self.name = f"pyiqa:{metric}"
        with no_downloads(f"pyiqa's metric {metric!r}"):
            options = {"as_loss": True, "loss_reduction": "none", "device": "cpu"} | options
            self.metric = pyiqa.create_metric(metric, **options).requires_grad_(False).eval()
        self.sign = -1 if self.metric.lower_better else 1

    def score(self, images: Tensor, prompts: list[str] | None = None) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return self.sign * self.metric(images.float()).reshape(len(images))
