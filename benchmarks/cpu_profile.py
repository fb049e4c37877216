"""Where the processor time of one `merge run` goes. bench.py calls this as a process of its own.

    python cpu_profile.py RECIPE REPORT.json

The command runs on one thread in this process, beside the thread that digests the inputs. Every two milliseconds the
stack of each thread is looked at, and the processor time that the thread has used since the last look goes to what
stands there: the innermost function of the program, so that an operation of torch counts for the line that calls it.
Functions become `read`, `convert` or a kernel by the file they stand in; what no rule knows keeps its own name.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import FrameType

INTERVAL = 0.002
PACKAGE = "/mergekit_lite/"
# (part of a file's path, function or "" for any) -> what it is called; the first that fits.
RULES = (
    ("checkpoint/reader", "", "read"),
    ("checkpoint/writer", "sync", "flush"),
    ("checkpoint/writer", "", "write"),
    ("run/sink", "sync", "flush"),
    ("run/sink", "", "write"),
    ("run/digest", "", "digest"),
    ("run/publish", "fsync_folder", "flush"),
    ("run/finish", "_write", "flush"),
    ("run/program", "load", "convert to float32"),
    ("run/compute", "watch", "look for NaN"),
    ("run/nonfinite", "", "look for NaN"),
    ("run/compute", "unit", "convert to bfloat16"),
    ("run/", "", "the loop"),
    ("plan/", "", "plan"),
    ("recipe/", "", "plan"),
    ("family/", "", "plan"),
    ("checkpoint/", "", "plan"),
    ("methods/registry", "", "plan"),
    ("methods/spec", "", "plan"),
)


def place_of(frame: FrameType | None) -> str:
    """What a stack is at."""
    inner: str | None = None
    at = frame
    while at is not None:
        file = at.f_code.co_filename
        if file.startswith("<frozen importlib"):
            return "import"
        if inner is None and PACKAGE in file:
            inner = _named(file.rsplit(PACKAGE, 1)[1], at.f_code.co_name, _qualified(at))
        at = at.f_back
    return inner or "Python itself"


def _named(file: str, function: str, qualified: str) -> str:
    for part, name, called in RULES:
        if file.startswith(part) and name in ("", function):
            return called
    kind = "kernel " if file.startswith("methods/") else ""
    return f"{kind}{Path(file).stem}.{qualified}"


def _qualified(frame: FrameType) -> str:
    """The function of a frame with its class where Python tells it, a comprehension as part of its function."""
    name: str = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)
    return name.split(".<locals>")[0].strip("<>")


def thread_seconds(native: int) -> float:
    """Processor time of a thread of this process. Raises OSError where it has ended."""
    # What pthread_getcpuclockid gives, which must not be asked about a thread that may be gone.
    return time.clock_gettime((~native << 3) | 6)


class Sampler:
    """Adds up the processor time of all threads by place, from a thread of its own."""

    def __init__(self) -> None:
        self.cpu: defaultdict[str, float] = defaultdict(float)
        self.wall: defaultdict[str, float] = defaultdict(float)
        self.own = 0.0
        self._seen: dict[int, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sampler", daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        me = threading.get_native_id()
        last = time.perf_counter()
        while not self._ended.wait(INTERVAL):
            now = time.perf_counter()
            self._look(me, now - last)
            last = now
        self._look(me, time.perf_counter() - last)
        self.own = time.thread_time()

    def _look(self, me: int, passed: float) -> None:
        frames = sys._current_frames()
        for thread in threading.enumerate():
            native, frame = thread.native_id, frames.get(thread.ident or -1)
            if native is None or native == me or frame is None:
                continue
            try:
                total = thread_seconds(native)
            except OSError:
                continue
            place = place_of(frame)
            self.cpu[place] += total - self._seen.get(native, 0.0)
            self.wall[place] += passed
            self._seen[native] = total


def main() -> int:
    recipe, report = sys.argv[1:]
    began = time.perf_counter()
    sys.setswitchinterval(INTERVAL / 4)
    with Sampler() as sampler:
        sampler._seen[threading.main_thread().native_id or 0] = started = time.thread_time()
        from mergekit_lite.cli.app import execute

        code = execute(["run", recipe, "--threads", "1"])
    cpu = time.process_time() - sampler.own
    places = {"start of Python": started, **sampler.cpu}
    places["unseen"] = max(0.0, cpu - sum(places.values()))
    found = {
        "cpu": cpu,
        "wall": time.perf_counter() - began,
        "flush_wall": sampler.wall["flush"],
        "places": dict(sorted(places.items(), key=lambda item: -item[1])),
    }
    Path(report).write_text(json.dumps(found, indent=2), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
