"""Many results for one LR image from other noise: made and kept (DP2O-SR, section 4.2), and seen as pictures."""

import contextlib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rfsr_ext.data.candidates import candidate_files, write_candidates
from rfsr_ext.data.images import from_uint8, to_image, to_tensor
from rfsr_ext.data.manifest import Manifest, versions
from rfsr_ext.models import ISRModel
from rfsr_ext.processes import from_main, is_main, split_map
from rfsr_ext.sampling.color import COLOR_FIXES
from rfsr_ext.sampling.rollout import generators, inference_condition, trajectory

__all__ = ["decode_candidates", "sample_candidates"]


def _in_8_bits(images: Tensor) -> Tensor:
    """``[…, 3, H, W]`` in [0, 1] as they would come from a PNG."""
    return (images.float().clamp(0, 1) * 255).round() / 255


@torch.no_grad()
def sample_candidates(
    model: ISRModel,
    dataset: Dataset,
    folder: str | Path,
    images: int,
    candidates: int,
    *,
    seed: int = 0,
    batch_size: int = 8,
    num_inference_steps: int | None = None,
    source: Mapping[str, Any] | None = None,
) -> None:
    """Sample M candidates for each of the first LR images of a dataset; the same call again goes on where it stopped.

    The noise of candidate m of image i is `generators` ``(seed, [i + m·2³²])``, whoever makes it.  Several processes
    share the images, and the main one writes.  See `rfsr_ext.data.candidates` for the files.

    Args:
        model: as it stands, by the values of its recipe.
        dataset: of samples, indexable by any non-negative integer.
        folder: for these candidates alone.
        images: number of LR images.
        candidates: M.
        seed: of the noise.
        batch_size: candidates at once.
        num_inference_steps: the recipe's by default.
        source: plain values that say which data this is; a folder of other data is refused.

    Raises:
        ValueError: if the folder holds candidates that were made otherwise.
        FileExistsError, RuntimeError: see `rfsr_ext.data.manifest.Manifest`.
    """
    settings = {
        "model": model.fingerprint(),
        "recipe": repr(model.recipe),
        "num_inference_steps": num_inference_steps,
        "images": images,
        "candidates": candidates,
        "seed": seed,
        "source": dict(source or {}),
        "versions": versions(),
    }
    names = [name for group in range(images) for name in candidate_files(group)]
    with Manifest(folder, settings, names) if is_main() else contextlib.nullcontext() as manifest:
        todo = from_main([] if manifest is None else _missing(manifest, images))

        def make(group: int) -> tuple[Tensor, Tensor, Tensor, str]:
            return _group(model, dataset[group], group, candidates, seed, batch_size, num_inference_steps)

        for group, content in zip(todo, split_map(make, todo, "sample candidates"), strict=True):
            if manifest is not None:
                for name, write in write_candidates(group, *content).items():
                    manifest.add(name, {"group": group}, write)
    from_main(None)  # all is written before anybody goes on


def _missing(manifest: Manifest, images: int) -> list[int]:
    """Groups of which a file is not there; a file that is not to be replaced is noticed in any of them."""
    return [
        group for group in range(images)
        if not all([manifest.has(name, {"group": group}) for name in candidate_files(group)])
    ]  # fmt: skip


def _group(
    model: ISRModel, sample, group: int, count: int, seed: int, batch_size: int, num_inference_steps: int | None
) -> tuple[Tensor, Tensor, Tensor, str]:
    """LR image and ground truth in 8 bits, latents of all candidates, and the prompt that the model was given."""
    lr, gt = (to_tensor(from_uint8(to_image(sample[key]))) for key in ("lr", "gt"))
    condition, guidance_scale = inference_condition(model, lr[None].to(model.device), [sample["prompt"]])
    parts = []
    for first in range(0, count, batch_size):
        numbers = range(first, min(first + batch_size, count))
        noise = generators(seed, [group + (number << 32) for number in numbers])
        copies = condition.tiles(functools.partial(_copies, count=len(noise)), len(noise))
        *_, (_, latents) = trajectory(model, copies, noise, num_inference_steps, guidance_scale)
        parts.append(latents.half().cpu())
    return lr, gt, torch.cat(parts), condition.prompts[0]


def _copies(x: Tensor, count: int) -> Tensor:
    return x.expand(count, *x.shape[1:])


@torch.no_grad()
def decode_candidates(model: ISRModel, latents: Tensor, lr: Tensor, batch_size: int = 8) -> Tensor:
    """Candidates ``[M, C, h, w]`` of one LR image ``[3, h, w]`` as a user sees them: colors corrected, in 8 bits.

    Returns:
        ``[M, 3, H, W]`` in [0, 1].
    """
    fix = COLOR_FIXES[model.recipe.color_fix]
    reference = model.first_stage(lr[None].to(model.device, model.dtype)).float()
    parts = []
    for part in latents.split(batch_size):
        images = model.decode(part.to(model.device, model.dtype)).float()
        parts.append(_in_8_bits(fix(images, reference.expand_as(images))))
    return torch.cat(parts)
