"""Memory: weights in half precision, or on the CPU while nobody needs them; how much there is, and lack of it."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

__all__ = ["available", "bytes_of", "check_opened", "hold_weights", "on_device", "ran_out"]

_PROC, _GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# torch, safetensors, C++ and the threads that a library starts, each in its own words
_LACK = re.compile(r"allocate memory|out of memory|bad_alloc|start new thread")


class _As(nn.Module):
    """Gives a tensor in another type."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype)


def hold_weights(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Hold the weights of a frozen module's linear layers and convolutions in half precision, in place.

    Whoever asks for such a weight gets it in its own type, so that everything is computed as before, of rounded
    weights.  Under autocast to ``dtype``, which rounds exactly these at every use, results stay the same bits.

    Args:
        module: it is never trained; what it saves is the rounded weights.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
    """
    for part in list(module.modules()):
        if not isinstance(part, (nn.Linear, _ConvNd)) or parametrize.is_parametrized(part):
            continue
        own = part.weight.dtype
        if own.itemsize > dtype.itemsize:
            part.weight = nn.Parameter(part.weight.detach().to(dtype), requires_grad=False)
            parametrize.register_parametrization(part, "weight", _As(own), unsafe=True)
    return module


@contextlib.contextmanager
def on_device(modules: Iterable[nn.Module], device: torch.device | str) -> Iterator[None]:
    """Have frozen modules on a device for as long as the block lasts.

    What is elsewhere stays there meanwhile and is what the modules have again afterwards: only the way to the device
    costs time, and what a module writes into its buffers there is lost.
    """
    device, homes = torch.device(device), []
    for part in (part for module in modules for part in module.modules()):
        for tensors in (part._parameters, part._buffers):
            homes += [(tensors, name, x) for name, x in tensors.items() if x is not None and x.device != device]
    try:
        moved: dict[int, Tensor] = {}  # what two modules share, they go on sharing
        for tensors, name, tensor in homes:
            if id(tensor) not in moved:
                there = tensor.detach().to(device, non_blocking=True)
                moved[id(tensor)] = nn.Parameter(there, False) if isinstance(tensor, nn.Parameter) else there
            tensors[name] = moved[id(tensor)]
        yield
    finally:
        for tensors, name, tensor in homes:
            tensors[name] = tensor


def bytes_of(modules: Iterable[nn.Module]) -> int:
    """Of parameters and buffers, each once."""
    tensors = {id(x): x for module in modules for x in (*module.parameters(), *module.buffers())}
    return sum(x.nbytes for x in tensors.values())


def available() -> int | None:
    """Bytes of memory that this process can have; None where the system does not say, or not as Linux does.

    It is what the machine has, or what is left of a container's or a batch job's limit, whichever is less.
    """
    found = []
    with contextlib.suppress(OSError):
        text = (_PROC / "meminfo").read_text(encoding="utf-8")
        found += [int(kilobytes) * 1024 for kilobytes in re.findall(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)]
        for line in (_PROC / "self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):  # of version 2 and 1
                root = _GROUPS / controllers
                inner = root / path.lstrip("/")
                around = [inner, *inner.parents]
                found += [left for group in around[: around.index(root) + 1] if (left := _left(group)) is not None]
    return max(0, min(found)) if found else None


def _left(group: Path) -> int | None:
    """Bytes up to the limit of a control group, where it has one; files that it has read can make place."""
    for limit, used, files in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError, KeyError):  # "max" is no number: no limit
            facts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
            most, now = (int((group / name).read_text(encoding="utf-8")) for name in (limit, used))
            return most - now + int(facts[files])
    return None


def ran_out(error: BaseException) -> bool:
    """Whether an exception says that there was too little memory; most libraries have no type of their own for it."""
    return isinstance(error, MemoryError) or _LACK.search(str(error)) is not None


def check_opened(error: BaseException, path: Path) -> None:
    """Call what failed for want of memory by its name: libraries hide it behind what they would have said next.

    Raises:
        MemoryError: if that was the reason why ``path`` could not be opened, at any place of the chain.
    """
    link: BaseException | None = error
    while link is not None:
        if ran_out(link):
            raise MemoryError(
                f"not enough memory to open {str(path)!r}; close other programs, or raise the limit (ulimit -v)"
            ) from error
        link = link.__cause__ or link.__context__
