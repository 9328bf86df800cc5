"""Processes as a user launches them: by ``accelerate launch`` and a configuration file of ``docs/``, here on CPUs."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIGURATIONS = ROOT / "docs" / "accelerate"


def environment() -> dict[str, str]:
    """This one without a GPU and without what a launcher before may have left."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE", "FSDP"))}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(configuration: str, *command, options: tuple = ()) -> subprocess.Popen:
    """A launcher with one of the configuration files; ``options`` are the launcher's own."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGURATIONS / configuration]
    return subprocess.Popen(
        [*map(str, (*launcher, *options, *command))],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


def start_alone(script: str | Path, *arguments) -> subprocess.Popen:
    """A script in a process of its own, which can be killed; there is no launcher between."""
    return subprocess.Popen(
        [sys.executable, *map(str, (script, *arguments))],
        env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended_well(process: subprocess.Popen) -> str:
    """Wait for it; gives what it printed."""
    printed, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors[-5000:]
    return printed
