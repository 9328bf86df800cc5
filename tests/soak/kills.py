"""Processes killed at random moments: whatever they had finished is still there and whole, and the next one goes on.

Each trial forks a process that works in a folder of its own, kills it, looks at what is left and lets another one end
the work.  Trials take turns over training, saving, upscaling, sampling over pairs and degrading a folder.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from rfsr_ext.cli import upscale as cli_upscale
from rfsr_ext.cli.upscale import upscale_files
from rfsr_ext.data import Degradation, Root
from rfsr_ext.data.degraded import degrade_folder
from rfsr_ext.evaluation import evaluate_pairs
from rfsr_ext.files import load_tensors, replace_folder
from rfsr_ext.metrics import Suite, get_preset
from rfsr_ext.rewards import WeightedReward
from rfsr_ext.training import RFSRConfig, RFSRTrainer
from tests.tiny import PixelModel
from tests.training.conftest import Brightness, Pixels, TinyData

ITERATIONS, PICTURES, FILES = 30, 12, 8
SIDES = {"lr": 8, "gt": 32}


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="rfsr-soak-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fork(work: Callable[[Callable[[int], None]], None]) -> tuple[int, int]:
    """Start a process that does the work; gives its number and a pipe of the steps that it has reported as done."""
    reader, writer = os.pipe()
    process = os.fork()
    if process:
        os.close(writer)
        return process, reader
    code = 1
    try:
        tqdm.set_lock(threading.RLock())  # its own is one for all processes, and would stay with one that is killed
        os.close(reader)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        error = os.dup(2)
        os.dup2(null, 2)
        try:
            work(lambda step: os.write(writer, step.to_bytes(4, "little")))
            code = 0
        except BaseException:
            os.write(error, traceback.format_exc().encode())
    finally:
        os._exit(code)


def steps_done(reader: int) -> int:
    """The last step that a dead process reported."""
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    return int.from_bytes(told[-4:], "little") if told else 0


def to_the_end(work: Callable[[Callable[[int], None]], None]) -> None:
    process, reader = fork(work)
    steps_done(reader)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0, "what was left could not be gone on from"


# -- what is done, and what must be left of it -------------------------------------------------------------------------


def train(folder: Path, told: Callable[[int], None]) -> None:
    data = TinyData()
    values = {
        "crop_size": 32, "structure_window": [1, 2], "reward_window": [4, 5], "lambda_structure": 1.0,
        "style_loss": "kl", "learning_rate": 1e-3, "ema_decay": 0.5, "validate_every": 7, "checkpoint_every": 1,
        "iterations": ITERATIONS, "batch_size": 1, "output_dir": str(folder / "run"),
    }  # fmt: skip
    trainer = RFSRTrainer(
        RFSRConfig.from_dict(values), Pixels(), dataset=data, rewards=[WeightedReward(Brightness(), 1.0)],
        validation=[data[500]], judges={},
    )  # fmt: skip
    save = trainer.loop.checkpoints.save

    def tell(iteration: int, *rest):
        path = save(iteration, *rest)
        told(iteration)
        return path

    trainer.loop.checkpoints.save = tell
    trainer.train()


def look_at_training(folder: Path, done: int) -> None:
    kept = sorted((folder / "run" / "checkpoints").glob("iteration-*.safetensors"))
    newest = 0
    for path in kept:
        _, metadata = load_tensors(path)  # whole, or an error
        newest = metadata["iteration"]
        assert [row["iteration"] for row in metadata["history"]] == list(range(1, newest + 1))
    assert newest >= done, f"iteration {done} was saved, {newest} is left"


def end_of_training(folder: Path) -> dict[str, bytes]:
    """Weights of the end; a checkpoint's metadata hold the time that was taken."""
    return {
        "model": (folder / "run" / "model" / "network.safetensors").read_bytes(),
        "checkpoint": b"".join(
            t.numpy().tobytes()
            for _, t in sorted(
                load_tensors(folder / f"run/checkpoints/iteration-{ITERATIONS:06}.safetensors")[0].items()
            )
        ),
    }


def save(folder: Path, told: Callable[[int], None]) -> None:
    """One folder after another in the same place, beside somebody's notes."""
    for version in range(1, 30):
        with replace_folder(folder / "model") as new:
            for i in range(FILES):
                path = new / f"part{i % 3}" / f"{i}.bin"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(version.to_bytes(4, "little") * 1000)
        told(version)


