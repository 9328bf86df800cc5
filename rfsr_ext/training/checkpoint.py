"""Checkpoints of a run: one safetensors file each, complete or absent, the newest few kept."""

import hashlib
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rfsr_ext.files import load_tensors, save_tensors

__all__ = ["CheckpointFolder", "fingerprint"]


def fingerprint(modules: dict[str, nn.Module]) -> str:
    """Tells one base model from another: a SHA-256 over names, shapes and the first values of every parameter."""
    digest = hashlib.sha256()
    for group, module in modules.items():
        for name, parameter in module.named_parameters():
            digest.update(f"{group}.{name}{list(parameter.shape)}".encode())
            digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


class CheckpointFolder:
    """``iteration-000100.safetensors`` files in one folder.

    A checkpoint is written aside and renamed, so a run killed at any moment leaves whole files only.

    Args:
        folder: created when first needed.
        keep: how many of the newest to keep.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder, self.keep = Path(folder), keep

    def paths(self) -> list[Path]:
        """Checkpoints, oldest first."""
        return sorted(
            p for p in self.folder.glob("iteration-*.safetensors") if re.fullmatch(r"iteration-\d{6,}", p.stem)
        )

    def save(self, iteration: int, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Path:
        """Write one and remove those older than the newest ``keep``, with whatever a killed run left half written."""
        path = self.folder / f"iteration-{iteration:06d}.safetensors"
        save_tensors(path, tensors, metadata | {"iteration": iteration})
        for old in [*self.paths()[: -self.keep], *self.folder.glob(".*.partial")]:
            old.unlink(missing_ok=True)
        return path

    def load_newest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest checkpoint, or None if there is none."""
        paths = self.paths()
        return load_tensors(paths[-1]) if paths else None
