"""What is finished, on disk, so that a stopped run goes on where it was.

One JSON object a line. The first names the plan and comes only once every file has its size; then come the processes
that worked on it, finished statistics and finished units, each written only after the bytes it speaks of are safe. A
torn last line is what a crash leaves and is dropped.

Where several ranks share the merge each has a journal, rank 1 `journal.1.jsonl` and so on. What a rank has to say to
the others stands there too, and the lock on it tells whether the rank is still at work: the system lets go of it
however the process ends. Rank 0 takes all of them into the main journal, at the end or when it goes on.
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
OTHERS = "journal.*.jsonl"


@dataclass
class Done:
    """What an earlier run has finished: unit ids with their findings, and statistics by pool."""

    units: dict[int, dict[str, Any]] = field(default_factory=dict)
    pools: dict[str, list[Any]] = field(default_factory=dict)

    def among(self, units: Iterable[int]) -> Done:
        """What is finished of `units`, and every statistic."""
        return Done({unit: self.units[unit] for unit in units if unit in self.units}, self.pools)


def path_of(folder: Path, rank: int) -> Path:
    """The journal of a rank."""
    return folder / (f"journal.{rank}.jsonl" if rank else NAME)


def is_held(file: int) -> bool:
    """Whether a process at work holds the journal that is open as `file`."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


class Journal:
    """The journal of one run, or of one rank of it, held under a lock: two runs never write into one output."""

    def __init__(self, folder: Path, rank: int = 0, run: str = ""):
        """Take the journal of a partial folder, making it where there is none; `run` names this run of all ranks.
        Raises StoppedError where another run holds it, or that of another rank, or the file system refuses."""
        self.path = path_of(folder, rank)
        self._run = run
        self._head: dict[str, Any] = {}
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as fault:
            raise _refused(self.path, fault) from fault
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as fault:
            holder = _holder(_data(self._file))
            self.close()
            raise _taken(folder, holder) from fault
        if rank == 0:
            try:
                for path in self._others():
                    _check_free(path)
            except BaseException:
                self.close()
                raise

    @property
    def started(self) -> bool:
        """Whether a plan is named in it: a crash before that leaves files that hold nothing yet."""
        return b"\n" in _data(self._file)

    def begin(self, head: dict[str, Any]) -> None:
        """Start anew with the plan's identity."""
        self._head = head
        os.ftruncate(self._file, 0)
        self._append([head, self._process()])

    def read(self, head: dict[str, Any]) -> Done | None:
        """What the journal says is finished; None where another plan made it. Raises StoppedError where a whole line of
        it is no journal's, which no crash leaves behind."""
        data = _data(self._file)
        whole = data[: data.rfind(b"\n") + 1]
        done = _parse(self.path, whole, head)
        if done is None:
            return None
        self._head = head
        os.ftruncate(self._file, len(whole))
        self._append([self._process()])
        others = self.absorb()
        return Done(done.units | others.units, done.pools | others.pools)

    def absorb(self) -> Done:
        """Take in what the other ranks' journals say, and remove them. Gives what was in them."""
        found = Done()
        for path in self._others():
            done = _parse(path, path.read_bytes(), self._head)
            if done is not None:
                self._append([*done.units.values(), *({"pool": n, "stats": s} for n, s in done.pools.items())])
                found.units |= done.units
                found.pools |= done.pools
            path.unlink(missing_ok=True)
        return found

    def units(self, entries: Iterable[tuple[int, dict[str, Any]]]) -> None:
        """Units whose bytes are safe on disk."""
        self._append([{"unit": unit, **found} for unit, found in entries])

    def pool(self, name: str, stats: Sequence[Any]) -> None:
        """A statistic over all tensors."""
        self._append([{"pool": name, "stats": list(stats)}])

    def say(self, key: str, value: Any) -> None:
        """Something for the other ranks of this run."""
        self._append([{"say": key, "value": value, "run": self._run}])

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _others(self) -> list[Path]:
        """The journals of other ranks, which only the main one's holder looks for."""
        return sorted(self.path.parent.glob(OTHERS))

    def _process(self) -> dict[str, Any]:
        return {"process": os.getpid(), "host": socket.gethostname(), "run": self._run}

    def _append(self, entries: Sequence[dict[str, Any]]) -> None:
        data = "".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries).encode()
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._file, view) :]
            os.fsync(self._file)
        except OSError as fault:
            raise _refused(self.path, fault) from fault


def read_beside(folder: Path, run: str) -> tuple[dict[str, Any], Done] | None:
    """The plan's identity in the main journal and what it says is finished, for the other ranks of the run that holds
    it; None where it is not the journal of this run, or there is none. Raises StoppedError where it is damaged."""
    path = path_of(folder, 0)
    try:
        data = path.read_bytes()
        if json.dumps(run).encode() not in data:
            return None
        head = json.loads(data[: data.index(b"\n")])
    except (OSError, ValueError):
        return None
    done = _parse(path, data, head)
    return None if done is None else (head, done)


def _parse(path: Path, data: bytes, head: dict[str, Any]) -> Done | None:
    """The whole lines of a journal; None where another plan made it."""
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    done = Done()
    try:
        first, *entries = [json.loads(line) for line in lines] or [None]
        if first != head:
            return None
        for entry in entries:
            match entry:
                case {"unit": int(unit), "nonfinite": dict(), "overflow": dict()}:
                    done.units[unit] = entry
                case {"pool": str(pool), "stats": list(stats)}:
                    done.pools[pool] = stats
                case {"process": int()} | {"say": str()}:
                    pass
                case _:
                    raise ValueError("no line of a journal")
    except ValueError as fault:
        hint = f"remove `{path.parent}` and start anew"
        raise StoppedError(f"the journal `{path}` is damaged", hint=hint) from fault
    return done


def _check_free(path: Path) -> None:
    """Raises StoppedError where another rank's journal is held."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if is_held(file):
            raise _taken(path.parent, _holder(_data(file)))
    finally:
        os.close(file)


def _data(file: int) -> bytes:
    data = bytearray()
    while part := os.pread(file, 1 << 20, len(data)):
        data += part
    return bytes(data)


def _holder(data: bytes) -> str:
    """` (process 4711 on host)` of the run that holds a journal, where it says."""
    for line in reversed(data.splitlines()):
        try:
            entry = json.loads(line)
            return f" (process {entry['process']} on {entry['host']})"
        except (ValueError, TypeError, KeyError):
            continue
    return ""


def _taken(folder: Path, holder: str) -> StoppedError:
    hint = "wait for it to end, or give another output folder"
    return StoppedError(f"another run{holder} is writing into `{folder}`", hint=hint)


def _refused(path: Path, fault: OSError) -> StoppedError:
    hint = "make room on the disk, or choose a folder that you may write to"
    return StoppedError(f"cannot write `{path}`: {fault.strerror}", hint=hint)
