"""Reads tensors' bytes, any range of them, from many threads.

With preadv into the caller's memory, not with mmap: a file that is truncated under a mapping kills the process with
SIGBUS where preadv returns an error that can be told; a cache-sized block is read faster than its pages are faulted in;
and mapped pages would count as memory of the process.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from mergekit_lite.checkpoint.meta import ShardFile, TensorMeta
from mergekit_lite.checkpoint.source import Source
from mergekit_lite.errors import InputError, StoppedError
from mergekit_lite.limits import OPEN_FILES

MAX_OPEN_FILES = 64
_MAX_READ = 2**30  # Linux reads 2 GiB less a page at most in one call, macOS refuses more than 2 GiB


def _share_of_files() -> int:
    """How many files may be open for reading, where outputs and digests need some too."""
    try:
        import resource
    except ImportError:  # Windows
        return MAX_OPEN_FILES
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN_FILES if allowed == resource.RLIM_INFINITY else max(4, allowed // 2 - 24)


@dataclass(slots=True)
class _OpenFile:
    fd: int
    users: int = 0


class Reader(Source):
    """Reads from the given shards, each of which must be what it was when its header was read.

    Keeps at most `max_open` files open, more only while as many threads read at once. Use it as a context manager.
    """

    def __init__(self, shards: Iterable[ShardFile], max_open: int = MAX_OPEN_FILES):
        self._shards = {shard.path: shard for shard in shards}
        self._max_open = min(max_open, _share_of_files())
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()  # the least recently opened first
        self._lock = threading.Lock()
        self._ctimes: dict[str, tuple[int, int]] = {}  # as first and as last seen
        self._closed = False

    def close(self) -> None:
        """Closes every file that no thread is reading; the others are closed when their read ends."""
        with self._lock:
            self._closed = True
            self._drop_idle(0)

    def check(self) -> None:
        """Raises InputError where a file is not what it was when its header was read."""
        for shard in self._shards.values():
            with self._lock:
                os.close(self._open_one(shard.path))

    @property
    def touched(self) -> tuple[str, ...]:
        """Files whose size and mtime stayed and whose ctime did not, between the first look at them and the latest:
        only their rights, links or names changed, or their bytes did and the mtime was set back."""
        return tuple(path for path, (first, latest) in self._ctimes.items() if first != latest)

    def read_bytes(self, meta: TensorMeta, start_byte: int, stop_byte: int, buffer: memoryview) -> None:
        """Fills `buffer`, writable and of `stop_byte - start_byte` bytes, with that range of the tensor's bytes.

        Raises InputError where the file changed or cannot be read.
        """
        if not 0 <= start_byte <= stop_byte <= meta.nbytes:
            raise ValueError(f"bytes [{start_byte}, {stop_byte}) of a tensor of {meta.nbytes}")
        if buffer.format != "B":
            buffer = buffer.cast("B")
        if len(buffer) != stop_byte - start_byte:
            raise ValueError(f"a buffer of {len(buffer)} bytes for {stop_byte - start_byte}")
        file = self._take(meta.file)
        try:
            place, end = 0, len(buffer)
            while place < end:
                try:
                    # Python itself repeats a call that a signal interrupted.
                    part = buffer[place : place + _MAX_READ] if place or end > _MAX_READ else buffer
                    count = os.preadv(file.fd, [part], meta.start + start_byte + place)
                except OSError as error:
                    raise InputError(
                        f"cannot read tensor `{meta.name}` from `{meta.file}`: {error.strerror}",
                        hint="check the disk or the network mount",
                    ) from error
                if count == 0:
                    raise InputError(
                        f"`{meta.file}` became shorter while it was read, inside tensor `{meta.name}`",
                        hint="download the file again and let nothing else write it during the run",
                    )
                place += count
        finally:
            self._give_back(file)

    # A pair of calls and no context manager, which would cost as much as the read of a small block.

    def _take(self, path: str) -> _OpenFile:
        """The file, open until it is given back."""
        with self._lock:
            if self._closed:
                raise ValueError("the reader is closed")
            file = self._open.get(path)
            if file is None:
                file = self._open[path] = _OpenFile(self._open_one(path))
            file.users += 1
            if len(self._open) > self._max_open:
                self._open.move_to_end(path)
                self._drop_idle(self._max_open)
        return file

    def _give_back(self, file: _OpenFile) -> None:
        with self._lock:
            file.users -= 1
            if self._closed or len(self._open) > self._max_open:
                self._drop_idle(0 if self._closed else self._max_open)

    def _drop_idle(self, keep: int) -> None:
        """Closes files that no thread reads, the least recently opened first, until `keep` are open. Under the lock."""
        idle = [path for path, file in self._open.items() if not file.users]
        for path in idle[: max(0, len(self._open) - keep)]:
            os.close(self._open.pop(path).fd)

    def _open_one(self, path: str) -> int:
        """Opens a file, where the process may open no more in the place of one that no thread reads. Under the lock."""
        try:
            return self._open_unchanged(self._shards[path])
        except StoppedError:
            before = len(self._open)
            self._drop_idle(0)
            if len(self._open) == before:
                raise
            return self._open_unchanged(self._shards[path])

    def _open_unchanged(self, shard: ShardFile) -> int:
        """A descriptor of the file, if it still has the size and the mtime that the plan saw."""
        try:
            fd = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            found = os.fstat(fd)
        except OSError as error:
            message = f"cannot open `{shard.path}`: {error.strerror}"
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise StoppedError(message, hint=OPEN_FILES) from error
            raise InputError(message, hint="the plan needs every input") from error
        if (found.st_size, found.st_mtime_ns) != (shard.nbytes, shard.mtime_ns):
            os.close(fd)
            raise InputError(
                f"`{shard.path}` changed since it was planned",
                hint="let nothing write the inputs during a run, and plan again",
            )
        self._ctimes[shard.path] = (self._ctimes.get(shard.path, (found.st_ctime_ns,))[0], found.st_ctime_ns)
        if hasattr(os, "posix_fadvise"):
            # Doubles the read-ahead; blocks come in ascending order. A file system may not know it: that does no harm.
            with suppress(OSError):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return fd
