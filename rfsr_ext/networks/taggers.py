"""Whatever can say what an image shows, by name: images ``[N, 3, H, W]`` in [0, 1] to N texts."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rfsr_ext.importing import import_object, is_import_name
from rfsr_ext.networks.ram import RAM
from rfsr_ext.weights.reading import reason

__all__ = ["load_tagger"]


def load_tagger(
    name: str, weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> Callable[[Tensor], list[str]]:
    """A tagger by name; nothing is downloaded.

    Args:
        name: "ram" for sharp photographs, "dape" for degraded ones (see `RAM`); ``hf:NAME_OR_FOLDER`` of a captioner
            of transformers such as BLIP; or ``package.module:Name`` of your own, a function from images to texts or a
            class whose objects are called like one.
        weights: the folder of RAM's files, see `RAM.from_released`.
        device: where it computes; your own decides itself.

    Raises:
        FileNotFoundError: if a file of RAM is missing.
        ValueError: if the name has another form, or it cannot be opened or gives no tags.
    """
    if name in ("ram", "dape"):
        ram = RAM.from_released(() if weights is None else weights, dape=name == "dape")
        if not ram.has_tags:
            ram.tags(torch.zeros(1, 3, 1, 1))  # says what is missing
        torch.nn.Module.to(ram, device)
        return lambda images: ram.tags(images.to(device))
    if name.startswith("hf:"):
        return _captioner(name.removeprefix("hf:"), device)
    if not is_import_name(name):
        raise ValueError(f"tagger must be ram, dape, hf:NAME_OR_FOLDER or package.module:Name, got {name!r}")
    found = import_object(name, "tagger")
    if not isinstance(found, type):
        return found
    made = found()
    if not callable(made):
        raise ValueError(f"tagger {name!r} must have objects that can be called with images, got a {found.__name__}")
    return made


def _captioner(source: str, device: torch.device | str) -> Callable[[Tensor], list[str]]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(source, local_files_only=True)
        network = AutoModelForImageTextToText.from_pretrained(source, local_files_only=True).eval().to(device)
    except Exception as error:  # whatever transformers finds wrong
        raise ValueError(
            f"captioner {source!r} cannot be opened from the disk ({reason(error, 200)}); fetch it first, or give its "
            "folder"
        ) from error

    @torch.no_grad()
    def describe(images: Tensor) -> list[str]:
        pictures = [image.mul(255).round().byte().permute(1, 2, 0).cpu().numpy() for image in images.float()]
        inputs = processor(images=pictures, return_tensors="pt").to(device)
        texts = processor.batch_decode(network.generate(**inputs), skip_special_tokens=True)
        return [text.strip() for text in texts]

    return describe
