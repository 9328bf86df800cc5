"""Candidates on disk: several results for each LR image that one model made from other noise.

A folder with ``manifest.json`` and for every LR image a group of three files: ``000012/lr.png``, ``000012/gt.png`` and
``000012/latents.safetensors``, the M final latents ``[M, C, h, w]`` in half precision with the prompt the model was
given.  At 512 pixels a candidate takes 32 KiB with Stable Diffusion and 128 KiB with FLUX, less than its PNG.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from rfsr_ext.data.images import read_image, to_image, to_tensor
from rfsr_ext.data.manifest import MANIFEST
from rfsr_ext.files import save_tensors

__all__ = ["CandidateFolder", "candidate_files", "write_candidates"]

LATENTS, LR, GT = "latents.safetensors", "lr.png", "gt.png"


def candidate_files(group: int) -> tuple[str, ...]:
    """A group's files, by their paths within the folder."""
    return tuple(f"{group:06}/{name}" for name in (LR, GT, LATENTS))


def write_candidates(
    group: int, lr: Tensor, gt: Tensor, latents: Tensor, prompt: str
) -> dict[str, Callable[[Path], None]]:
    """By path within the folder what writes a group's file to the path it is given, see `Manifest.add`.

    Images are ``[3, h, w]`` and ``[3, H, W]`` in [0, 1], latents ``[M, C, h, w]``.
    """
    images = {LR: to_image(lr), GT: to_image(gt)}

    def write(name: str) -> Callable[[Path], None]:
        if name == LATENTS:
            return lambda path: save_tensors(path, {"latents": latents.half()}, {"prompt": prompt})
        return lambda path: Image.fromarray(images[name]).save(path, format="PNG")

    return {name: write(Path(name).name) for name in candidate_files(group)}


class CandidateFolder:
    """Reads what `rfsr_ext.sampling.sample_candidates` wrote.

    Args:
        folder: with all its groups.

    Attributes:
        candidates: M, per group.

    Raises:
        FileNotFoundError: if there is no such folder, or a group is not complete.
        ValueError: if it holds something else.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            self.candidates, self._groups = int(manifest["settings"]["candidates"]), int(manifest["settings"]["images"])
            self._files: dict[str, dict[str, Any] | None] = manifest["files"]
        except FileNotFoundError:
            raise FileNotFoundError(
                f"folder {str(self.folder)!r} holds no candidates; `rfsr preferences sample` makes them"
            ) from None
        except (OSError, ValueError, TypeError, KeyError):
            raise ValueError(f"{str(path)!r} is no manifest of candidates; give another folder") from None
        for group in range(len(self)):
            for name in candidate_files(group):
                if self._files.get(name) is None or not (self.folder / name).is_file():
                    raise self._gone(name)

    def _gone(self, name: str) -> FileNotFoundError:
        return FileNotFoundError(
            f"candidates {str(self.folder / name)!r} are not there; `rfsr preferences sample` makes them (again)"
        )

    def __len__(self) -> int:
        return self._groups

    def digest(self, group: int) -> str:
        """SHA-256 of the group's latents as they were written."""
        return (self._files[f"{group:06}/{LATENTS}"] or {})["sha256"]

    def latents(self, group: int, chosen: Sequence[int] | None = None) -> tuple[Tensor, str]:
        """Latents ``[len(chosen), C, h, w]`` of some candidates, all by default, in half precision, and the prompt.

        Raises:
            FileNotFoundError: if the file has gone.
            ValueError: if it is damaged or another.
        """
        name = f"{group:06}/{LATENTS}"
        try:
            with safe_open(self.folder / name, framework="pt") as file:  # reads what is chosen alone
                stored = file.get_slice("latents")
                if stored.get_shape()[0] != self.candidates:
                    raise ValueError(f"it holds {stored.get_shape()[0]}")
                numbers = range(self.candidates) if chosen is None else chosen
                return torch.stack([stored[i] for i in numbers]), json.loads(file.metadata()["json"])["prompt"]
        except FileNotFoundError:
            raise self._gone(name) from None
        except Exception as error:
            raise ValueError(
                f"{str(self.folder / name)!r} must hold {self.candidates} candidates ({error}); delete it and run "
                f"`rfsr preferences sample` again"
            ) from error

    def images(self, group: int) -> tuple[Tensor, Tensor]:
        """LR image ``[3, h, w]`` and ground truth ``[3, H, W]`` in [0, 1].

        Raises:
            FileNotFoundError: if a file has gone.
        """
        return self._image(group, LR), self._image(group, GT)

    def lr(self, group: int) -> Tensor:
        """The LR image alone."""
        return self._image(group, LR)

    def _image(self, group: int, name: str) -> Tensor:
        try:
            return to_tensor(read_image(self.folder / f"{group:06}/{name}"))
        except FileNotFoundError:
            raise self._gone(f"{group:06}/{name}") from None
