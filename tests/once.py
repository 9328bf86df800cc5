"""What takes long to build or to write is made once; whoever asks gets a copy, and may do with it what it likes."""

import atexit
import copy
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def built_once(build: Callable) -> Callable:
    """``build``, run once for each set of arguments, which must be hashable."""
    built = functools.cache(build)
    return functools.wraps(build)(lambda *args, **options: copy.deepcopy(built(*args, **options)))


def written_once(write: Callable) -> Callable:
    """``write``, which fills a folder given first and gives a path in it; run once for each set of other arguments."""

    @functools.cache
    def written(*args, **options) -> tuple[Path, Path]:
        root = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, root, ignore_errors=True)
        return root, write(root, *args, **options).relative_to(root)

    @functools.wraps(write)
    def copied(folder: Path, *args, **options) -> Path:
        root, place = written(*args, **options)
        shutil.copytree(root, folder, dirs_exist_ok=True)
        return folder / place

    return copied
