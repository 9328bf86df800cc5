"""The processes that a launcher started together, and work split over them: each piece is done by one of them.

Launchers are torchrun and ``accelerate launch``.  Nothing is split unless the program has said `join` in all of its
processes, as the command line does: elsewhere a function may well be called in one of them alone.  All that have joined
must call the functions below together.  If one of them fails, the launcher ends the others.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
from tqdm import tqdm

if TYPE_CHECKING:
    from accelerate import PartialState

__all__ = ["from_main", "is_main", "join", "process_state", "split_map"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_ROUND = 8  # pictures of each process between two meetings: their times even out, and little is lost by a kill

_joined = False


def process_state(cpu: bool = False) -> "PartialState":
    """accelerate's state: which of how many processes this is, and its device.  The first call meets the others.

    Args:
        cpu: compute on the CPU although there is a GPU.

    Raises:
        RuntimeError: if several processes were launched and each of them would be alone.
    """
    from accelerate import PartialState  # here, because whoever works alone needs none of it
    from accelerate.utils import parse_flag_from_env

    launched = int(os.environ.get("WORLD_SIZE", 1))
    alone = RuntimeError(
        f"processes launched together must work together, but of {launched} (WORLD_SIZE) each is alone; launch them by "
        "torchrun or accelerate launch, or unset WORLD_SIZE"
    )
    if launched > 1 and "LOCAL_RANK" not in os.environ:  # which both of them set
        raise alone
    # Without `cpu` accelerate makes several processes without a GPU several that are alone, and says nothing.
    cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # Whoever has done its share waits for the slowest, however long that takes; by default it gives up after minutes.
    state = PartialState(cpu=cpu, timeout=timedelta(days=1))
    if state.num_processes < launched:
        raise alone
    return state


def join() -> None:
    """From here on this process and the others that were launched with it share the work of `split_map`."""
    global _joined
    process_state()  # from here on "cuda" is this process' own GPU
    _joined = True


def is_main() -> bool:
    """Whether this is the process that prints, and writes what there is one of."""
    return not _joined or process_state().is_main_process


def from_main(value: Result) -> Result:
    """What the main process gives; it must be such as can be pickled."""
    if not _joined:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def split_map(
    function: Callable[[Item], Result], items: Sequence[Item], desc: str = "", progress: bool = True
) -> Iterator[Result]:
    """``map(function, items)``: each item is done by one process, and every process gets all results in their order.

    Nothing begins before every process has come here, so that what one writes changes nobody's plan.  Results come one
    by one, or in rounds where there are several processes; all of them must be taken.

    Args:
        function: its results must be such as can be pickled.
        items: images, the same in every process down to their ``repr``.
        desc: of the main process' progress bar.
        progress: show it.

    Raises:
        RuntimeError: if another process has other items.
    """
    rank, count = (process_state().process_index, process_state().num_processes) if _joined else (0, 1)
    plans = set(_gather([hashlib.sha256(repr(items).encode()).hexdigest()]))
    if len(plans) > 1:
        raise RuntimeError(
            f"all {count} processes must see the same files, and they see {len(plans)} different lists; put the "
            "folders on a disk that every machine has at the same place"
        )
    size = count * _ROUND if count > 1 else 1
    with tqdm(total=len(items), desc=desc, unit="image", leave=False, disable=not progress or rank > 0) as bar:
        for first in range(0, len(items), size):
            part = items[first : first + size]
            own = {k: function(part[k]) for k in range(rank, len(part), count)}
            results = {k: result for each in _gather([own]) for k, result in each.items()}
            bar.update(len(part))
            yield from (results[k] for k in range(len(part)))


def _gather(values: list[Result]) -> list[Result]:
    """The lists of all processes, one after the other."""
    if not _joined:
        return values
    from accelerate.utils import gather_object

    return gather_object(values)
