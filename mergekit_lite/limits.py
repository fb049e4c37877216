"""What the machine refuses, in words: memory, threads, files, disks. Imports nothing of ours.

Wherever an error of the operating system is expected, the code that expects it says what it was doing. This is for all
the other places: such an error is no bug of this program, and its text alone tells nobody what to do.
"""

from __future__ import annotations

import errno
import resource

# A call with wrong arguments is a bug of this program, whatever file it was made on; so is a reader who went away.
_BUGS = frozenset({errno.EBADF, errno.EFAULT, errno.EINVAL, errno.EPIPE, errno.ESPIPE, errno.ENOTTY, errno.ECHILD})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FILES = frozenset({errno.EMFILE, errno.ENFILE})
_RIGHTS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_MEMORY_SAYS = ("allocate memory", "not enough memory", "out of memory", "bad_alloc", "failed to map segment")
_THREADS_SAY = ("start new thread", "thread creation failed", "resource temporarily unavailable")

MEMORY = (
    "allow this process more (`ulimit -v`, the container's limit), or less at once: `--threads 1`, a small `--block`"
)
THREADS = "allow more (`ulimit -u`, the container's limit), or take fewer: `--threads 1`"
OPEN_FILES = "allow more open files (`ulimit -n 4096`), or save in fewer, larger files: `shard` under `save`"


def hint_for(fault: OSError) -> str:
    """What to do about an error of the operating system at a file."""
    if fault.errno in _FULL:
        return "make room on the disk, or ask for a larger quota or limit of file sizes (`ulimit -f`)"
    if fault.errno in _FILES:
        return OPEN_FILES
    if fault.errno in _RIGHTS:
        return "choose a folder that you may write to"
    if fault.errno == errno.ENOMEM:
        return MEMORY
    return "check the disk or the network mount"


def refusal(fault: BaseException) -> tuple[str, str] | None:
    """What was refused and what to do about it, where `fault` says that the machine refused something; else None."""
    text = str(fault)
    # A thread's stack is memory too.
    threads = _says(fault, _THREADS_SAY)
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    if isinstance(fault, MemoryError) or _says(fault, _MEMORY_SAYS) or (threads and limited):
        return f"the memory that this process may have does not suffice{_detail(text)}", MEMORY
    if threads:
        return f"the system allows no further thread{_detail(text)}", THREADS
    if isinstance(fault, OSError) and fault.errno is not None and fault.errno not in _BUGS:
        place = "" if fault.filename is None else f" `{fault.filename}`"
        return f"the system refuses{place}: {fault.strerror}", hint_for(fault)
    return None


def _says(fault: BaseException, words: tuple[str, ...]) -> bool:
    """torch and the loader of libraries have no class of their own for it."""
    return isinstance(fault, (RuntimeError, ImportError)) and any(word in str(fault).lower() for word in words)


def _detail(text: str) -> str:
    first = text.strip().split("\n")[0]
    return f": {first}" if first else ""
