"""Scores that were measured before, in a file that several processes may share."""

from __future__ import annotations

import fcntl
import json
import math
import os
from pathlib import Path
from typing import Any

from mergekit_lite.errors import StoppedError
from mergekit_lite.limits import hint_for


class Memo:
    """Scores of this process, by what was merged and how it was scored."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], float] = {}

    def get(self, merged: str, score: str) -> float | None:
        """The score of what is `merged`, by the digests of both; None where it was never measured."""
        return self._known.get((merged, score))

    def put(self, merged: str, score: str, value: float) -> None:
        """Keep a score."""
        self._known[merged, score] = value


class Book(Memo):
    """One score a line, by what was merged and how it was scored. A torn last line, which a crash leaves, is dropped.

    What the command reads beside the merge, such as its test data, is not known here: a book belongs to one study.
    """

    def __init__(self, path: Path):
        """Read `path`, where there is such a file. Raises StoppedError where it cannot be read."""
        super().__init__()
        self.path = path
        self._read = 0

    def get(self, merged: str, score: str) -> float | None:
        if (merged, score) not in self._known:
            self._catch_up()
        return super().get(merged, score)

    def put(self, merged: str, score: str, value: float) -> None:
        """Keep a score. Raises StoppedError where the disk refuses."""
        line = json.dumps({"merged": merged, "score": score, "value": value}) + "\n"
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                size = os.fstat(file).st_size
                torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
                os.write(file, (b"\n" if torn else b"") + line.encode())
            finally:
                os.close(file)
        except OSError as fault:
            raise StoppedError(f"cannot write `{self.path}`: {fault.strerror}", hint=hint_for(fault)) from fault
        super().put(merged, score, value)

    def _catch_up(self) -> None:
        """Take in what was added since, by others too."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._read)
                data = file.read()
        except FileNotFoundError:
            return
        except OSError as fault:
            raise StoppedError(f"cannot read `{self.path}`: {fault.strerror}", hint=hint_for(fault)) from fault
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            entry = _entry(line)
            if entry is not None:
                self._known[entry[0]] = entry[1]


def _entry(line: bytes) -> tuple[tuple[str, str], float] | None:
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    merged, score, value = found.get("merged"), found.get("score"), found.get("value")
    if not (isinstance(merged, str) and isinstance(score, str) and isinstance(value, float) and math.isfinite(value)):
        return None
    return (merged, score), value
