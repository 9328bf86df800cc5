"""How a contestant is checked, timed and weighed."""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils import benchmark

from rfsr_ext.recordings.files import cpu_name

# (B/s, FLOP/s by dtype) of data sheets, dense. fp32 is three TF32 products, the fastest way to its accuracy.
DATASHEETS = {
    "H200": (4.80e12, {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 495e12 / 3}),
    "H100": (3.35e12, {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 495e12 / 3}),
    "A100": (2.04e12, {torch.bfloat16: 312e12, torch.float16: 312e12, torch.float32: 156e12 / 3}),
}


# ---------------------------------------------------------------------------------------- the machine


def last_level_cache(device: str) -> int:
    """Bytes; a guess of 64 MiB where the system does not say."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(s[:-1]) << {"K": 10, "M": 20}[s[-1]] for s in sizes if s[-1] in "KM"), default=64 << 20)


def pool_size(entry_bytes: int, cache: int) -> int:
    """How many inputs to rotate through so that none is in a cache of this size when its turn comes."""
    return max(2, math.ceil(1.5 * cache / entry_bytes))


def best_rate(step: Callable[[], object], work: float) -> float:
    timer = benchmark.Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return work / min(timer.timeit(1).mean for _ in range(7))


def product_rate(dtype: torch.dtype, device: str, seconds: float = 0.2, clock: Callable[[], float] = time.perf_counter):
    """FLOP/s of a product of square matrices, as large as ``seconds`` allow and of 2048 rows at most.

    A product of 256 rows tells how large: processors without units for a half type take a thousand times as long.
    """

    def timed(side: int) -> float:
        a = torch.rand(side, side, device=device).to(dtype)
        step = (lambda: a @ a) if device == "cpu" else (lambda: (a @ a, torch.cuda.synchronize()))
        step()
        started = clock()
        step()
        return 2 * side**3 / (clock() - started)

    affordable = int((timed(256) * seconds / 2) ** (1 / 3)) // 64 * 64
    side = max(256, min(2048, affordable))
    return max(timed(side) for _ in range(5))


def floors(device: str, dtypes: list[torch.dtype], cache: int) -> tuple[float, dict[torch.dtype, float], str]:
    """Bandwidth, FLOP/s by dtype, and their source: a data sheet, else a copy and matrix products timed here.

    A half type that multiplies slower than fp32 has no units of its own; its least time is then that of fp32.
    """
    if device == "cuda":
        name = torch.cuda.get_device_name()
        for model, (bandwidth, rates) in DATASHEETS.items():
            if model in name:
                return bandwidth, rates, f"data sheet of the {model}"
    source = torch.ones(max(cache, 1 << 22) // 4, device=device)  # read and written: twice the cache
    copy = torch.empty_like(source)
    bandwidth = best_rate(lambda: copy.copy_(source), 2 * source.nbytes)
    single = product_rate(torch.float32, device)
    rates = {torch.float32: single} | {d: product_rate(d, device) for d in dtypes if d != torch.float32}
    slow = [str(d).removeprefix("torch.") for d in dtypes if rates[d] < single]
    note = f"; no units for {' and '.join(slow)}, whose floor is that of float32" if slow else ""
    rates = {d: max(rates[d], single) for d in dtypes}
    return bandwidth, rates, f"a copy and matrix products of up to 2048 rows, measured in this run{note}"


def slow_dtypes(device: str, dtypes: list[torch.dtype]) -> list[torch.dtype]:
    """Half types without units: one product of a Gram loss in them takes a processor a minute."""
    half = [d for d in dtypes if d != torch.float32 and device == "cpu"]
    single = product_rate(torch.float32, device) if half else 0
    return [d for d in half if product_rate(d, device) < single / 8]


# ------------------------------------------------------------------------------------------ checking


def relative_error(value, wanted) -> float:
    """Largest difference in any of the tensors, relative to its largest entry; NaN and infinity count as infinite."""
    worst = 0.0
    for x, y in zip(value, wanted, strict=True):
        error = ((x.double() - y).abs().max() / y.abs().max().clamp_min(1e-300)).item()
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


# -------------------------------------------------------------------------------------------- timing


def race(steps: dict[str, Callable[[], object]], rounds: int, block: float = 0.02) -> dict[str, dict]:
    """`quantiles` of the seconds per call of each step, over rounds in which all take turns, in a drawn order.

    A turn is as many calls as fill ``block`` seconds; `torch.utils.benchmark` warms each up and waits for the GPU.
    """
    threads = torch.get_num_threads()
    timers = {n: benchmark.Timer("step()", globals={"step": step}, num_threads=threads) for n, step in steps.items()}
    calls = {name: max(1, math.ceil(block / timer.timeit(1).mean)) for name, timer in timers.items()}
    seconds = {name: [] for name in steps}
    order, draw = list(steps), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            seconds[name].append(timers[name].timeit(calls[name]).mean)
    return {name: quantiles(found) for name, found in seconds.items()}


def quantiles(seconds: list[float]) -> dict[str, float]:
    """``median``, ``q20`` and ``q80`` of times, as a row of the table has them."""
    levels = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    found = torch.quantile(torch.tensor(seconds, dtype=torch.float64), levels).tolist()
    return dict(zip(("median", "q20", "q80"), found, strict=True))


def cycle(call: Callable, pool: list[tuple]) -> Callable[[], object]:
    """A step that gives ``call`` the next input of the pool each time."""
    inputs = itertools.cycle(pool)
    return lambda: call(*next(inputs))


# -------------------------------------------------------------------------------------------- memory


def _status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) << 10


def peak_memory(step: Callable[[], object], device: str) -> int | None:
    """Bytes one call adds at its peak, results included; None where the system cannot say.

    On a CPU this is resident memory, so it also sees what a kernel allocates behind PyTorch's back. The heap is first
    given back to the system, or the call would reuse pages that are already counted.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
        step()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError, StopIteration):  # not Linux with glibc
        return None


def processor() -> str:
    capability = torch.backends.cpu.get_cpu_capability()  # also what ATEN_CPU_CAPABILITY makes of it
    return f"{cpu_name()}, {capability}, {torch.get_num_threads()} threads"


def load() -> str:
    """What else ran: load averages over 1, 5 and 15 minutes."""
    return " ".join(f"{x:.2f}" for x in os.getloadavg())


def now() -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
