"""Every published weight file that some part can use: what it is for, where it comes from, where it is looked for.

Nothing is downloaded unless `fetch` is asked to.  A file is looked for in the folder that ``RFSR_WEIGHTS`` names, then
in the cache of the package that reads it (its *home*):

================ ============================================ =====================================
home             folder                                       who reads it there
================ ============================================ =====================================
``checkpoints``  ``checkpoints`` in torch hub's folder        torchvision; RAM, which no package reads
``pyiqa``        ``pyiqa`` in torch hub's folder              pyiqa
``pyiqa-clip``   ``clip`` in torch hub's folder               pyiqa's own copy of CLIP
``openai-clip``  ``~/.cache/clip``                            openai-clip
``image-reward`` ``~/.cache/ImageReward``                     image-reward
``hub``          the Hugging Face cache (``HF_HOME``) alone   timm, transformers
================ ============================================ =====================================

Hashes stand where the publisher made them known: OpenAI in the address, torchvision in the file name (its first eight
digits).  pyiqa's file names end in eight digits too, but neither pyiqa nor its repository says what they are.  Licenses
are those that the publisher's package states; "unknown" means that the file itself comes without one.
"""

import contextlib
import errno
import os
import re
import socket
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.error import URLError
from urllib.parse import quote, unquote

import torch

from rfsr_ext.files import sha256

__all__ = ["FILES", "METRIC_FILES", "WeightFile", "fetch", "find", "locate", "missing", "provide"]

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)  # no fault of the network
_PYIQA = "https://huggingface.co/chaofengc/IQA-PyTorch-Weights/resolve/main"
_OPENAI = "https://openaipublic.azureedge.net/clip/models"
_RN50 = "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"
_VIT_L = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
_TAGS = "5d96d2f7225527480ad773aaac76b6e5c08a18adf6eae9ca7d2ab923d5e7bd8b"
_THRESHOLDS = "b6f81d0de1bc7f9c251af512c413eae976c77dbfbadf700d4e3d90510f4c6447"
_NONCOMMERCIAL = "unknown (pyiqa itself: PolyForm Noncommercial 1.0.0)"


@dataclass(frozen=True)
class WeightFile:
    """One file.

    Attributes:
        file: its name.
        purpose: what uses it, in words.
        source: an address, or for ``hub`` the repository.
        home: see the module.
        license: "unknown" where none is stated.
        sha256: the whole hash, its first digits where only those are published, or "".
        mib: size in MiB where the publisher states it.
    """

    file: str
    purpose: str
    source: str
    home: str
    license: str = "unknown"
    sha256: str = ""
    mib: float | None = None

    def folder(self) -> Path:
        """The home's folder."""
        if self.home == "hub":
            from huggingface_hub import constants

            return Path(constants.HF_HUB_CACHE) / f"models--{self.source.replace('/', '--')}"
        hub, user = Path(torch.hub.get_dir()), Path.home() / ".cache"
        return {"checkpoints": hub / "checkpoints", "pyiqa": hub / "pyiqa", "pyiqa-clip": hub / "clip",
                "openai-clip": user / "clip", "image-reward": user / "ImageReward"}[self.home]  # fmt: skip

    def places(self) -> list[Path]:
        """Folders in the order they are looked into; names within the Hugging Face cache mean nothing elsewhere."""
        first = os.environ.get("RFSR_WEIGHTS") if self.home != "hub" else None
        return [Path(folder) for folder in (first, self.folder()) if folder]


def _pyiqa(file: str, purpose: str) -> WeightFile:
    kept = quote(file)  # pyiqa names its copies after the last part of the address, "+" as %2B
    return WeightFile(kept, purpose, f"{_PYIQA}/{kept}", "pyiqa", _NONCOMMERCIAL)


def _torchvision(file: str, purpose: str, mib: float) -> WeightFile:
    source, digits = f"https://download.pytorch.org/models/{file}", file.rsplit("-", 1)[1].removesuffix(".pth")
    return WeightFile(file, purpose, source, "checkpoints", sha256=digits, mib=mib)


