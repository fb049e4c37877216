"""BLAKE3 digests of whole files: of the inputs while they are merged, of the outputs once they are written.

A file that is larger than the memory left for it would be read from the disk twice, once for its digest and once for
the merge. Therefore inputs are digested in the order in which the merge wants them and only so far ahead that what was
read is still in the page cache when the merge comes by: the digest's thread reads ahead for the merge.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from blake3 import blake3

from mergekit_lite.errors import InputError
from mergekit_lite.limits import hint_for

CHUNK = 1 << 22  # bytes between two turns at Python's lock, for which this thread has to wait
SWITCH = 0.0005  # seconds until a thread that computes in Python lets another one have a turn: torch's import does
PIECE = 1 << 26  # bytes of one file that are read before another one's turn
LEAD = 1 << 32  # bytes that the digests may be ahead of the merge, if there is memory for them


class _File:
    """A file on its way through the digest."""

    def __init__(self, path: str, threads: int = 1):
        self.path = path
        self.at = 0
        self.busy = False
        self.digest = blake3(max_threads=threads)

    def take(self, stop: int | None) -> bool:
        """Digest up to byte `stop`, or to the end; False at the end of the file. Raises InputError."""
        chunk = memoryview(bytearray(CHUNK))
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                while stop is None or self.at < stop:
                    count = os.preadv(fd, [chunk[: CHUNK if stop is None else min(CHUNK, stop - self.at)]], self.at)
                    if not count:
                        return False
                    self.digest.update(chunk[:count])
                    self.at += count
            finally:
                os.close(fd)
        except OSError as fault:
            hint = "was it moved during the run?" if fault.errno == errno.ENOENT else hint_for(fault)
            raise InputError(f"cannot read `{self.path}`: {fault.strerror}", hint=hint) from fault
        return True


def file_digests(paths: Iterable[Path], threads: int) -> dict[str, str]:
    """The digest of every file, in hexadecimal digits, by path. Raises InputError where one cannot be read."""
    names = [str(path) for path in paths]

    def one(path: str) -> str:
        file = _File(path, max(1, threads // len(names)))
        file.take(None)
        return file.digest.hexdigest()

    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


class Digests:
    """The digests of the inputs, formed by a thread of its own. A context manager.

    `wanted` names parts of files, `(path, stop)`, in the order in which the merge will read them; `paths` are all
    files.
    """

    def __init__(self, wanted: Sequence[tuple[str, int]], paths: Iterable[str], lead: int | None = None):
        self._files = {path: _File(path) for path in paths}
        self._parts = _pieces(wanted, self._files)
        self._lead = min(LEAD, _spare_memory() // 4) if lead is None else lead
        self._merged = 0
        self._begun = 0  # bytes of them
        self._fault: BaseException | None = None
        self._stopped = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="digest", daemon=True)

    def __enter__(self) -> Digests:
        self._thread.start()
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._change:
            self._stopped = True
            self._change.notify_all()
        self._thread.join()
        sys.setswitchinterval(self._interval)

    def advance(self, merged: int) -> None:
        """Tell how many bytes the merge has read."""
        with self._change:
            self._merged = merged
            self._change.notify_all()

    def result(self, threads: int) -> Mapping[str, str]:
        """The digests by path, once all files are through; `threads` threads do what is left. Raises InputError."""
        with self._change:
            self._lead = 1 << 62
            self._change.notify_all()
        workers = [self._thread]
        with contextlib.suppress(RuntimeError):  # where the system allows no more threads, fewer do it
            for _ in range(threads - 1):
                helper = threading.Thread(target=self._work, daemon=True)
                helper.start()
                workers.append(helper)
        for thread in workers:
            thread.join()
        if self._fault is not None:
            raise self._fault
        return {path: file.digest.hexdigest() for path, file in self._files.items()}

    def _work(self) -> None:
        try:
            while (part := self._part()) is not None:
                file, stop = part
                file.take(stop)
                with self._change:
                    file.busy = False
                    self._change.notify_all()
        except BaseException as fault:
            with self._change:
                self._fault = fault
                self._stopped = True
                self._change.notify_all()

    def _part(self) -> tuple[_File, int | None] | None:
        """The next part whose file nobody is at, once it is its turn; None at the end."""
        with self._change:
            while not self._stopped and self._parts:
                if self._begun - self._merged < self._lead:
                    place = next((i for i, (path, _, _) in enumerate(self._parts) if not self._files[path].busy), None)
                    if place is not None:
                        path, stop, nbytes = self._parts.pop(place)
                        self._begun += nbytes
                        self._files[path].busy = True
                        return self._files[path], stop
                self._change.wait()
        return None


def _pieces(wanted: Sequence[tuple[str, int]], files: Iterable[str]) -> list[tuple[str, int | None, int]]:
    """`(path, stop, bytes)`: every file up to the end in ascending pieces, in the order in which they are wanted."""
    reached = dict.fromkeys(files, 0)
    pieces: list[tuple[str, int | None, int]] = []
    for path, stop in wanted:
        if stop - reached[path] >= PIECE:
            pieces.append((path, stop, stop - reached[path]))
            reached[path] = stop
    return [*pieces, *((path, None, 0) for path in reached)]


def _spare_memory() -> int:
    """Bytes that the system could give to its page cache without taking them from anybody, at a guess."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 1 << 30
