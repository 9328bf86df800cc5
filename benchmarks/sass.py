"""What the compiler makes of the CUDA Gram, without a GPU: registers, spills, instructions of the loop, a roofline.

``python -m benchmarks.sass``, from the repository's root, compiles ``csrc/cuda/gram.cu`` with the nvcc on PATH, reads
the result with cuobjdump (from PATH, or the one that Triton brings) and writes ``benchmarks/results/cuda-sass.md``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import torch

from benchmarks.measure import DATASHEETS
from rfsr_ext.evaluation.ways import markdown_rows

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks/results/cuda-sass.md"
# Per multiprocessor, CUDA C++ Programming Guide, "Technical specifications": KiB of shared memory, threads. All have
# 65536 registers, given out by 8 for each of a warp's lanes, and keep 1 KiB of shared memory for every block.
ARCHS = {"sm_80": (164, 2048), "sm_90": (228, 2048), "sm_120": (100, 1536)}
SIZES = {"BFloat16": 2, "Half": 2, "float": 4, "double": 8}
COPY = 4.3e12  # B/s that a copy reaches on an H200
MMA_SHARE = 0.6  # of a Hopper data sheet's FLOP/s, which only wgmma reaches, that mma.sync may reach: a guess
LAYERS = dict(relu1_1=(64, 512), relu2_1=(128, 256), relu3_1=(256, 128), relu4_1=(512, 64), relu5_1=(512, 32))
KERNELS = ("gram_partial_kernel", "gram_backward_kernel")  # those that multiply

ABOUT = """\
# What the compiler makes of the CUDA Gram

Written by `python -m benchmarks.sass`; do not edit. **Compiled, and run on the host by the tests
(`tests/ops/test_cuda_on_host.py`), never yet on a GPU.** {compiler}

Registers and spills are `ptxas -v`'s; instructions are counted in `cuobjdump -sass`, in the loop over stages:
tensor-core instructions of a warp, loads from shared memory, asynchronous copies of 16 bytes from global to shared
memory (layouts that cannot be copied so, and a shift, go through registers in the same loop). Warps are those that fit
on a multiprocessor at once. Kernels are named by what comes in and, after an arrow, what lies in shared memory (layer
norm takes a shift off half types, which leaves fp32); and by the tile, forward in channels, backward in channels by
pixels.
"""
ROOFLINE = """
## Roofline of an H200: an estimate

