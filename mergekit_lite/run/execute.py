"""The loop: units of work to threads, finished ones to the journal, progress to whoever looks."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergekit_lite.checkpoint.meta import TensorMeta
from mergekit_lite.errors import InterruptedRun
from mergekit_lite.plan.build import no_collection
from mergekit_lite.plan.model import Node, Plan, Unit
from mergekit_lite.run.admission import Admission
from mergekit_lite.run.copy import ByteSource, copy
from mergekit_lite.run.journal import Done, Journal
from mergekit_lite.run.progress import COUNTS, Findings, Options, Progress, written
from mergekit_lite.run.sink import Sink, make_safe

if TYPE_CHECKING:
    from mergekit_lite.run.compute import Computer
    from mergekit_lite.run.plain import PlainSums

WITHIN_SECONDS = 0.2  # how often a tensor in a long iteration tells how far it is, at most
SAFE_SECONDS = 3.0  # how much finished work a machine that goes down may cost, at most


class _Stop(BaseException):
    """A worker was asked to stop. No `Exception`, so that no method takes it for a failure of its own."""


@dataclass(frozen=True, slots=True)
class _Within:
    """A unit in the middle of a long iteration: its share done, and the steps of this iteration."""

    unit: Unit
    share: float
    steps: tuple[int, int]


class _Counted:
    """A source that counts the bytes it gives."""

    def __init__(self, source: ByteSource):
        self._source = source
        self._bytes: dict[int, int] = {}  # by thread, so that none waits for another

    @property
    def bytes(self) -> int:
        return sum(list(self._bytes.values()))

    def read_bytes(self, meta: TensorMeta, start: int, stop: int, buffer: memoryview) -> None:
        me = threading.get_ident()
        self._bytes[me] = self._bytes.get(me, 0) + stop - start
        self._source.read_bytes(meta, start, stop, buffer)


def execute(
    plan: Plan, source: ByteSource, sink: Sink, journal: Journal | None, done: Done, options: Options
) -> Findings:
    """Carry out what is left of `plan`. Raises InterruptedRun on Ctrl-C with everything finished so far safe, and
    whatever a source or a sink raises, likewise."""
    run = _Run(plan, _Counted(source), sink, journal, done, options)
    if not plan.alignments and all(unit.targets[0][1].copied for unit in run.todo):
        return run.go()  # without torch, whose import takes longer than many a copy
    from mergekit_lite.run.plain import plain_sums, without_torch

    if options.device == "cpu" and not plan.alignments and without_torch(plan, run.todo):
        with plain_sums(plan, run.source, options.block, options.strict, run.check) as run.computer:
            return run.go()
    with no_collection():  # torch's import makes as many objects
        from mergekit_lite.run.compute import computing
        from mergekit_lite.run.threads import one_thread_here

    run.prepare = one_thread_here
    with computing(plan, run.source, options.block, options.strict, run.check, options.device) as computer:
        run.computer = run.measures = computer
        return run.go()


class _Run:
    def __init__(self, plan: Plan, source: _Counted, sink: Sink, journal: Journal | None, done: Done, options: Options):
        self.plan, self.source, self.sink, self.journal, self.done, self.options = (
            plan,
            source,
            sink,
            journal,
            done,
            options,
        )
        self.stop = threading.Event()
        self.todo = [unit for unit in plan.units if unit.id not in done.units]
        self.prepare: Callable[[], None] | None = None  # called by each thread before its first unit
        self.computer: Computer | PlainSums | None = None
        self.measures: Computer | None = None
        self.admission = Admission(plan, self.check)
        self.findings = Findings(resumed=len(done.units))
        self.finished: queue.SimpleQueue[tuple[Unit, dict[str, Any]] | _Within | BaseException | None] = (
            queue.SimpleQueue()
        )
        self.ahead: dict[int, int] = {}  # bytes of units in the middle of a long iteration, by their share done
        self.safe_at = time.monotonic()
        self.written = 0
        self.total = sum(written(unit) for unit in plan.units)
        for unit in plan.units:
            if unit.id in done.units:
                self.findings.add(done.units[unit.id])
                self.written += written(unit)

    def go(self) -> Findings:
        try:
            with ThreadPoolExecutor(self.options.threads, "merge", self.prepare) as threads:
                try:
                    if self.measures is not None and (self.plan.pools or self.plan.alignments):
                        self._pools(threads, self.measures)
                    self._units(threads)
                except BaseException:
                    self.stop.set()
                    self.options.abort()
                    raise
        except KeyboardInterrupt as fault:
            self._drain()
            self._save()
            hint = "the same command with `--resume` goes on" if self.journal else None
            raise InterruptedRun("stopped by Ctrl-C", hint=hint) from fault
        except BaseException:
            with contextlib.suppress(Exception):
                self._drain()
                self._save()
            raise
        self._save()
        self.findings.bytes_read = self.source.bytes
        return self.findings

    def check(self) -> None:
        if self.stop.is_set():
            raise _Stop
        self.options.check()

    # Statistics over all tensors

    def _pools(self, threads: ThreadPoolExecutor, computer: Computer) -> None:
        from mergekit_lite.run.pools import Watchers

        total = sum(len(members) for members in self.plan.pools.values())
        seen = itertools.count(1)

        def tensor(pool: str, node: Node) -> None:
            step = pool.split(":")[0]
            self.options.progress(Progress("measure", step, step, next(seen), total, 0, total, 0, 0, self.source.bytes))

        def space(step: str, name: str, done: int, among: int) -> None:
            self.options.progress(Progress("align", name, step, done, among, 0, among, 0, 0, self.source.bytes))

        def found(pool: str, stats: Sequence[Any]) -> None:
            self.options.found(pool, stats)
            if self.journal is not None:
                self.journal.pool(pool, stats)

        solved = computer.measure(self.plan, self.done.pools, threads, Watchers(tensor, space, found))
        self.findings.alignments.update(solved)

    # Units

    def _units(self, threads: ThreadPoolExecutor) -> None:
        pending = iter(self.todo)
        lock = threading.Lock()

        def worker() -> None:
            try:
                while not self.stop.is_set():
                    with lock:
                        unit = next(pending, None)
                    if unit is None:
                        break
                    found = self._unit(unit)
                    if self.journal is not None:
                        self.journal.unit(unit.id, found)  # before the next one, so that a crash costs one a thread
                    self.finished.put((unit, found))
            except _Stop:
                pass
            except BaseException as fault:
                self.stop.set()
                self.finished.put(fault)
            finally:
                self.finished.put(None)

        for _ in range(self.options.threads):
            threads.submit(worker)
        working = self.options.threads
        count = len(self.plan.units) - len(self.todo)
        while working:
            with contextlib.suppress(queue.Empty):
                got = self.finished.get(timeout=0.2)
                if got is None:
                    working -= 1
                elif isinstance(got, BaseException):
                    raise got
                elif isinstance(got, _Within):
                    ahead = int(got.share * written(got.unit))
                    self.ahead[got.unit.id] = max(ahead, self.ahead.get(got.unit.id, 0))
                    self._tell(got.unit, count, got.steps)
                else:
                    count += 1
                    self._take(*got)
                    self._tell(got[0], count)
            if time.monotonic() - self.safe_at > SAFE_SECONDS:
                self._save()

    def _take(self, unit: Unit, found: dict[str, Any]) -> None:
        self.findings.add(found)
        self.written += written(unit)
        self.ahead.pop(unit.id, None)

    def _tell(self, unit: Unit, count: int, within: tuple[int, int] | None = None) -> None:
        number, tensor = unit.targets[0]
        output = self.plan.outputs[number]
        place = (tensor.shard + 1, len(output.shards))
        progress = Progress(
            "merge",
            unit.name,
            output.step,
            self.written + sum(self.ahead.values()),
            self.total,
            count,
            len(self.plan.units),
            *place,
            self.source.bytes,
            within,
        )
        self.options.progress(progress)

    def _drain(self) -> None:
        """Take what workers finished while the run was stopping."""
        with contextlib.suppress(queue.Empty):
            while True:
                got = self.finished.get_nowait()
                if isinstance(got, tuple):
                    self._take(*got)

    def _save(self) -> None:
        """Make what is written safe, then say so in the journal."""
        if self.journal is not None:
            make_safe(self.sink, self.journal)
        self.safe_at = time.monotonic()

    def _unit(self, unit: Unit) -> dict[str, Any]:
        found: dict[str, dict[str, Any]] = {key: {} for key in (*COUNTS, "figures", "squares")}
        if unit.targets[0][1].copied:
            copy(unit, self.source, self.sink, self.check, found, self.options.strict)
        else:
            assert self.computer is not None
            with self.admission.of(unit):
                self.computer.unit(unit, self.sink, found, self._within(unit))
        return found

    def _within(self, unit: Unit) -> Callable[[Node, int, int], None]:
        """What to call with the steps of the unit's iterations, which come one after the other."""
        place = {node.id: i for i, node in enumerate(n for n in unit.nodes if n.method and n.method.reports)}
        told = time.monotonic()

        def report(node: Node, done: int, total: int) -> None:
            nonlocal told
            now = time.monotonic()
            if now - told >= WITHIN_SECONDS:
                told = now
                self.finished.put(_Within(unit, (place[node.id] + done / total) / len(place), (done, total)))

        return report
