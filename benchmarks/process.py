"""Whole processes measured: wall and processor time, largest anonymous memory; and the floor they are held against."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

INTERVAL = 0.01  # seconds between two looks at a process's memory


class FailedRun(Exception):
    """A measured process ended with an error; the message is the end of what it said."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Seconds by the clock, seconds of processor time in and out of the kernel, bytes of RssAnon at their largest."""

    wall: float
    cpu: float
    peak: int

    def as_json(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds that `cat` of every input to /dev/null takes, and `cp` of the first one; `flush` is what it takes to get
    that copy onto the disk, which a merge does too but the floor does not count."""

    cat: float
    cp: float
    flush: float

    @property
    def seconds(self) -> float:
        return self.cat + self.cp


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Usage:
    """Run one process to its end. Raises FailedRun where it fails."""
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, env=environment)
        peak = _Peak(process.pid)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            text = said.read().decode(errors="replace").strip()[-500:]
            raise FailedRun(f"{' '.join(command[:4])} ... exited with {process.returncode}: {text}")
    return Usage(wall, used.ru_utime + used.ru_stime, peak.stop())


class _Peak:
    """Watches a process's anonymous memory from a thread."""

    def __init__(self, pid: int):
        self._status = Path(f"/proc/{pid}/status")
        self._largest = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """The largest number of bytes that was seen."""
        self._ended.set()
        self._thread.join()
        return self._largest

    def _watch(self) -> None:
        while not self._ended.wait(INTERVAL):
            try:
                lines = self._status.read_text().splitlines()
            except OSError:
                return
            found = next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)
            self._largest = max(self._largest, found * 1024)


def weight_files(folders: Iterable[Path]) -> list[Path]:
    """The safetensors files of checkpoints."""
    return [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]


def floor(folders: Sequence[Path], out: Path, cold: bool = False) -> Floor:
    """Read every checkpoint and copy the first to `out`, which is removed again."""
    if cold:
        forget(weight_files(folders))
    began = time.perf_counter()
    with open(os.devnull, "wb") as nowhere:
        subprocess.run(["cat", *map(str, weight_files(folders))], stdout=nowhere, check=True)
    read = time.perf_counter()
    # Where the file system can share blocks, a plain cp would copy nothing.
    subprocess.run(["cp", "-r", "--reflink=never", str(folders[0]), str(out)], check=True)
    copied = time.perf_counter()
    subprocess.run(["sync", *map(str, weight_files([out]))], check=True)
    flushed = time.perf_counter()
    shutil.rmtree(out)
    return Floor(read - began, copied - read, flushed - copied)


def forget(files: Iterable[Path]) -> None:
    """Drop the pages of `files` from the page cache, so that they are read from the disk."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def clear(target: Path) -> None:
    """Remove an output, whole or unfinished."""
    for left in (target, target.with_name(target.name + ".partial")):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)