def look_at_saving(folder: Path, done: int) -> None:
    with contextlib.suppress(InterruptedError), replace_folder(folder / "model"):  # the next call mends what was left
        raise InterruptedError
    assert (folder / "model" / "notes.md").read_text() == "mine"
    files = sorted((folder / "model").rglob("*.bin"))
    contents = {path.read_bytes() for path in files}
    assert len(contents) <= 1, "files of two savings are mixed"
    if done or contents:
        assert len(files) == FILES
        (content,) = contents
        version = int.from_bytes(content[:4], "little")
        assert content == version.to_bytes(4, "little") * 1000 and version >= done, "a saving is lost"


def end_of_saving(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "model").rglob("*.bin")}


def given(folder: Path) -> None:
    """Pictures and notes of the user's."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "notes.md").write_text("mine")
    for name, side in SIDES.items():
        (folder / name).mkdir(parents=True)
        for i in range(PICTURES):
            Image.fromarray(pixels(i, side)).save(folder / name / f"{i:02}.png")


def pixels(i: int, side: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (side, side, 3), np.uint8)


def upscaling(folder: Path, told: Callable[[int], None]) -> None:
    cli_upscale.load_model = lambda *_, **__: PixelModel()
    upscale_files([folder / "lr"], "mini", folder / "out", overwrite=True)
    told(1)


def sampling(folder: Path, told: Callable[[int], None]) -> None:
    root = Root(lr=str(folder / "lr"), gt=str(folder / "gt"))
    evaluate_pairs(PixelModel(), root, Suite(get_preset("basic")), folder / "out", name="tiny")
    told(1)


def degrading(folder: Path, told: Callable[[int], None]) -> None:
    degrade_folder(Root(str(folder / "gt")), Degradation.preset("mini"), 0, folder / "out", progress=False)
    told(1)


def look_at_pictures(folder: Path, done: int) -> None:
    """No picture is half written, and those that were given are as they were."""
    found = [path for path in (folder / "out").rglob("*.png") if not path.name.startswith(".")]
    for path in found:
        with Image.open(path) as image:
            image.load()
    for manifest in (folder / "out").rglob("manifest.json"):
        json.loads(manifest.read_text())
    for name, side in SIDES.items():
        for i in range(PICTURES):
            with Image.open(folder / name / f"{i:02}.png") as image:
                assert np.array_equal(np.asarray(image), pixels(i, side)), "a picture that was given has changed"
    if done:
        assert len(found) >= PICTURES


def end_of_pictures(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in (folder / "out").rglob("*.png") if p.name[0] != "."}


KINDS = {
    "training": (train, look_at_training, end_of_training),
    "saving": (save, look_at_saving, end_of_saving),
    "upscaling": (upscaling, look_at_pictures, end_of_pictures),
    "sampling": (sampling, look_at_pictures, end_of_pictures),
    "degrading": (degrading, look_at_pictures, end_of_pictures),
}
_reference: dict[str, tuple[dict[str, bytes], float]] = {}


def reference(kind: str) -> tuple[dict[str, bytes], float]:
    """What comes of work that nobody disturbs, and the seconds it takes."""
    if kind not in _reference:
        work, _, end = KINDS[kind]
        with scratch() as folder:
            given(folder)
            began = time.monotonic()
            to_the_end(lambda told: work(folder, told))
            _reference[kind] = end(folder), time.monotonic() - began
    return _reference[kind]


def trial(i: int) -> None:
    """Kill number i.

    Raises:
        AssertionError: if something is lost, mixed or half written, or the end is another.
    """
    torch.set_num_threads(1)
    kind = list(KINDS)[i % len(KINDS)]
    work, look, end = KINDS[kind]
    wanted, seconds = reference(kind)
    rng = random.Random(i)
    with scratch() as folder:
        for attempt in range(20):  # until one was killed before its end, however much faster than the first it runs
            given(folder)
            process, reader = fork(lambda told: work(folder, told))
            time.sleep(rng.uniform(0, seconds / 2**attempt))
            os.kill(process, rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
            killed = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) < 0
            look(folder, steps_done(reader))
            if killed:
                break
            shutil.rmtree(folder)
        else:
            raise AssertionError("it could not be killed before its end")
        to_the_end(lambda told: work(folder, told))
        assert end(folder) == wanted, "the end is another than without a kill"


if __name__ == "__main__":
    for number in range(int(sys.argv[1]), int(sys.argv[2])):
        trial(number)
