"""Blocks of files on the Hub, kept on this disk while the tensors that they are of are at work."""

from __future__ import annotations

import os
import tempfile
import threading
from collections import Counter, OrderedDict
from contextlib import suppress
from pathlib import Path

Key = tuple[str, int]  # a file and the number of a block in it


class Spool:
    """Blocks of `size` bytes in a file without a name, `nbytes` at most, the latest used. Where the disk is full it
    holds none. For any number of threads."""

    def __init__(self, folder: Path, size: int, nbytes: int):
        found = os.statvfs(folder)
        room = found.f_bavail * found.f_frsize // 2  # the rest is for whoever else writes there
        self._size, self._most = size, min(-(-nbytes // size), room // size)
        self._file = tempfile.TemporaryFile(dir=folder, prefix="spool.")  # noqa: SIM115
        self._slots: OrderedDict[Key, int] = OrderedDict()
        self._written: set[int] = set()  # slots that are being written
        self._readers: Counter[int] = Counter()  # by slot
        self._lock = threading.Lock()

    def close(self) -> None:
        self._file.close()

    def holds(self, key: Key) -> bool:
        return key in self._slots

    def read(self, key: Key, within: int, data: memoryview) -> bool:
        """Fills `data` with the bytes of a block from byte `within` on, if the block is there."""
        with self._lock:
            slot = self._slots.get(key)
            if slot is None or slot in self._written:
                return False
            self._slots.move_to_end(key)
            self._readers[slot] += 1
        try:
            return os.preadv(self._file.fileno(), [data], slot * self._size + within) == len(data)
        except OSError:
            return False
        finally:
            with self._lock:
                self._readers[slot] -= 1

    def write(self, key: Key, data: memoryview) -> None:
        with self._lock:
            if key in self._slots:
                return
            slot = len(self._slots)
            if slot >= self._most:
                free = (k for k, s in self._slots.items() if s not in self._written and not self._readers[s])
                old = next(free, None)
                if old is None:
                    return
                slot = self._slots.pop(old)
            self._slots[key] = slot
            self._written.add(slot)
        whole = False
        with suppress(OSError):
            whole = os.pwrite(self._file.fileno(), data, slot * self._size) == len(data)
        with self._lock:
            self._written.discard(slot)
            if not whole:
                self._slots.pop(key, None)
                self._most = 0
