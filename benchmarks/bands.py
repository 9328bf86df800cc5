"""How close each band is to the truth along the sampling steps, on more crops than a notebook has time for.

``python -m benchmarks.bands`` measures the shipped mini model on 48 held-out crops of 64 pixels with 3 seeds, at the
first and at every fifth of its 50 steps, and writes ``notebooks/results/bands_mini.csv``, which notebook 04 reads.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rfsr_ext.data import PHOTOGRAPHS, evaluation_crops, photographs
from rfsr_ext.evaluation import measure_trajectory
from rfsr_ext.models import load_model

OUTPUT = Path(__file__).resolve().parents[1] / "notebooks" / "results" / "bands_mini.csv"
STEPS = (1, *range(5, 51, 5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=3, help="of the noise")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    names, started = photographs("test"), time.process_time()
    samples = evaluation_crops(names, 64, options.crops)
    frame = measure_trajectory(load_model("mini"), samples, range(options.seeds), steps=STEPS)
    of_prompt = {", ".join(PHOTOGRAPHS[name].tags): name for name in names}
    frame.insert(0, "photograph", [of_prompt[samples[image]["prompt"]] for image in frame["image"]])
    frame = frame.drop(columns=["model", "timestep"])
    frame.round(4).to_csv(options.output, index=False)
    print(f"{len(frame)} rows in {options.output}, {time.process_time() - started:.0f} s of processor time")


if __name__ == "__main__":
    main()