def _openai(file: str, purpose: str, sha256: str, home: str) -> WeightFile:
    return WeightFile(file, purpose, f"{_OPENAI}/{sha256}/{file}", home, sha256=sha256)


def _timm(name: str, purpose: str) -> WeightFile:
    return WeightFile("model.safetensors", purpose, f"timm/{name}", "hub")


def _ram_list(file: str, purpose: str, sha256: str) -> WeightFile:
    source = f"https://raw.githubusercontent.com/cswry/SeeSR/8edecc71c4f3efa01cd26078f2e8dffd1ce80a6a/ram/data/{file}"
    return WeightFile(file, purpose, source, "checkpoints", "Apache 2.0", sha256)


FILES: dict[str, WeightFile] = {
    "vgg19": _torchvision("vgg19-dcbb9e9d.pth", "VGG19 (ImageNet) of the Gram loss", 548.051),
    "vgg16": _torchvision("vgg16-397923af.pth", "trunk of LPIPS-VGG and DISTS", 527.796),
    "alexnet": _torchvision("alexnet-owt-7be5be79.pth", "trunk of LPIPS", 233.087),
    "clip-rn50": _openai("RN50.pt", "CLIP of CLIP-IQA, CLIP-IQA+", _RN50, "pyiqa-clip"),
    "clip-vit-l14": _openai("ViT-L-14.pt", "CLIP of CLIP-IQA+ (ViT-L/14)", _VIT_L, "pyiqa-clip"),
    "clip-vit-l14-aesthetic": _openai("ViT-L-14.pt", "CLIP of the LAION aesthetic score", _VIT_L, "openai-clip"),
    "clipiqa+": _pyiqa("CLIP-IQA+_learned_prompts-603f3273.pth", "prompts of CLIP-IQA+"),
    "clipiqa+_rn50_512": _pyiqa("CLIPIQA+_RN50_512-89f5d940.pth", "CLIP-IQA+, fine-tuned RN50"),
    "clipiqa+_vitL14_512": _pyiqa("CLIPIQA+_ViTL14_512-e66488f2.pth", "CLIP-IQA+, fine-tuned ViT-L/14"),
    "image-reward": WeightFile("ImageReward.pt", "ImageReward", "https://huggingface.co/THUDM/ImageReward/resolve/main/"
                              "ImageReward.pt", "image-reward", "unknown (image-reward itself: Apache 2.0)"),
    "bert-vocabulary": WeightFile("vocab.txt", "tokenizer of ImageReward", "google-bert/bert-base-uncased", "hub"),
    "lpips": _pyiqa("LPIPS_v0.1_alex-df73285e.pth", "LPIPS (AlexNet), linear layers"),
    "lpips-vgg": _pyiqa("LPIPS_v0.1_vgg-a78928a0.pth", "LPIPS (VGG16), linear layers"),
    "dists": _pyiqa("DISTS_weights-f5e65c96.pth", "DISTS"),
    "maniqa": _pyiqa("ckpt_koniq10k.pt", "MANIQA (KonIQ-10k)"),
    "maniqa-kadid": _pyiqa("ckpt_kadid10k.pt", "MANIQA (KADID-10k)"),
    "maniqa-pipal": _pyiqa("MANIQA_PIPAL-ae6d356b.pth", "MANIQA (PIPAL)"),
    "maniqa-vit": _timm("vit_base_patch8_224.augreg2_in21k_ft_in1k", "trunk of MANIQA"),
    "musiq": _pyiqa("musiq_koniq_ckpt-e95806b9.pth", "MUSIQ (KonIQ-10k)"),
    "musiq-ava": _pyiqa("musiq_ava_ckpt-e8d3f067.pth", "MUSIQ (AVA)"),
    "musiq-paq2piq": _pyiqa("musiq_paq2piq_ckpt-364c0c84.pth", "MUSIQ (PaQ-2-PiQ)"),
    "musiq-spaq": _pyiqa("musiq_spaq_ckpt-358bb6af.pth", "MUSIQ (SPAQ)"),
    "laion_aes": _pyiqa("sac+logos+ava1-l14-linearMSE.pth", "LAION aesthetic score, linear layers"),
    "nima": _pyiqa("NIMA_InceptionV2_ava-b0c77c00.pth", "NIMA (AVA)"),
    "nima-trunk": _timm("inception_resnet_v2.tf_in1k", "trunk of NIMA"),
    "topiq_nr": _pyiqa("cfanet_nr_koniq_res50-9a73138b.pth", "TOPIQ without reference (KonIQ-10k)"),
    "topiq_fr": _pyiqa("cfanet_fr_kadid_res50-2c4cc61d.pth", "TOPIQ with reference (KADID-10k)"),
    "topiq-trunk": _timm("resnet50.a1_in1k", "trunk of TOPIQ"),
    "niqe": _pyiqa("niqe_modelparameters.mat", "NIQE"),
    "brisque": _pyiqa("brisque_svm_weights.pth", "BRISQUE"),
    "ram": WeightFile("ram_swin_large_14m.pth", "RAM: image tokens and tags", "https://huggingface.co/xinyu1205/"
                      "recognize_anything_model/resolve/main/ram_swin_large_14m.pth", "checkpoints"),
    "ram-tags": _ram_list("ram_tag_list.txt", "names of RAM's tags", _TAGS),
    "ram-thresholds": _ram_list("ram_tag_list_threshold.txt", "thresholds of RAM's tags", _THRESHOLDS),
}  # fmt: skip
METRIC_FILES: dict[str, tuple[str, ...]] = {  # what pyiqa reads to build a metric, by the metric's name there
    "lpips": ("alexnet", "lpips"),
    "lpips-vgg": ("vgg16", "lpips-vgg"),
    "maniqa": ("maniqa-vit", "maniqa"),
    "maniqa-kadid": ("maniqa-vit", "maniqa-kadid"),
    "maniqa-pipal": ("maniqa-vit", "maniqa-pipal"),
    "musiq": ("musiq",),
    "musiq-ava": ("musiq-ava",),
    "musiq-paq2piq": ("musiq-paq2piq",),
    "musiq-spaq": ("musiq-spaq",),
    "clipiqa": ("clip-rn50",),
    "clipiqa+": ("clip-rn50", "clipiqa+"),
    "clipiqa+_rn50_512": ("clip-rn50", "clipiqa+_rn50_512"),
    "clipiqa+_vitL14_512": ("clip-vit-l14", "clipiqa+_vitL14_512"),
    "laion_aes": ("clip-vit-l14-aesthetic", "laion_aes"),
    "nima": ("nima-trunk", "nima"),
    "topiq_nr": ("topiq-trunk", "topiq_nr"),
    "topiq_fr": ("topiq-trunk", "topiq_fr"),
    "dists": ("vgg16", "dists"),
    "niqe": ("niqe",),
    "brisque": ("brisque",),
}


