"""The one training loop behind every stage of ``rfsr mini build``: seeded, resumable, with a progress bar."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from rfsr_ext.files import load_tensors, save_tensors
from rfsr_ext.training.state import TrainingState

__all__ = ["fit"]

logger = logging.getLogger(__name__)


def _batches(dataset: Dataset, first: int, last: int, batch_size: int) -> Iterator[dict]:
    indices = range(first * batch_size, last * batch_size)
    return iter(DataLoader(dataset, batch_size, sampler=indices, num_workers=1, prefetch_factor=4))


def fit(
    name: str,
    modules: dict[str, nn.Module],
    dataset: Dataset,
    loss: Callable[[dict, torch.Generator], Tensor],
    folder: Path,
    *,
    iterations: int,
    batch_size: int,
    learning_rate: float,
    ema_decay: float = 0.999,
    seed: int = 0,
    bf16: bool = True,
    device: torch.device | str = "cpu",
    checkpoint_every: int = 200,
) -> float:
    """Train ``modules`` to minimise ``loss(batch, generator)`` with AdamW and a cosine schedule, then load their EMA.

    Iteration k sees samples ``k·batch_size …`` of ``dataset`` and a generator seeded with ``(seed, k)``, so that a run
    that was interrupted goes on as if it had not been.  Its state is kept in ``folder/<name>.safetensors``.

    Returns:
        Seconds spent, summed over all interrupted runs.
    """
    path = folder / f"{name}.safetensors"
    for module in modules.values():
        module.requires_grad_(True).train().to(device)
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    state = TrainingState(modules, optimizer, ema_decay)
    done, seconds = 0, 0.0
    if path.is_file():
        tensors, metadata = load_tensors(path)
        if metadata["iterations"] == iterations:
            done, seconds = metadata["done"], metadata["seconds"]
            state.load(tensors, done)
            logger.info("%s: going on from iteration %d", name, done)
        else:
            logger.warning("%s: starting again, %s was of %d iterations", name, path, metadata["iterations"])
    started, running = time.monotonic() - seconds, None
    progress = tqdm(range(done, iterations), initial=done, total=iterations, desc=name, mininterval=5)
    batches = _batches(dataset, done, iterations, batch_size)
    for k in progress:
        rise, fall = min(1.0, (k + 1) / 100), 0.5 * (1 + math.cos(math.pi * k / iterations))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rise * max(fall, 0.01)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + k)
        batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in next(batches).items()}
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            value = loss(batch, generator)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if norm.isfinite():
            optimizer.step()
        state.ema.step(parameters)
        running = value.item() if running is None else 0.98 * running + 0.02 * value.item()
        progress.set_postfix(loss=f"{running:.4f}", refresh=False)
        if (k + 1) % checkpoint_every == 0 or k + 1 == iterations:
            seconds = time.monotonic() - started
            save_tensors(path, state.tensors(), {"done": k + 1, "iterations": iterations, "seconds": seconds})
    state.ema.copy_to(parameters)
    for module in modules.values():
        module.requires_grad_(False).eval()
    return seconds
