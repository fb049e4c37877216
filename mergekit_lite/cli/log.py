"""`--log json`: what a command says on stderr as JSON, one object a line, for machines that keep logs.

Every line has `time` (UTC, ISO 8601), `level` (`info`, `warning`, `error`) and `event`:

    start     command, version
    plan      plan (its digest), outputs, bytes_read, bytes_written, tensors
    progress  phase (`align`, `measure`, `merge`), step, label, done, total, unit (`bytes`, `tensors`, `spaces`),
              percent, bytes_read, seconds since the phase began; in `merge` also tensors, all_tensors, shard, shards
    note      message
    warning   message, place (file, line, column, or null), hint (or null)
    error     the same
    text      message: a line that a library or Python wrote to stderr
    wrote     to, bytes, shards, lock
    pushed    repo, branch, commit (null where nothing was new), url
    end       exit_code, seconds

More fields and events may come; none of these will go. Control characters are escaped, secrets taken out. There is no
progress bar, and a line of progress at most every few seconds, but always that of a phase's beginning and its end.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TextIO

from mergekit_lite.cli import show

if TYPE_CHECKING:
    from mergekit_lite.plan.model import Plan
    from mergekit_lite.publish.push import Pushed
    from mergekit_lite.run.progress import Progress

EVERY = 5.0  # seconds between two lines of progress in one phase
_UNITS = {"merge": "bytes", "measure": "tensors", "align": "spaces"}


class Log:
    """Writes events to a stream, a line each. Threads may write at once."""

    def __init__(self, to: TextIO):
        self._to = to
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._phase = ""
        self._since = 0.0
        self._told: float | None = None
        self._waiting: tuple[str, dict[str, Any]] | None = None

    def event(self, event: str, level: str = "info", **fields: Any) -> None:
        """One line, with what was held back of the progress before it."""
        with self._lock:
            if event != "text":  # what a library writes in between does not end a phase
                self._flush()
            self._write(event, level, fields)

    def end(self, code: int) -> None:
        self.event("end", "error" if code else "info", exit_code=code, seconds=_seconds(self._began))

    def progress(self, now: Progress) -> None:
        """A line if it is time for one. The last of a phase is told by whatever comes next."""
        clock = time.monotonic()
        with self._lock:
            if now.phase != self._phase:
                self._flush()
                self._phase, self._since, self._told = now.phase, clock, None
            fields = _fields(now, _seconds(self._since))
            if self._told is not None and clock - self._told < EVERY:
                self._waiting = _stamp(), fields
                return
            self._waiting, self._told = None, clock
            self._write("progress", "info", fields)

    def _flush(self) -> None:
        if self._waiting is not None:
            stamp, fields = self._waiting
            self._write("progress", "info", fields, stamp)
            self._waiting = None

    def _write(self, event: str, level: str, fields: Mapping[str, Any], stamp: str | None = None) -> None:
        text = show.json_line({"time": stamp or _stamp(), "level": level, "event": event, **fields})
        with contextlib.suppress(OSError, ValueError):  # a merge goes on though nobody reads its log any more
            self._to.write(f"{text}\n")  # at once, so that Ctrl-C does not cut a line in two
            self._to.flush()


class Lines(io.TextIOBase):
    """Stands for stderr: each line that is written to it becomes an event `text`."""

    encoding = "utf-8"

    def __init__(self, log: Log):
        self._log = log
        self._left = ""
        self._lock = threading.Lock()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._left = (self._left + text).replace("\r", "\n").split("\n")
        for line in lines:
            if line.strip():
                self._log.event("text", message=line)
        return len(text)

    def rest(self) -> None:
        """What has no line's end yet."""
        self.write("\n")


_current: Log | None = None


def current() -> Log | None:
    """Where events go now; None where stderr is for people."""
    return _current


def wanted(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for JSON lines; it may be wrong otherwise, which is then told as one."""
    words = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    return "--log=json" in words or any(pair == ("--log", "json") for pair in itertools.pairwise(words))


@contextlib.contextmanager
def as_events(arguments: Sequence[str], version: Callable[[], str]) -> Iterator[Log | None]:
    """Within the block stderr holds JSON lines alone, if `arguments` ask for them. What native code writes past Python
    is not caught."""
    global _current
    if not wanted(arguments):
        yield None
        return
    before = sys.stderr
    _current = log = Log(before)
    lines = Lines(log)
    sys.stderr = lines
    show.listen(log.event)
    try:
        log.event("start", command=arguments[0], version=version())
        yield log
    finally:
        lines.rest()
        show.listen(None)
        sys.stderr, _current = before, None


def planned(plan: Plan) -> None:
    """What is about to be done, if events are asked for."""
    if _current is not None:
        outputs = [output.to for output in plan.outputs]
        read, written = plan.bytes_read, plan.bytes_written
        _current.event(
            "plan", plan=plan.digest, outputs=outputs, bytes_read=read, bytes_written=written, tensors=len(plan.units)
        )


def wrote(plan: Plan) -> None:
    """The outputs, once they have their names."""
    if _current is None:
        return
    for output in plan.outputs:
        lock = os.path.join(output.to, "recipe.lock.yaml")
        _current.event("wrote", to=output.to, bytes=output.nbytes, shards=len(output.shards), lock=lock)


def pushed(done: Sequence[Pushed]) -> None:
    """What has been published."""
    if _current is None:
        return
    for one in done:
        _current.event("pushed", repo=one.repo, branch=one.branch, commit=one.commit, url=one.url)


def _fields(now: Progress, seconds: float) -> dict[str, Any]:
    done, total = min(now.done, now.total) if now.phase != "measure" else now.done, now.total
    if now.phase == "measure" and total:  # statistics may need several looks at all tensors
        done = (now.done - 1) % total + 1 if now.done else 0
    place = {"tensors": now.tensors, "all_tensors": now.all_tensors, "shard": now.shard, "shards": now.shards}
    return {
        "phase": now.phase,
        "step": now.step,
        "label": now.label,
        "done": done,
        "total": total,
        "unit": _UNITS[now.phase],
        "percent": round(100 * done / total, 1) if total else 100.0,
        "bytes_read": now.read,
        "seconds": seconds,
        **(place if now.phase == "merge" else {}),
    }


def _stamp() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _seconds(since: float) -> float:
    return round(time.monotonic() - since, 3)
