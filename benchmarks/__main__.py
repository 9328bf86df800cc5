"""Our losses against every other way to compute them, side by side.

``python -m benchmarks``, from the repository's root, prints a table per case and writes
``benchmarks/results/<device>.md`` and ``.json``. A full run compiles some 200 peers; ``--operators``, ``--dtypes``,
``--match`` and ``--peers`` narrow it down. Run it on a machine that does nothing else: the load before and after is
written into the results.

``ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2`` hold a processor that can do more to
AVX2: torch's own kernels and ours, products of half-precision matrices, and those of fp32. Give such a run, and such
tests, a ``TORCHINDUCTOR_CACHE_DIR`` of their own: torch 2.14 takes compiled code from its cache whichever processor it
was made for, and then computes wrong or corrupts the heap, with our operators and without.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import rfsr_ext
from benchmarks import end_to_end, measure, peers, report, rewards
from benchmarks.cases import DTYPES, Case, cases

# Largest error relative to the largest entry that still counts as the same loss.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
OPERATORS = ("haar", "gram", "end-to-end", "rewards")
SWITCHES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
GRADIENT_SCALE = 2.0**14  # as a gradient scaler would: fp16 cannot hold the gradient of a mean over an image


def call(loss, backward: bool):
    """(prediction, target) -> [loss] or [loss, gradients ...]."""

    def forward(prediction, target):
        with torch.no_grad():
            return [loss(prediction, target)]

    def both(prediction, target):
        value = loss(prediction, target)
        return [value, *torch.autograd.grad(value, prediction, value.new_full((), GRADIENT_SCALE))]

    return both if backward else forward


def in_fp64(entry: tuple) -> tuple:
    def convert(x):
        return [convert(y) for y in x] if isinstance(x, list) else x.detach().double().requires_grad_(x.requires_grad)

    return tuple(convert(x) for x in entry)


def run_case(
    case: Case, device: str, rounds: int, wanted: re.Pattern, cache: int, rates: tuple, slow: Sequence[torch.dtype] = ()
) -> dict:
    """``slow``: dtypes in which a matrix product takes the device minutes, so that no peer multiplies in them."""
    torch._dynamo.reset()  # a contestant compiled for another shape must not count against this one
    bandwidth, flops = rates
    generator = torch.Generator(device).manual_seed(0)
    pool = [case.inputs(generator, device) for _ in range(measure.pool_size(case.entry_bytes, cache))]
    exact = in_fp64(pool[0])
    rows, steps, expected = {}, {}, {}
    for name, loss in peers.line_up(case.operator, case.dtype, device).items():
        if name != "ours" and not wanted.search(name):
            continue
        rows[name] = {"name": name, "other_loss": "released" in name}
        if isinstance(loss, str):
            rows[name]["note"] = loss
            continue
        if case.dtype in slow and peers.multiplies_in_its_dtype(case.operator, name):
            rows[name]["note"] = f"left out: no units for {str(case.dtype).removeprefix('torch.')} here"
            continue
        same = peers.reference(case.operator, name)
        if same not in expected:
            expected[same] = call(same, case.backward)(*exact)
        step = call(loss, case.backward)
        try:
            error = measure.relative_error(step(*pool[0]), expected[same])
        except Exception as failure:  # a peer that cannot take the dtype or be compiled: the table says so
            if name == "ours":
                raise
            rows[name]["note"] = peers.unavailable(failure)
            continue
        rows[name]["error"] = error
        if error <= TOLERANCE[case.dtype]:
            steps[name] = measure.cycle(step, pool)
        elif name == "ours":
            raise AssertionError(f"ours is wrong in '{case.title}': relative error {error:.1e}")
        else:
            rows[name]["note"] = "overflows" if error == float("inf") else f"disagrees: relative error {error:.0e}"
    return finish(rows, steps, device, rounds) | {
        "title": case.title,
        "floor": case.floor(bandwidth, flops[case.dtype]),
        "gradient_bytes": case.gradient_bytes,
    }


def run_step(title: str, operator: str, step: end_to_end.Step, device: str, rounds: int, names: list[str]) -> dict:
    """A training step with our operator and with each named peer, and the share of it that is the loss itself."""
    torch._dynamo.reset()
    found = peers.line_up(operator, torch.float32, device)
    expected = step().double()
    rows, steps = {}, {}
    for name in ["ours", *names]:
        loss = found[name] if name == "ours" else end_to_end.fitting(operator, found[name])
        for label, run in (
            (name, end_to_end.with_loss(operator, step, loss)),
            (f"{name}: the loss alone", end_to_end.loss_alone(operator, step, loss)),
        ):
            error = measure.relative_error([run()], [expected])
            rows[label] = {"name": label, "error": error, "other_loss": label != name}
            if error <= TOLERANCE[torch.float32]:
                steps[label] = run
            else:
                rows[label]["note"] = f"disagrees: relative error {error:.0e}"
    return finish(rows, steps, device, rounds) | {"title": title}


def run_rewards(device: str, rounds: int) -> dict:
    """The reward step with our order of calls and with the obvious one; timed as it is weighed, as it takes long."""
    try:
        found = rewards.steps(device)
    except ModuleNotFoundError as failure:
        return {"title": rewards.TITLE, "rows": [{"name": "ours", "note": peers.unavailable(failure)}]}
    rows, results, seconds = {}, {}, {name: [] for name in found}
    for turn in range(1 + rounds):
        for name, step in found.items():
            taken, peak, results[name] = weigh(step, device)
            rows[name] = {"name": name, "peak_bytes": peak}
            if turn:  # the first warms up
                seconds[name].append(taken)
    error = measure.relative_error(*results.values())
    if error > TOLERANCE[torch.float32]:
        raise AssertionError(f"both orders must agree in '{rewards.TITLE}', got relative error {error:.1e}")
    for name, row in rows.items():
        row |= {"error": error} | measure.quantiles(seconds[name])
    return {"title": rewards.TITLE, "rows": list(rows.values())}


def weigh(step: Callable, device: str) -> tuple[float, int | None, list]:
    """Seconds and peak bytes of one call, and what it returns."""
    kept, started = [], time.perf_counter()
    peak = measure.peak_memory(lambda: kept.append(step()), device)
    return time.perf_counter() - started, peak, kept[0]


def finish(rows: dict, steps: dict, device: str, rounds: int) -> dict:
    """Weighs and times the steps and adds the figures to their rows."""
    for name, step in steps.items():
        rows[name]["peak_bytes"] = measure.peak_memory(step, device)
    for name, quantiles in measure.race(steps, rounds).items():
        rows[name] |= quantiles
    return {"rows": list(rows.values())}


def describe(device: str) -> dict:
    packages = ("torch", "triton", "ptwt", "pytorch_wavelets", "diffusers")
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    served = rfsr_ext.build_info()["devices"][device]
    held = ", ".join(f"{name}={os.environ[name]}" for name in SWITCHES if name in os.environ)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else measure.processor(),
        **({"held by": held} if held and device == "cpu" else {}),
        "rfsr_ext": f"{rfsr_ext.__version__}, {served['backend']}: {served['why']}",
        "versions": ", ".join(f"{name} {text}" for name, text in found.items()),
        "system": f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=OPERATORS)
    dtypes = [str(d).removeprefix("torch.") for d in DTYPES]
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes)
    parser.add_argument("--match", default="", help="regular expression that a case's title must contain")
    parser.add_argument("--peers", default="", help="regular expression that a peer's name must contain")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cache-mib", type=int, help="last-level cache to overflow with inputs; default: this machine's"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    match, wanted = re.compile(args.match), re.compile(args.peers)
    dtypes = [getattr(torch, name) for name in args.dtypes]
    slow = measure.slow_dtypes(args.device, dtypes)
    cache = args.cache_mib << 20 if args.cache_mib else measure.last_level_cache(args.device)
    bandwidth, flops, source = measure.floors(args.device, dtypes, cache)
    machine = describe(args.device) | {
        "last-level cache": f"{cache / 2**20:.0f} MiB",
        "floor": f"{bandwidth / 1e9:.1f} GB/s; "
        + ", ".join(f"{str(d).removeprefix('torch.')} {flops[d] / 1e9:.0f} GFLOP/s" for d in dtypes)
        + f" ({source})",
        "started": f"{measure.now()}, load {measure.load()}",
    }
    if args.match or args.peers:
        machine["narrowed to"] = f"cases '{args.match}', peers '{args.peers}'".replace("|", "\\|")
    result, winners = {"machine": machine, "cases": []}, {"haar": ["avg_pool2d"], "gram": ["bmm"]}

    def add(case: dict) -> None:
        machine["ended"] = f"{measure.now()}, load {measure.load()}"
        result["cases"].append(case)
        print("\n".join(report.case_lines(case)), flush=True)
        report.write(result, args.output)  # after every case: an interrupted run keeps what it has

    for case in cases():
        if case.operator in args.operators and case.dtype in dtypes and match.search(case.title):
            measured = run_case(case, args.device, args.rounds, wanted, cache, (bandwidth, flops), slow)
            add(measured)
            peer = report.best_peer(measured)
            if peer and case.dtype == torch.float32 and case.backward and peer["name"] not in winners[case.operator]:
                winners[case.operator].append(peer["name"])
    if "end-to-end" in args.operators:
        for title, (operator, make) in end_to_end.STEPS.items():
            if match.search(title):
                step = make(args.device)
                add(run_step(title, operator, step, args.device, args.rounds, winners[operator]))
    if "rewards" in args.operators and match.search(rewards.TITLE):
        add(run_rewards(args.device, min(args.rounds, 3)))
    if result["cases"]:
        print("\n".join(["", *report.summary_lines(result["cases"])]))
        print("\n".join(["", "For the README:", "", *report.comparison_lines(report.read(args.output))]))


if __name__ == "__main__":
    main()
