"""What is finished, on disk, so that a stopped run goes on where it was.

One JSON object a line. The first names the plan and comes only once every file has its size; then come the processes
that worked on it, finished statistics and finished units. A torn last line is what a crash leaves and is dropped.

A unit is told as soon as its bytes are written, when a killed process no longer loses them but a machine that goes down
does. `{"safe": N}` says that all told in the first N bytes of the journal lies on the disk by now. Units told later
are believed on the machine that wrote them while it runs on; after a restart, or on another machine, they are done
again.

Where several ranks share the merge each has a journal, rank 1 `journal.1.jsonl` and so on. What a rank has to say to
the others stands there too, and the lock on it tells whether the rank is still at work: the system lets go of it
however the process ends. Rank 0 takes all of them into the main journal, at the end or when it goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_lite.errors import StoppedError
from mergekit_lite.limits import hint_for

NAME = "journal.jsonl"
OTHERS = "journal.*.jsonl"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def boot() -> str:
    """What tells this run of the system's kernel, with the pages that it has yet to write, from every other; empty
    where the system does not say."""
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return ""


@dataclass
class Done:
    """What an earlier run has finished: unit ids with their findings, statistics by pool, and whether all masks that
    are to be coded are, so that the plain ones may be gone."""

    units: dict[int, dict[str, Any]] = field(default_factory=dict)
    pools: dict[str, list[Any]] = field(default_factory=dict)
    coded: bool = False

    def among(self, units: Iterable[int]) -> Done:
        """What is finished of `units`, and every statistic."""
        return Done({unit: self.units[unit] for unit in units if unit in self.units}, self.pools, self.coded)


def path_of(folder: Path, rank: int) -> Path:
    """The journal of a rank."""
    return folder / (f"journal.{rank}.jsonl" if rank else NAME)


def is_held(file: int) -> bool:
    """Whether a process at work holds the journal that is open as `file`."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
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
        self._lock = threading.Lock()  # threads tell of their units themselves
        self._end = self._end_of_units = 0
        self._doubtful: int | None = None  # where the first unit stands that may not lie on the disk yet
        self._refused = False
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as fault:
            raise _refused(self.path, fault) from fault
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as fault:
            holder = _holder(_data(self._file))
            self.close()
            raise _taken(folder, holder) from fault
        except OSError as fault:
            if not _data(self._file):
                self.path.unlink(missing_ok=True)
            self.close()
            hint = "choose a folder on a file system with file locks, such as a local disk"
            raise StoppedError(f"cannot lock `{self.path}`: {fault.strerror}", hint=hint) from fault
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
        self._cut(0)
        self._append([head, self._process()])

    def read(self, head: dict[str, Any]) -> Done | None:
        """What the journal says is finished; None where another plan made it. Raises StoppedError where a whole line of
        it is no journal's, which no crash leaves behind. `safe` is to follow once the files are synced."""
        told = _parse(self.path, _data(self._file), head)
        if told is None:
            return None
        self._head = head
        self._cut(told.end)
        self._doubtful = told.doubtful
        self._append([self._process()])
        others = self.absorb()
        return Done(told.done.units | others.units, told.done.pools | others.pools, told.done.coded)

    def absorb(self) -> Done:
        """Take in what the other ranks' journals say, and remove them. Gives what was in them."""
        found = Done()
        for path in self._others():
            told = _parse(path, path.read_bytes(), self._head)
            if told is not None:
                done = told.done
                self._append([*done.units.values(), *({"pool": n, "stats": s} for n, s in done.pools.items())])
                found.units |= done.units
                found.pools |= done.pools
            path.unlink(missing_ok=True)
        return found

    def unit(self, unit: int, found: dict[str, Any]) -> None:
        """A unit whose bytes are written, though perhaps not on the disk yet."""
        if not self._refused:
            self._append([{"unit": unit, **found}], sync=False)

    def mark(self) -> int | None:
        """Where the journal ends, for `safe` after the bytes of all units told so far were synced; None where nothing
        told is in doubt."""
        with self._lock:
            return None if self._doubtful is None or self._refused else self._end

    def safe(self, mark: int) -> None:
        """All units told before `mark` lie on the disk."""
        self._append([{"safe": mark}])
        with self._lock:
            self._doubtful = mark if self._doubtful is not None and self._end_of_units > mark else None

    def distrust(self) -> None:
        """Forget the units in doubt, and hear of no more: the disk has refused bytes after they were written, which it
        says but once."""
        with self._lock:
            self._refused = True
            if self._doubtful is not None:
                self._cut(self._doubtful)
                self._doubtful = None

    def pool(self, name: str, stats: Sequence[Any]) -> None:
        """A statistic over all tensors."""
        self._append([{"pool": name, "stats": list(stats)}])

    def coded(self) -> None:
        """All masks are coded, and safe."""
        self._append([{"coded": True}])

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
        return {"process": os.getpid(), "host": socket.gethostname(), "boot": boot(), "run": self._run}

    def _append(self, entries: Sequence[dict[str, Any]], sync: bool = True) -> None:
        data = "".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries).encode()
        view = memoryview(data)
        try:
            with self._lock:
                begin = self._end
                try:
                    while view:
                        view = view[os.write(self._file, view) :]
                except OSError:
                    # What comes next, such as why the run stops, must not stand behind half a line.
                    os.ftruncate(self._file, begin)
                    raise
                self._end += len(data)
                if any("unit" in entry for entry in entries):
                    self._doubtful = begin if self._doubtful is None else self._doubtful
                    self._end_of_units = self._end
            if sync:
                os.fsync(self._file)
        except OSError as fault:
            raise _refused(self.path, fault) from fault

    def _cut(self, end: int) -> None:
        try:
            os.ftruncate(self._file, end)
        except OSError as fault:
            raise _refused(self.path, fault) from fault
        self._end = end


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
    told = _parse(path, data, head)
    return None if told is None else (head, told.done)


