"""The disk that outputs go to: how much is free, and how fast it is."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mergekit_lite.checkpoint.writer import free_bytes
from mergekit_lite.plan.words import size
from mergekit_lite.report.check import Check, ok, warn

LITTLE_DISK = 10**9
PROBE = 64 << 20  # bytes that are written and read again at most
PIECE = 4 << 20
LONGEST = 2.0  # seconds for each of the two; a write that is under way, and the flush, are waited for
SLOW = 50e6  # bytes a second
_ELSEWHERE = "make room, or write elsewhere with `--out`"


def disk(folder: Path) -> Iterator[Check]:
    """The checks of the disk that `folder` is on."""
    free = free_bytes(folder)
    detail = f"{free / 1e9:.1f} GB free in `{folder}`"
    yield warn("disk", detail, _ELSEWHERE) if free < LITTLE_DISK else ok("disk", detail)
    if free < 2 * PROBE:
        yield warn("disk speed", "not measured: the disk is nearly full", _ELSEWHERE)
        return
    try:
        write, read = speed(folder)
    except OSError as error:
        yield warn("disk speed", f"cannot write into `{folder}`: {error.strerror}", "write elsewhere with `--out`")
        return
    detail = f"write {size(write)}/s, read {size(read)}/s, by a file of {size(PROBE)} at most"
    if min(write, read) < SLOW:
        hint = "a merge reads and writes whole models: use a local disk for outputs and HF_HOME if there is one"
        yield warn("disk speed", detail, hint)
    else:
        yield ok("disk speed", detail)


def speed(folder: Path) -> tuple[float, float]:
    """Bytes a second that a file in `folder` is written with, its flush to the disk included, and read. The file has no
    name, so nothing is left of it however this ends. Raises OSError."""
    block = os.urandom(PIECE)  # a disk that compresses gains nothing by it
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        fd, written = file.fileno(), 0
        began = time.perf_counter()
        while written < PROBE and time.perf_counter() - began < LONGEST:
            written += os.pwrite(fd, block, written)
        os.fsync(fd)
        write = written / max(1e-9, time.perf_counter() - began)
        with contextlib.suppress(AttributeError, OSError):  # so that the disk is read, not memory
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        read, began = 0, time.perf_counter()
        while read < written and time.perf_counter() - began < LONGEST:
            read += len(os.pread(fd, PIECE, read))
        return write, read / max(1e-9, time.perf_counter() - began)
