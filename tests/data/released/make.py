"""Writes expected.safetensors: what the public code behind Real-ESRGAN computes, for the tests beside it.

    python -m tests.data.released.make BASICSR

BASICSR is a checkout of https://github.com/XPixelGroup/BasicSR (commit 8d56e3a045f9fb3e1d8872f92ee4a4f07f886b0a); made
with opencv-python-headless 5.0.0, NumPy 2.4.6, SciPy 1.17.1 and PyTorch 2.14.1.  Its modules are read one by one,
because the package imports what current releases of its own requirements have dropped.  The blur is computed in
float64, because its sums of 441 products are off by more than 1e-6 in float32; the unsharp mask takes float32 only.
"""

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.degradation import public_code, public_pipeline
from rfsr_ext.data import Degradation


def module(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def main(basicsr: Path) -> None:
    degradations = module(basicsr / "basicsr/data/degradations.py")
    process = module(basicsr / "basicsr/utils/img_process_util.py")
    rng = np.random.default_rng(0)
    tensors, kernels = {}, []
    shapes = {
        "iso": degradations.bivariate_Gaussian,
        "generalized_iso": degradations.bivariate_generalized_Gaussian,
        "plateau_iso": degradations.bivariate_plateau,
    }
    for family, function in shapes.items():
        for name in (family, family.replace("iso", "aniso")):
            for size in (7, 13, 21):
                sigma, theta, beta = rng.uniform(0.2, 3, 2), rng.uniform(-math.pi, math.pi), rng.uniform(0.5, 4)
                isotropic = not name.endswith("aniso")
                shape = () if family == "iso" else (beta,)
                kernel = function(size, *sigma, theta, *shape, isotropic=isotropic)
                kernels.append(
                    {
                        "family": name,
                        "size": size,
                        "sigma": [sigma[0], sigma[0] if isotropic else sigma[1]],
                        "theta": 0.0 if isotropic else theta,
                        "beta": beta if shape else 1.0,
                    }
                )
                tensors[f"kernel.{len(kernels) - 1}"] = torch.from_numpy(kernel.copy())
    for size in (7, 13, 21):
        cutoff = rng.uniform(math.pi / 3, math.pi)
        kernels.append({"family": "sinc", "size": size, "cutoff": cutoff})
        kernel = degradations.circular_lowpass_kernel(cutoff, size)
        tensors[f"kernel.{len(kernels) - 1}"] = torch.from_numpy(kernel.copy())
    # edges, so that the unsharp mask has something to do
    image = np.where(rng.random((3, 12, 10)) < 0.5, 0.2, 0.8).repeat(6, axis=1).repeat(6, axis=2)
    image = torch.from_numpy((image + 0.03 * rng.random(image.shape)).astype(np.float32))
    tensors["image"] = image
    tensors["sharpened"] = process.USMSharp()(image[None])[0]
    tensors["blurred"] = process.filter2D(image.double()[None], tensors[f"kernel.{len(kernels) - 1}"][None])[0].float()
    # the whole of it, but for noise and JPEG, whose random numbers and rounding are others
    public = public_code(basicsr)
    public.jpeg = lambda image, quality: image
    gt = tensors["image"].repeat(1, 2, 2)[None]
    for name in ("realesrgan-a", "realesrgan-b", "realesrgan-c"):
        silent = {"noise_range": [0, 0], "poisson_scale_range": [0, 0]}
        settings = Degradation.preset(name, first=silent, second=silent)
        for index in range(4):
            choices = settings.draw(settings.generator((0, index)))
            tensors[f"{name}.{index}"] = public_pipeline(public, settings, gt, [choices])[0].contiguous()
    save_file(tensors, Path(__file__).with_name("expected.safetensors"), {"kernels": json.dumps(kernels)})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
