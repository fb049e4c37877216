"""What is finished, on disk, so that a stopped run goes on where it was.

One JSON object a line. The first names the plan and comes only once every file has its size; then come the processes
that worked on it, finished statistics and finished units, each written only after the bytes it speaks of are safe. A
torn last line is what a crash leaves and is dropped.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_lite.errors import StoppedError

NAME = "journal.jsonl"


@dataclass
class Done:
    """What an earlier run has finished: unit ids with their findings, and statistics by pool."""

    units: dict[int, dict[str, Any]] = field(default_factory=dict)
    pools: dict[str, list[Any]] = field(default_factory=dict)


class Journal:
    """The journal of one run, held under a lock: two runs never write into one output."""

    def __init__(self, folder: Path):
        """Take the journal of a partial folder, making it where there is none. Raises StoppedError where another run
        holds it or the file system refuses."""
        self.path = folder / NAME
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as fault:
            raise _refused(self.path, fault) from fault
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as fault:
            holder = self._holder()
            self.close()
            hint = "wait for it to end, or give another output folder"
            raise StoppedError(f"another run{holder} is writing into `{folder}`", hint=hint) from fault

    @property
    def started(self) -> bool:
        """Whether a plan is named in it: a crash before that leaves files that hold nothing yet."""
        return b"\n" in self._data()

    def begin(self, head: dict[str, Any]) -> None:
        """Start anew with the plan's identity."""
        os.ftruncate(self._file, 0)
        self._append([head, _process()])

    def read(self, head: dict[str, Any]) -> Done | None:
        """What the journal says is finished; None where another plan made it. Raises StoppedError where a whole line of
        it is no journal's, which no crash leaves behind."""
        data = self._data()
        whole = data[: data.rfind(b"\n") + 1]
        done = Done()
        try:
            first, *entries = [json.loads(line) for line in whole.splitlines()]
            if first != head:
                return None
            for entry in entries:
                match entry:
                    case {"unit": int(unit), "nonfinite": dict(), "overflow": dict()}:
                        done.units[unit] = entry
                    case {"pool": str(pool), "stats": list(stats)}:
                        done.pools[pool] = stats
                    case {"process": int()}:
                        pass
                    case _:
                        raise ValueError("no line of a journal")
        except ValueError as fault:
            hint = f"remove `{self.path.parent}` and start anew"
            raise StoppedError(f"the journal `{self.path}` is damaged", hint=hint) from fault
        os.ftruncate(self._file, len(whole))
        self._append([_process()])
        return done

    def units(self, entries: Iterable[tuple[int, dict[str, Any]]]) -> None:
        """Units whose bytes are safe on disk."""
        self._append([{"unit": unit, **found} for unit, found in entries])

    def pool(self, name: str, stats: Sequence[Any]) -> None:
        """A statistic over all tensors."""
        self._append([{"pool": name, "stats": list(stats)}])

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _data(self) -> bytes:
        data = bytearray()
        while part := os.pread(self._file, 1 << 20, len(data)):
            data += part
        return bytes(data)

    def _holder(self) -> str:
        """` (process 4711 on host)` of the run that holds the journal, where it says."""
        for line in reversed(self._data().splitlines()):
            try:
                entry = json.loads(line)
                return f" (process {entry['process']} on {entry['host']})"
            except (ValueError, TypeError, KeyError):
                continue
        return ""

    def _append(self, entries: Sequence[dict[str, Any]]) -> None:
        data = "".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries).encode()
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._file, view) :]
            os.fsync(self._file)
        except OSError as fault:
            raise _refused(self.path, fault) from fault


def _process() -> dict[str, Any]:
    return {"process": os.getpid(), "host": socket.gethostname()}


def _refused(path: Path, fault: OSError) -> StoppedError:
    hint = "make room on the disk, or choose a folder that you may write to"
    return StoppedError(f"cannot write `{path}`: {fault.strerror}", hint=hint)