Microseconds for one 512 × 512 picture through VGG19, forward for features and target (`gram_loss`), backward for the
features. Bytes: what must be read and written, at the 4.3 TB/s a copy reaches. Products: what the tensor cores are
given, which is the lower triangle in warps' tiles of 32 × 32 (fp32: six products of bf16; backward in bf16: two), at
60 % of the data sheet's {rate:.0f} TFLOP/s, a guess at what `mma.sync` reaches on this architecture. The larger of the
two is the estimate; launches, three forward and one backward, and the sums over ranges are not in it.
**Nothing here was measured.**
"""


def tool(name: str) -> str:
    """Path of a CUDA program on PATH or, for cuobjdump, in Triton."""
    triton = importlib.util.find_spec("triton")
    folder = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else Path()
    path = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), str(folder)]))
    if path is None:
        raise SystemExit(f"{name} was not found: install a CUDA toolkit and put its bin folder on PATH")
    return path


def run(*command: object, **options) -> str:
    return subprocess.run([*map(str, command)], check=True, text=True, capture_output=True, **options).stdout


def demangled(text: str) -> str:
    return run(tool("c++filt"), input=text)


def compiled(arch: str, folder: Path) -> tuple[str, str]:
    """(ptxas's words, SASS)."""
    binary = folder / f"{arch}.cubin"
    flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", f"-arch={arch}", "-Xptxas", "-v", "-cubin"]  # setup.py's
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{Path(torch.__file__).parent / 'include'}"]
    command = [tool("nvcc"), *flags, str(ROOT / "csrc/cuda/gram.cu"), "-o", str(binary)]
    words = subprocess.run(command, check=True, text=True, capture_output=True).stderr
    cuobjdump = tool("cuobjdump")
    path = os.pathsep.join([str(Path(cuobjdump).parent), os.environ["PATH"]])  # where it finds nvdisasm
    return demangled(words), demangled(run(cuobjdump, "-sass", binary, env={**os.environ, "PATH": path}))


def name_of(signature: str) -> tuple[str, list[str]]:
    """("gram_partial_kernel", ["BFloat16", "float", "64"])"""
    kernel, arguments = re.search(r"(gram_\w+)<([^<>]*)>", signature).groups()
    return kernel, [argument.strip().removeprefix("c10::") for argument in arguments.split(",")]


def loop(instructions: list[tuple[int, str]]) -> Counter:
    """Instructions by name in the smallest loop that has all tensor-core instructions."""
    tensor = [address for address, text in instructions if re.match(r"[HD]MMA", text)]
    if not tensor:
        return Counter()
    spans = []
    for address, text in instructions:
        target = re.search(r"BRA\b.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) <= tensor[0] and address >= tensor[-1]:
            spans.append((address - int(target[1], 16), int(target[1], 16), address))
    _, first, last = min(spans)
    return Counter(text.split()[0].split(".")[0] for address, text in instructions if first <= address <= last)


def kernels(arch: str, folder: Path) -> dict:
    """{(kernel, arguments): (registers, spilled bytes, loop)}"""
    words, sass = compiled(arch, folder)
    found = {}
    for part in words.split("Compiling entry function")[1:]:
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
        found[str(name_of(part))] = [name_of(part), int(re.search(r"Used (\d+) registers", part)[1]), spills]
    for part in sass.split("Function : ")[1:]:
        code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(\S[^;]*);", part)
        found[str(name_of(part))].append(loop([(int(address, 16), text.strip()) for address, text in code]))
    return found


def block_of(kernel: str, arguments: list[str]) -> tuple[int, int]:
    """(threads, bytes of shared memory) as gram.cu launches it."""
    if kernel == "gram_partial_kernel":
        tile = int(arguments[2])
        return tile * tile // 32, 8 * tile * 64
    size, channels, width = SIZES[arguments[0]], int(arguments[1]), int(arguments[2])
    acc = max(4, size)
    return channels * width // 32, 4 * 16 * (channels * acc + width * size + 64)


def row_of(arch: str, name: tuple[str, list[str]], registers: int, spills: int, inside: Counter) -> list[str]:
    kernel, arguments = name
    threads, shared = block_of(*name)
    memory, most = ARCHS[arch]
    blocks = min(65536 // (-(-registers // 8) * 8 * threads), memory * 1024 // (shared + 1024), most // threads)
    if kernel == "gram_partial_kernel":
        numbers = arguments[0] if arguments[0] == arguments[1] else f"{arguments[0]} → {arguments[1]}"
        label = f"forward {numbers}, {arguments[2]} × {arguments[2]}"
    else:
        label = f"backward {arguments[0]}, {arguments[1]} × {arguments[2]}"
    tensor = f"{inside['HMMA']} HMMA" if inside["HMMA"] else f"{inside['DMMA']} DMMA"
    numbers = [threads, registers, shared // 1024, spills, tensor, inside["LDS"], inside["LDGSTS"]]
    return [label, *map(str, numbers), str(blocks * threads // 32)]


def roofline() -> list[str]:
    rate = DATASHEETS["H200"][1][torch.bfloat16]
    rows = []
    for dtype, size, forward_products, backward_products in (("bf16", 2, 1, 2), ("fp32", 4, 6, 6)):
        for layer, (channels, side) in LAYERS.items():
            pixels, tile = side * side, 64 if channels <= 64 else 128
            tiles, warps = -(-channels // tile), tile // 32
            pieces = tiles * warps * (warps + 1) // 2 + tiles * (tiles - 1) // 2 * warps**2
            flops = 2 * 2 * pieces * 32 * 32 * pixels * forward_products
            times = [2 * channels * pixels * size / COPY, flops / (MMA_SHARE * rate)]
            flops = 2 * channels**2 * pixels * backward_products
            times += [2 * channels * pixels * size / COPY, flops / (MMA_SHARE * rate)]
            micro = [f"{1e6 * t:.1f}" for t in (*times, max(times[:2]), max(times[2:]))]
            rows.append([f"{layer} {dtype}, {channels} × {side}²", *micro[:2], micro[4], *micro[2:4], micro[5]])
    header = ["layer", "forward bytes", "products", "estimate", "backward bytes", "products", "estimate"]
    return [ROOFLINE.format(rate=rate / 1e12), *markdown_rows(header, rows)]


def main() -> None:
    lines = [ABOUT.format(compiler=run(tool("nvcc"), "--version").strip().splitlines()[-1] + ".")]
    header = ["kernel", "threads", "registers", "shared KiB", "spilled bytes"]
    header += ["tensor cores", "shared loads", "copies", "warps"]
    with tempfile.TemporaryDirectory() as folder:
        for arch in ARCHS:
            found = [k for k in kernels(arch, Path(folder)).values() if k[0][0] in KERNELS]
            rows = [row_of(arch, *k) for k in sorted(found, key=lambda k: (KERNELS.index(k[0][0]), k[0][1]))]
            lines += [f"\n## {arch}\n", *markdown_rows(header, rows)]
    RESULT.write_text("\n".join([*lines, *roofline()]) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
