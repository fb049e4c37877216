"""Writes safetensors files whose every byte has its place before the first is known. No torch."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mergekit_lite.checkpoint.closing import Closing
from mergekit_lite.checkpoint.header import MAX_HEADER_BYTES, PREFIX_BYTES
from mergekit_lite.checkpoint.meta import DTYPE_BITS
from mergekit_lite.errors import RecipeError, StoppedError
from mergekit_lite.limits import hint_for

_MAX_WRITE = 2**30  # Linux writes 2 GiB less a page at most in one call, macOS refuses more than 2 GiB


def encode_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> tuple[bytes, list[int]]:
    """The header of a file that holds `tensors`, `(name, dtype code, shape, nbytes)`, in the order given.

    Returns the header, length prefix included, and each tensor's absolute offset in the file. The header is padded with
    spaces so that the tensors begin at a multiple of 8, as the safetensors library does it. Raises RecipeError where
    the header would exceed the 100 MB that readers accept.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begins: list[int] = []
    place = 0
    for name, dtype, shape, nbytes in tensors:
        if nbytes * 8 != math.prod(shape) * DTYPE_BITS[dtype] or name in entries or name in ("", "__metadata__"):
            raise ValueError(f"no such tensor can be stored: {name!r}, {dtype}, {shape}, {nbytes} bytes")
        begins.append(place)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + nbytes]}
        place += nbytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise RecipeError(
            f"the header of an output file would take {len(text)} bytes; safetensors allows {MAX_HEADER_BYTES}",
            hint="set a smaller `shard` under `save`, so that each file holds fewer tensors",
        )
    header = len(text).to_bytes(PREFIX_BYTES, "little") + text
    return header, [len(header) + begin for begin in begins]


def free_bytes(path: Path) -> int:
    """How many bytes may still be written on the file system that `path` is on, or will be on once it exists."""
    place = Path(os.path.abspath(path))
    while not place.exists():
        place = place.parent
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize


class ShardFileWriter(Closing):
    """One output file of a size known beforehand. Threads may write to it at once. A context manager.

    Every failure of the operating system is a StoppedError, since what is written so far is kept. Files are opened for
    writing alone: where several machines write one file, an NFS client that may read it would fill up a page around a
    small write and send all of it back, over what another machine has written there meanwhile.
    """

    def __init__(self, path: Path, fd: int, nbytes: int):
        self.path = path
        self.nbytes = nbytes
        self._fd = fd
        self._dirty = False  # whether bytes were written that no `sync` has made safe
        self._lost: OSError | None = None

    @classmethod
    def create(cls, path: Path, header: bytes, nbytes: int) -> ShardFileWriter:
        """A new file of `nbytes` bytes, header included, all of them reserved on the disk; replaces what was there.

        Where that fails nothing is left behind, and the error says how much is needed and free if space is short.
        """
        fd = -1
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            _reserve(fd, nbytes)
            _write_all(fd, memoryview(header), 0)
        except OSError as error:
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)
                with contextlib.suppress(OSError):
                    os.unlink(path)
            hint = hint_for(error)
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                with contextlib.suppress(OSError):
                    free = free_bytes(path)
                    hint = f"{path.name} needs {nbytes:,} bytes, {free:,} are free on its disk: make room"
            raise StoppedError(f"cannot create `{path}`: {error.strerror}", hint=hint) from error
        writer = cls(path, fd, nbytes)
        writer._dirty = True
        return writer

    @classmethod
    def open(cls, path: Path, nbytes: int) -> ShardFileWriter:
        """The file that `create` made in an earlier run, to go on with. It must have `nbytes` bytes."""
        try:
            fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            size = os.fstat(fd).st_size
        except OSError as error:
            raise StoppedError(f"cannot open `{path}`: {error.strerror}", hint=hint_for(error)) from error
        if size != nbytes:
            os.close(fd)
            raise StoppedError(
                f"`{path}` has {size} bytes where the plan has {nbytes}",
                hint="it is not this run's file, or it is damaged: remove the unfinished folder and start over",
            )
        return cls(path, fd, nbytes)

    def write(self, offset: int, buffer: memoryview | bytes) -> None:
        """Writes all of `buffer` at `offset`, which must lie inside the planned size."""
        view = memoryview(buffer).cast("B")
        if offset < 0 or offset + len(view) > self.nbytes:
            raise ValueError(f"bytes [{offset}, {offset + len(view)}) of a file of {self.nbytes}")
        self._dirty = True
        try:
            _write_all(self._fd, view, offset)
        except OSError as error:
            hint = f"{hint_for(error)}, then go on with `--resume`"
            raise StoppedError(f"cannot write `{self.path}`: {error.strerror}", hint=hint) from error

    def sync(self) -> None:
        """Returns when all that was written is on the disk. Once that has failed it fails for good: the system tells of
        a page that it could not write once, then drops it, and says at the next flush that all is well."""
        if self._lost is not None:
            raise self._stopped("flush", self._lost) from self._lost
        self._dirty = False  # before the flush: what is written meanwhile may miss it
        try:
            # macOS has no fdatasync.
            getattr(os, "fdatasync", os.fsync)(self._fd)
        except OSError as error:
            self._dirty, self._lost = True, error
            raise self._stopped("flush", error) from error

    def close(self) -> None:
        """Closes the file; a second call does nothing. An error matters only where bytes were not safe yet."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        try:
            os.close(fd)
        except OSError as error:
            if self._dirty:
                raise self._stopped("close", error) from error

    def _stopped(self, what: str, error: OSError) -> StoppedError:
        return StoppedError(f"cannot {what} `{self.path}`: {error.strerror}", hint=hint_for(error))


def _write_all(fd: int, view: memoryview, offset: int) -> None:
    place = 0
    while place < len(view):
        place += os.pwrite(fd, view[place : place + _MAX_WRITE], offset + place)


def _reserve(fd: int, nbytes: int) -> None:
    """Gives the file its size, with its blocks reserved where the file system can do that."""
    if hasattr(os, "posix_fallocate") and nbytes:
        try:
            os.posix_fallocate(fd, 0, nbytes)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV):
                raise
    os.ftruncate(fd, nbytes)
