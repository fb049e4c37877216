"""What is finished, on disk, so that a stopped run goes on where it was.

One JSON object a line. The first names the plan; then come finished statistics and finished units, each written only
after the bytes it speaks of are safe. A torn last line is what a crash leaves and is dropped.
"""

from __future__ import annotations

import fcntl
import json
import os
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
        self.path = folder / NAME
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as fault:
            os.close(self._file)
            hint = "wait for it to end, or give another output folder"
            raise StoppedError(f"another run is writing into `{folder}`", hint=hint) from fault

    def begin(self, head: dict[str, Any]) -> None:
        """Start anew with the plan's identity."""
        os.ftruncate(self._file, 0)
        self._append([head])

    def read(self, head: dict[str, Any]) -> Done | None:
        """What the journal says is finished; None where it was made by another plan, or by none."""
        size = os.fstat(self._file).st_size
        data = os.pread(self._file, size, 0)
        while len(data) < size:
            more = os.pread(self._file, size - len(data), len(data))
            if not more:
                break
            data += more
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.splitlines()
        try:
            entries = [json.loads(line) for line in lines]
        except ValueError:
            return None
        if not entries or entries[0] != head:
            return None
        if len(whole) < len(data):
            os.ftruncate(self._file, len(whole))
        done = Done()
        for entry in entries[1:]:
            if "pool" in entry:
                done.pools[entry["pool"]] = entry["stats"]
            else:
                done.units[entry["unit"]] = entry
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

    def _append(self, entries: Sequence[dict[str, Any]]) -> None:
        data = "".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries).encode()
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]
        os.fsync(self._file)
