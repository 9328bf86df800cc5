"""Whatever computes on a GPU does so on a device that is not the CPU, which every machine has: nothing is left behind.

The device computes on the CPU, so what it gives must be what the CPU gives. It refuses what CUDA refuses: operands on
two devices, NumPy, a generator of the CPU.
"""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image
from torch.utils import cpp_extension

from rfsr_ext.data.degradation import DEGRADATIONS
from rfsr_ext.rewards import REWARDS
from tests.launching import ROOT, environment
from tests.models.released.reduced import REDUCED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux"),
]

FEW = {"degradation": "mini", "crop_size": 64, "batch_size": 2, "validation_size": 64, "validation_crops": 2}
MEASURED = {"iterations": 2, "validate_every": 2, "checkpoint_every": 1}
DISTANCE = {"validation_distance": "vgg-random"}
SETTINGS = {
    "rfsr": FEW | MEASURED | {
        "num_inference_steps": 3, "structure_window": [1, 3], "reward_window": [1, 3], "lambda_style": 10.0,
        "allow_overlap": True,
        "rewards": {"mini-iqa": 0.05, "mini-preference": 0.005}, "vgg_weights": "random", "balance_rewards": True,
        "frozen_dtype": "bfloat16", "offload_reference": True,
    },
    "kl": FEW | MEASURED | {
        "num_inference_steps": 3, "structure_window": [1, 3], "reward_window": [1, 3], "structure_level": 2,
        "allow_overlap": True,
        "rewards": {"mini-iqa": {"weight": 0.05, "normalize": True}}, "style_loss": "kl", "guidance_scale": 2.0,
        "gradient_accumulation_steps": 2, "gradient_checkpointing": True, "lora_rank": 4,
    },
    "ccsr": FEW | {
        "method": "ccsr",
        "model_options": {"num_inference_steps": 6, "spacing": "ccsr-v2", "t_max": 0.6667, "t_min": 0.5},
        "stage1": MEASURED | DISTANCE,
        "stage2": MEASURED | DISTANCE | {
            "reconstruction_loss": "l1", "perceptual_loss": "vgg-random", "discriminator_channels": 8,
            "discriminator_norm": "group", "adaptive_weight": True, "adversarial_start": 1,
        },
    },
    "dp2o": FEW | MEASURED | {
        "method": "dp2o", "num_inference_steps": 3, "images": 2, "candidates": 4, "selected": 1, "report_crops": 2,
        "full_reference": ["psnr", "ssim"], "no_reference": ["mini-iqa", "mini-preference"],
    },
    "ways": {
        "iterations": 2, "seeds": 1, "crops": 4, "size": 64, "results": 2, "full_reference": ["psnr"],
        "no_reference": ["mini-iqa"], "held_out": ["judge"], "ways": {"RFSR": ["rfsr.yaml"]},
        "settings": {"validation_crops": 2, "validate_every": 100, "checkpoint_every": 100},
    },
}  # fmt: skip
QUICKLY = ("--model-option", "num_inference_steps=2")
COMMANDS = {
    "evaluate": [
        ("evaluate", "mini", "--crops", "2", "--seeds", "2", "--steps", "--stability", *QUICKLY),
        ("evaluate", "mini", "--crops", "2", "--best-of", "2", "--metrics", "psnr,judge", *QUICKLY),
        ("evaluate", "mini", "--pairs", "lr", "gt", "--seeds", "2", "--stability", *QUICKLY),
        ("evaluate", "gt", "--gt", "gt", "--metrics", "ssim,judge"),
        ("upscale", "lr", "--output", "up", "--steps", "2", "--tile", "64"),
    ],
    "train": [
        ("train", "kl.yaml"),
        ("train", "kl.yaml", "--set", "iterations=3"),
        ("upscale", "lr", "--output", "up", "--model", "kl/model", "--steps", "2"),
        ("ablate", "rfsr.yaml", "--variants", "rfsr", "--seeds", "1", "--crops", "2"),
        ("compare", "ways.yaml"),
    ],
    "other methods": [
        ("preferences", "sample", "dp2o.yaml"),
        ("preferences", "score", "dp2o.yaml"),
        ("preferences", "show", "dp2o.yaml"),
        ("train", "dp2o.yaml"),
        ("train", "ccsr.yaml"),
    ],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run a script of `tests.elsewhere` with the device; the lines of JSON that it printed, and all that it printed."""
    library = tmp_path_factory.mktemp("device") / "elsewhere.so"
    places = [f"-I{path}" for path in cpp_extension.include_paths()]
    places += [f"-L{path}" for path in cpp_extension.library_paths()]
    subprocess.run(
        ["g++", "-O0", "-std=c++20", "-fPIC", "-shared", "-w", ROOT / "tests/elsewhere/device.cpp", "-o", library,
         *places, "-ltorch", "-ltorch_cpu", "-lc10"],
        check=True,
    )  # fmt: skip

    def run(script: str, argument: str, folder) -> tuple[list[dict], str]:
        done = subprocess.run(
            [sys.executable, "-m", f"tests.elsewhere.{script}", library, argument],
            env=environment() | {"RFSR_DEBUG": "1"}, cwd=folder, capture_output=True, text=True, timeout=1200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-5000:]
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")], done.stdout

    return run


@pytest.mark.parametrize("group", COMMANDS)
def test_commands(run, group, tmp_path):
    for name, settings in SETTINGS.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings | {"output_dir": name}))
    for folder, side in (("lr", 16), ("gt", 64)):
        (tmp_path / folder).mkdir()
        pixels = np.random.default_rng(side).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
        for number, image in enumerate(pixels):
            Image.fromarray(image).save(tmp_path / folder / f"{number}.png")
    done, _ = run("commands", json.dumps(COMMANDS[group]), tmp_path)
    assert [line["ended"] for line in done] == [0] * len(COMMANDS[group])
    assert all(line["computed"] > 0 for line in done)


def test_demo_in_small(run, tmp_path):
    command = ("demo", "--output", "demo", "--iterations", "2", "--seed", "1", "--crops", "2")  # one in each window
    (done,), printed = run("commands", json.dumps([command]), tmp_path)
    assert done["ended"] == 0 and done["computed"] > 0
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert set(report["means"]) == {"bicubic", "base", "fine-tuned", "without style loss"}
    assert {"psnr", "ssim", "mini-iqa", "mini-preference", "judge"} <= set(report["minus_base"]["fine-tuned"])
    assert "random" in " ".join(report["stand_ins"])
    for name in ("comparison.png", "curves.png"):
        with Image.open(tmp_path / "demo" / name) as image:
            assert min(image.size) > 300
    assert "fine-tuned" in printed


def test_models_rewards_losses_and_degradations(run, tmp_path):
    lines, _ = run("objects", str(tmp_path), tmp_path)
    done = {line["name"]: line for line in lines}
    assert done.keys() >= {*REDUCED, *REWARDS, *DEGRADATIONS} - {"mini"}
    for name, line in done.items():
        assert line["computed"] > 0, line
        assert line["error"] < (1e-3 if name in DEGRADATIONS else 5e-5), line