def _named(name: str) -> WeightFile:
    if name not in FILES:
        raise ValueError(f"name must be one of {', '.join(FILES)}, got {name!r}")
    return FILES[name]


def find(name: str) -> Path | None:
    """The file of this name in `FILES`, unread, or None.

    Raises:
        ValueError: if there is no such name.
    """
    weight = _named(name)
    if weight.home == "hub":
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(weight.source, weight.file, cache_dir=weight.folder().parent)
        return Path(found) if isinstance(found, str) else None  # else None, or a mark that the hub has no such file
    return next((folder / weight.file for folder in weight.places() if (folder / weight.file).is_file()), None)


@cache
def _digest(path: Path, size: int, modified: int) -> str:
    return sha256(path)


def _verify(weight: WeightFile, path: Path) -> Path:
    if weight.sha256:
        status = path.stat()
        digest = _digest(path, status.st_size, status.st_mtime_ns)
        if not digest.startswith(weight.sha256):
            raise ValueError(
                f"{str(path)!r} is damaged or another file: its SHA-256 must start with {weight.sha256[:8]}, got "
                f"{digest[:8]}; fetch it again"
            )
    return path


def locate(name: str) -> Path:
    """The file of this name, its hash verified where one is known.

    Raises:
        FileNotFoundError: if it is nowhere; the sentence says which file to put where.
        ValueError: if there is no such name, or the file has another hash.
    """
    weight, path = _named(name), find(name)
    if path is None:
        raise FileNotFoundError(
            f"{weight.file} ({weight.purpose}) is not in {' or '.join(map(str, weight.places()))}; with a network, "
            f"`rfsr weights fetch {name}` gets it from {weight.source}"
        )
    return _verify(weight, path)


