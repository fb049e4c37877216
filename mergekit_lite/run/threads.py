"""What torch's threads and the C library's allocator are set to while this program's own threads are at work."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

from mergekit_lite.lazy import torch

# glibc's names for its settings.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
KEPT = 1 << 26  # bytes of freed blocks that a thread keeps at most


@contextlib.contextmanager
def one_thread_per_operation() -> Iterator[None]:
    """torch splits long sums over its own threads and then adds up in another order; within, it does not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread_here() -> None:
    """The same for a thread that works: MKL and OpenMP ask each thread anew, and take all cores where it has not said
    otherwise, so that the last bits of a decomposition would depend on how many there are."""
    torch.set_num_threads(1)


def return_freed_memory() -> None:
    """Give the system what glibc has kept of freed blocks, of all threads."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def keep_freed_blocks() -> None:
    """Let glibc keep the memory of freed blocks for the next ones. By itself it gives every block back to the system
    and has each page of the next one zeroed and mapped anew, which took a third of a merge's time."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):  # a C library without `mallopt`, such as musl
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 25)
        libc.mallopt(_M_TRIM_THRESHOLD, KEPT)
        libc.mallopt(_M_TOP_PAD, 1 << 22)
