"""Metrics of pyiqa as rewards.  pyiqa itself (several seconds, about 1 GB of packages) is imported when one is made."""

import contextlib
import functools
import importlib
import importlib.util
import logging
import sys
import types
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from rfsr_ext.rewards.base import Reward
from rfsr_ext.weights import registry

__all__ = ["PyIQAReward", "create_metric", "import_pyiqa"]

_LENIENT = ("lpips", "lpips-vgg", "dists")  # loaded with strict=False: a wrong file would leave random numbers in them
_LATE = ("niqe", "brisque")  # hold numbers of any shape until the first image


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
        importlib.import_module("pyiqa.archs.clip_imports")  # pyiqa leaves this to the first metric that needs it
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
def _no_downloads(what: str) -> Iterator[None]:
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


@contextlib.contextmanager
def _loaded_parameters() -> Iterator[WeakIdKeyDictionary]:
    """Collects the parameters that a state dict sets within the block."""
    load, loaded = nn.Module.load_state_dict, WeakIdKeyDictionary()

    def noting(module: nn.Module, state: dict, *args, **options):
        loaded.update((p, name) for name, p in module.named_parameters(remove_duplicate=False) if name in state)
        return load(module, state, *args, **options)

    with mock.patch.object(nn.Module, "load_state_dict", noting):
        yield loaded


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
    paths = [str(registry.provide(file)) for file in registry.METRIC_FILES.get(name, ()) if published]
    logging.getLogger("pyiqa").setLevel(logging.WARNING)
    try:
        with (
            _no_downloads(f"pyiqa's metric {name!r}"),
            contextlib.redirect_stdout(sys.stderr),  # it prints what it loads; results belong on stdout
            _loaded_parameters() as loaded,
        ):
            metric = pyiqa.create_metric(name, **options)
        if name in _LENIENT and paths:
            drawn = [key for key, parameter in metric.net.named_parameters() if parameter not in loaded]
            if drawn:
                raise ValueError(f"nothing in them for {len(drawn)} parameters such as {drawn[0]}")
        if name in _LATE:
            metric(torch.rand(1, 3, 192, 192, generator=torch.Generator().manual_seed(0)))
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"metric {name!r} cannot be loaded: {error}", name=error.name) from error
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever the content of a file makes pyiqa and torch stumble over
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        files = f" from {', '.join(paths)}, damaged or made for another architecture" if paths else ""
        raise ValueError(f"metric {name!r} cannot be built{files} ({reason})") from error
    return metric


class PyIQAReward(Reward):
    """Any no-reference metric of pyiqa, through its ``as_loss`` mode, which keeps the gradient if there is one.

    Runs in single precision whatever the images are and ``.to`` says; only the device follows it.  Metrics for which
    lower is better get the opposite sign.

    Args:
        metric: its name in ``pyiqa.list_models()``.
        options: for ``pyiqa.create_metric``.

    Raises:
        ModuleNotFoundError: without pyiqa.
        FileNotFoundError: if its weights are not on disk.
        ValueError: if there is no such metric, it compares with a reference image, which rewards do not have, or its
            file is a wrong one.
    """

    def __init__(self, metric: str, **options):
        super().__init__()
        configs = import_pyiqa("pyiqa.default_model_configs").DEFAULT_CONFIGS
        if metric not in configs:
            raise ValueError(f"metric must be one that pyiqa.list_models() lists, got {metric!r}")
        if configs[metric].get("metric_mode", "NR") != "NR":
            raise ValueError(f"metric must judge an image without a reference, got {metric!r}, which compares with one")
        self.name = f"pyiqa:{metric}"
        options = {"as_loss": True, "loss_reduction": "none", "device": "cpu"} | options
        self.metric = create_metric(metric, **options)
        # pyiqa hides CLIP in lists, where neither .to nor requires_grad_ would find it
        hidden = [value for value in vars(self.metric.net).values() if isinstance(value, list)]
        self.hidden = nn.ModuleList(part for parts in hidden for part in parts if isinstance(part, nn.Module))
        self.requires_grad_(False).eval()
        self.sign = -1 if self.metric.lower_better else 1

    @functools.cached_property
    def differentiable(self) -> bool:
        """Whether noise of 256 pixels gets a gradient that is not zero all over: PIQE's rounding, for one, gives zeros.

        Found out when first asked, as the gradient trainer does before it starts.
        """
        images = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.enable_grad():
            score = self.score(images).sum()
        (gradient,) = torch.autograd.grad(score, images, allow_unused=True) if score.requires_grad else (None,)
        return gradient is not None and bool(gradient.any())

    def _apply(self, fn, recurse: bool = True):
        """Moves, but keeps its precision, the only one that pyiqa's metrics are made for."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def score(self, images: Tensor, prompts: list[str] | None = None) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return self.sign * self.metric(images.float()).float().reshape(len(images))  # NIQE answers in double
