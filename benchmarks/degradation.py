"""Our degradation of a batch against the public code's, side by side.

``python -m benchmarks.degradation BASICSR`` prints a table per preset and writes
``benchmarks/results/degradation-<device>.md`` and ``.json``.  BASICSR is a checkout of
https://github.com/XPixelGroup/BasicSR, of which three modules are read; they need opencv-python-headless.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional
from torch import Tensor

from benchmarks import measure, report
from rfsr_ext.data import Degradation, load_photograph
from rfsr_ext.data.degradation.choices import Choices, RoundChoices
from rfsr_ext.data.degradation.kernels import Kernel
from rfsr_ext.data.images import to_tensor
from rfsr_ext.evaluation.ways import markdown_rows

PRESETS = ("realesrgan-a", "realesrgan-b")
ABOUT = """\
Written by `python -m benchmarks.degradation`; do not edit. All contestants of a preset took turns in one run, each
round with other seeds; both implementations are given the same choices, so that they blur, resize and add noise equally
often. Public is BasicSR's code in the order of SeeSR's: every sample by itself, or the batch at once, for which the
public code draws one resize factor, one mode and one kind of noise; there they are those of the batch's first sample.
Times are medians over rounds; processor time does not count what else the machine does."""


def public_code(folder: Path) -> SimpleNamespace:
    """BasicSR's functions, without the package around them.

    It takes ``rgb_to_grayscale`` from a module that torchvision 0.17 left out; where it is gone the public one serves.
    """
    try:
        importlib.import_module("torchvision.transforms.functional_tensor")
    except ModuleNotFoundError:
        sys.modules["torchvision.transforms.functional_tensor"] = torchvision.transforms.functional

    def module(path: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(Path(path).stem, folder / path)
        if spec is None or spec.loader is None or not (folder / path).is_file():
            raise SystemExit(f"BASICSR must be a checkout of BasicSR, got {str(folder)!r} without {path}")
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded

    process, noise = module("basicsr/utils/img_process_util.py"), module("basicsr/data/degradations.py")
    return SimpleNamespace(
        blur=lambda image, kernels: process.filter2D(image.contiguous(), kernels),  # on a CPU it takes no other
        sharpen=process.USMSharp(),
        gaussian=noise.add_gaussian_noise_pt,
        poisson=noise.add_poisson_noise_pt,
        jpeg=module("basicsr/utils/diffjpeg.py").DiffJPEG(differentiable=False),
    )


def _stacked(kernels: list[Kernel | None]) -> Tensor:
    """``[N, 21, 21]``; None leaves an image as it is."""
    padded = np.zeros((len(kernels), 21, 21), np.float32)
    for target, kernel in zip(padded, kernels, strict=True):
        margin = 10 - (kernel.size // 2 if kernel else 0)
        target[margin : 21 - margin, margin : 21 - margin] = kernel.weights() if kernel else 1
    return torch.from_numpy(padded)


@torch.no_grad()
def public_pipeline(public: SimpleNamespace, settings: Degradation, gt: Tensor, choices: list[Choices]) -> Tensor:
    """``[N, 3, H, W]`` in the order of SeeSR's code; what it draws once per batch is that of the first choices."""
    gt = public.sharpen(gt) if settings.sharpens_gt else gt
    final = [side // settings.scale for side in gt.shape[2:]]
    ends = choices[0]

    def noisy(image: Tensor, rounds: list[RoundChoices]) -> Tensor:
        strength = torch.tensor([one.strength for one in rounds])
        gray = torch.tensor([float(one.gray) for one in rounds])
        return {"gaussian": public.gaussian, "poisson": public.poisson}[rounds[0].noise](
            image, strength, gray_noise=gray
        )

    def coded(image: Tensor, rounds: list[RoundChoices]) -> Tensor:
        return public.jpeg(image.clamp(0, 1), quality=torch.tensor([float(one.quality) for one in rounds]))

    first, second = [one.first for one in choices], [one.second for one in choices]
    image = public.blur(gt, _stacked([one.kernel for one in first]))
    image = F.interpolate(image, scale_factor=first[0].resize, mode=first[0].mode)
    image = coded(noisy(image, first), first)
    if second[0].kernel:
        image = public.blur(image, _stacked([one.kernel for one in second]))
    size = [int(side * second[0].resize) for side in final]
    image = noisy(F.interpolate(image, size, mode=second[0].mode), second)
    sinc = _stacked([one.final_kernel for one in choices])
    if ends.jpeg_last:
        image = coded(public.blur(F.interpolate(image, final, mode=ends.final_mode), sinc), second)
    else:
        image = public.blur(F.interpolate(coded(image, second), final, mode=ends.final_mode), sinc)
    return (image * 255).round().clamp(0, 255) / 255


def contestants(public: SimpleNamespace, name: str, gt: Tensor) -> dict[str, Callable[[int], Tensor]]:
    """By name, what makes the low-resolution images of a round."""
    settings = Degradation.preset(name)

    def drawn(turn: int) -> list[Choices]:
        return [settings.draw(settings.generator((turn, index))) for index in range(len(gt))]

    def ours(turn: int, size: int) -> Tensor:
        parts = [range(start, start + size) for start in range(0, len(gt), size)]
        return torch.cat([settings(gt[part.start : part.stop], [(turn, i) for i in part])[0] for part in parts])

    def by_itself(turn: int) -> Tensor:
        choices = drawn(turn)
        return torch.cat([public_pipeline(public, settings, gt[i : i + 1], [choices[i]]) for i in range(len(gt))])

    return {
        "ours": lambda turn: ours(turn, len(gt)),
        "ours, one by one": lambda turn: ours(turn, 1),
        "public, one by one": by_itself,
        "public, one batch": lambda turn: public_pipeline(public, settings, gt, drawn(turn)),
    }


def run_case(public: SimpleNamespace, name: str, gt: Tensor, rounds: int) -> dict:
    found = contestants(public, name, gt)
    walls, processors = {key: [] for key in found}, {key: [] for key in found}
    for step in contestants(public, name, gt[:, :, :64, :64].contiguous()).values():
        step(0)  # the first call of each builds tables
    for turn in range(1, rounds + 1):
        for key, step in found.items():
            wall, processor = time.perf_counter(), time.process_time()
            step(turn)
            walls[key].append(time.perf_counter() - wall)
            processors[key].append(time.process_time() - processor)
    rows = [
        {"name": key, **measure.quantiles(walls[key]), "processor_seconds": float(np.median(processors[key]))}
        for key in found
    ]
    return {"title": f"{name}, {'x'.join(map(str, gt.shape))}, {rounds} round{'s' * (rounds > 1)}", "rows": rows}


def lines(case: dict) -> list[str]:
    ours = case["rows"][0]
    header = ["", "median", "20 % – 80 %", "processor time", "time / ours", "processor / ours"]
    body = [
        [row["name"], f"{row['median']:.2f} s", f"{row['q20']:.2f} – {row['q80']:.2f} s",
         f"{row['processor_seconds']:.2f} s", f"{row['median'] / ours['median']:.1f}",
         f"{row['processor_seconds'] / ours['processor_seconds']:.1f}"]
        for row in case["rows"]
    ]  # fmt: skip
    said = f"From {case['started']}, to {case['ended']}; {case['versions']}."
    return [f"### {case['title']}", "", *markdown_rows(header, body), "", said, ""]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.degradation", description=__doc__.partition("\n")[0])
    parser.add_argument("basicsr", type=Path, metavar="BASICSR")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    public, photograph = public_code(args.basicsr), to_tensor(load_photograph("astronaut"))
    gt = photograph[:, : args.side, : args.side].repeat(args.batch, 1, 1, 1)
    packages = ("torch", "numpy", "scipy", "pillow")
    device = f"Degradation, {measure.processor()}"
    path = args.output / f"{report.slug(device)}.json"
    args.output.mkdir(parents=True, exist_ok=True)
    cases = json.loads(path.read_text()) if path.exists() else {}  # of other presets, measured before
    for name in args.presets:
        started = f"{measure.now()}, load {measure.load()}"
        cases[name] = run_case(public, name, gt, args.rounds) | {
            "versions": ", ".join(f"{package} {version(package)}" for package in packages),
            "started": started,
            "ended": f"{measure.now()}, load {measure.load()}",
        }
        print("\n".join(lines(cases[name])), flush=True)
        tables = [line for key in sorted(cases) for line in lines(cases[key])]
        path.write_text(json.dumps(cases, indent=1, ensure_ascii=False) + "\n")
        path.with_suffix(".md").write_text("\n".join([f"# {device}", "", ABOUT, "", *tables]).rstrip() + "\n")


if __name__ == "__main__":
    main()
