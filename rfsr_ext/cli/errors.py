"""What went wrong in one sentence that names the place and the remedy."""

import errno
import re

from rfsr_ext.memory import ran_out

__all__ = ["disk_is_full", "sentence"]

_SYSTEM = {
    errno.ENOSPC: "no space left on disk ({}); nothing is half written, free some and run the same command again",
    errno.EDQUOT: "disk quota exceeded ({}); nothing is half written, free some and run the same command again",
    errno.EACCES: "no permission for {}; change its permissions or give another",
    errno.EPERM: "no permission for {}; change its permissions or give another",
    errno.EROFS: "{} is on a read-only file system; give another",
    errno.EEXIST: "{} exists already; move it away or give another",
    errno.ENOTDIR: "{} has a file where there must be a folder; give another",
    errno.EISDIR: "{} is a folder, a file is wanted",
    errno.ENOENT: "{} does not exist",
    errno.ENAMETOOLONG: "{} is a longer name than the file system takes; give a shorter one",
    errno.ELOOP: "{} is a link that leads back to itself; give another",
    errno.EIO: "the disk fails at {}; look at its cables and its log, or give another",
    errno.EMFILE: "too many files are open at once ({}); raise the limit (ulimit -n) or lower num_workers",
    errno.ENFILE: "too many files are open at once ({}); raise the limit (ulimit -n) or lower num_workers",
    errno.EFBIG: "{} would be larger than the file system or ulimit -f allows; give another",
}


def disk_is_full(error: BaseException) -> bool:
    """Whether the next file would fail like this one."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def sentence(error: BaseException) -> str:
    """The message of an exception, wherever it was raised; system errors and failed allocations in plain words."""
    if isinstance(error, OSError) and error.errno is not None:
        place = "a file that the system does not name" if error.filename is None else repr(str(error.filename))
        return _SYSTEM.get(error.errno, f"{error.strerror} ({{}})").format(place)
    text = str(error)
    if found := re.match(r"Caught (\w+) in DataLoader worker process .*\n\1: (.*)", text, re.DOTALL):
        text = found[2].strip()  # torch puts the whole traceback of a loader process into the message
    if isinstance(error, ModuleNotFoundError) and text == f"No module named {error.name!r}":
        return f"{text}; pip install 'rfsr_ext[train]' brings what the command line needs"
    if isinstance(error, MemoryError) and text.startswith("not enough memory"):
        return text
    if ran_out(error):
        size = re.search(r"allocate (\d+) bytes", text)
        asked = f"{int(size[1]) / 1e9:.1f} GB at once" if size else text.split(". ")[0] or "no size given"
        return f"not enough memory ({asked}); give smaller or fewer images"
    return text