def missing(names: Iterable[str]) -> list[str]:
    """Those names whose files are nowhere."""
    return [name for name in names if find(name) is None]


def provide(name: str) -> Path:
    """Make sure that the package which reads this file finds it in its own cache, and verify the one it will read.

    A file that is only in ``RFSR_WEIGHTS`` gets a symbolic link there; one that the package has already stays.

    Raises:
        FileNotFoundError: if it is nowhere.
        ValueError: if there is no such name, or the file has another hash.
    """
    weight, found = _named(name), locate(name)
    if weight.home == "hub":
        return found
    own = weight.folder() / weight.file
    if own.is_symlink() and own.resolve() != found.resolve():
        own.unlink()
    if not own.exists():
        own.parent.mkdir(parents=True, exist_ok=True)
        own.symlink_to(found.resolve())
    return _verify(weight, own)


def fetch(name: str) -> Path:
    """Download the file of this name unless it is there, aside and then by one rename, and verify it.

    It goes into the folder ``RFSR_WEIGHTS`` names, else into its home; files of ``hub`` into the Hugging Face cache.
    huggingface_hub downloads what comes from its hub and compares the length, torch.hub the rest, all of which has a
    published hash.

    Raises:
        ConnectionError: if it cannot be reached or breaks off; nothing has changed.
        ValueError: if there is no such name, or what arrived has another hash.
    """
    weight = _named(name)
    if find(name) is not None:
        return locate(name)
    if weight.home == "hub":
        return _from_hub(weight, weight.source, weight.file, cache_dir=weight.folder().parent)
    target = weight.places()[0] / weight.file
    target.parent.mkdir(parents=True, exist_ok=True)
    if on_hub := re.fullmatch(r"https://huggingface\.co/([^/]+/[^/]+)/resolve/main/(.+)", weight.source):
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{weight.file}.") as aside:
            _from_hub(weight, on_hub[1], unquote(on_hub[2]), local_dir=aside).replace(target)
        return target
    try:
        with _patience(30):
            torch.hub.download_url_to_file(weight.source, str(target), hash_prefix=weight.sha256)
    except RuntimeError as error:
        raise ValueError(f"{weight.file} from {weight.source} is damaged or another file: {error}") from error
    except (URLError, TimeoutError, ConnectionError) as error:
        raise _unreachable(weight, error) from error
    return target


def _from_hub(weight: WeightFile, repository: str, file: str, **where) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    try:
        # asked first and once: hf_hub_download would try for half a minute, and say so many times
        get_hf_file_metadata(hf_hub_url(repository, file))
        return Path(hf_hub_download(repository, file, **where))
    except Exception as error:  # of requests or of httpx, by the release of huggingface_hub
        if isinstance(error, OSError) and error.errno in _DISK:
            raise
        raise _unreachable(weight, error) from error


def _unreachable(weight: WeightFile, error: Exception) -> ConnectionError:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return ConnectionError(
        f"{weight.file} could not be downloaded from {weight.source} ({reason}); download it where there is a network "
        f"and put it into {weight.places()[0]}"
    )


@contextlib.contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """Give up on a silent network after that long: torch.hub sets no limit of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