@dataclass
class _Told:
    """What a journal says: what is finished, where its last line to be believed ends, and where the first unit stands
    that is believed though it may not lie on the disk."""

    done: Done
    end: int
    doubtful: int | None


def _parse(path: Path, data: bytes, head: dict[str, Any]) -> _Told | None:
    """The whole lines of a journal; None where another plan made it."""
    lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
    told = _Told(Done(), 0, None)
    here, there = boot(), ""
    units: list[tuple[int, bool, dict[str, Any]]] = []  # where it stands, whether it was written here, the unit
    safe, coded = 0, -1
    try:
        first, *entries = [json.loads(line) for line in lines] or [None]
        if first != head:
            return None
        for line, entry in zip(lines, (first, *entries), strict=True):
            match entry:
                case _ if told.end == 0:
                    pass
                case {"unit": int(), "nonfinite": dict(), "overflow": dict()}:
                    units.append((told.end, bool(here) and there == here, entry))
                case {"pool": str(pool), "stats": list(stats)}:
                    told.done.pools[pool] = stats
                case {"safe": int(mark)}:
                    safe = max(safe, mark)
                case {"coded": True}:
                    coded = told.end
                case {"process": int()}:
                    there = str(entry.get("boot", ""))
                case {"say": str()}:
                    pass
                case _:
                    raise ValueError("no line of a journal")
            told.end += len(line)
    except ValueError as fault:
        hint = f"remove `{path.parent}` and start anew"
        raise StoppedError(f"the journal `{path}` is damaged", hint=hint) from fault
    for place, believed, entry in units:
        if place >= safe:
            if not believed:
                told.end = place
                break
            told.doubtful = place if told.doubtful is None else told.doubtful
        told.done.units[entry["unit"]] = entry
    told.done.coded = 0 <= coded < told.end
    return told


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
    return StoppedError(f"cannot write `{path}`: {fault.strerror}", hint=hint_for(fault))
