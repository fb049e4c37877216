"""Several processes that share one merge: who they are, what they agree on first, and which part each of them does.

    accelerate launch --multi_gpu --num_processes 2 -m mergekit_lite run recipe.yaml

The only file that imports accelerate, and it does so only where a launcher has said that there are others. Its process
group carries what is said before the first byte is written; from then on ranks speak through the files of the run
(peers.py), which no rank's end can leave another one waiting in.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from mergekit_lite.errors import InterruptedRun, MergeError, StoppedError, UsageError
from mergekit_lite.plan.model import Plan, Unit
from mergekit_lite.plan.order import load_bytes
from mergekit_lite.run.progress import written

T = TypeVar("T")
# What launchers call the number of processes and the number of this one; accelerate reads the same.
COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
NUMBERS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
NOTE_SECONDS = 15.0  # how long ranks wait for one another in silence
TIMEOUT = timedelta(days=1)  # rank 0 may digest all inputs first; a rank that ends is noticed at once


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank runs."""

    host: str
    process: int


class OtherRank(StoppedError):
    """Another rank, number `rank`, failed, so this one stopped. `reason` says how it failed, `interrupted` that Ctrl-C
    or the like stopped it."""

    def __init__(self, rank: int, name: str, reason: str, hint: str | None = None, interrupted: bool = False):
        super().__init__(f"{name} {reason}", hint=hint)
        self.rank, self.reason, self.interrupted = rank, reason, interrupted


class Ranks:
    """The `count` processes that share a merge, of which this is number `number`. `places` says where they run, once
    they have spoken to each other."""

    def __init__(self, number: int = 0, count: int = 1, note: Callable[[str], None] = lambda text: None):
        """`note` is told where there is a long wait."""
        self.number, self.count, self._note = number, count, note
        self.places = [Place(socket.gethostname(), os.getpid())] * count
        self._known: set[str] = set()  # faults that a lower rank on this machine, or every rank, has too

    @property
    def here(self) -> list[int]:
        """The ranks on this machine."""
        return [rank for rank, place in enumerate(self.places) if place.host == self.places[self.number].host]

    def name(self, rank: int) -> str:
        """`rank 1 (process 4711 on host)`."""
        place = self.places[rank]
        return f"rank {rank} (process {place.process} on {place.host})"

    def speaks(self, fault: MergeError) -> bool:
        """Whether it is this rank that tells the user of `fault`: its own if no other one tells the same, and what
        concerns all of them if it is the lowest one on its machine."""
        # One that was killed cannot tell.
        silent = fault.rank if isinstance(fault, OtherRank) and not fault.interrupted else None
        lowest = min(rank for rank in self.here if rank != silent)
        common = isinstance(fault, OtherRank | InterruptedRun) or message_of(fault) in self._known
        return self.number == lowest or not common

    def agree(self, make: Callable[[], Plan], **options: object) -> Plan:
        """The plan that `make` gives on every rank. Raises what `make` raises, OtherRank where it raises on another
        rank, and UsageError where ranks have different plans, outputs, inputs or `options`."""

        def tell(plan: Plan) -> tuple[Any, Any]:
            shards = [shard for checkpoint in plan.checkpoints.values() for shard in checkpoint.shards]
            inputs = [(s.nbytes, s.mtime_ns, s.remote and (s.remote.commit, s.remote.etag)) for s in shards]
            return (plan.digest, [os.path.abspath(output.to) for output in plan.outputs], options), inputs

        plan, told = self.together(make, tell)
        merge, inputs = told[0]
        for rank, theirs in enumerate(told):
            if theirs[0] != merge:
                hint = "start every rank with the same recipe and the same options, in the same folder"
                fault = UsageError(f"{self.name(rank)} is about to do another merge than rank 0", hint=hint)
            elif theirs[1] != inputs:
                hint = "let all ranks read the same files, or copies with the same modification times"
                fault = UsageError(f"{self.name(rank)} has other input files than rank 0", hint=hint)
            else:
                continue
            self._known = {message_of(fault)}
            raise fault
        return plan

    def together(self, work: Callable[[], T], tell: Callable[[T], Any]) -> tuple[T, list[Any]]:
        """What `work` gives on this rank, and what every rank tells of its own, by `tell`. Raises what `work` raises,
        and OtherRank where it raises on another rank."""
        if self.count == 1:
            mine = work()
            return mine, [tell(mine)]
        fault: MergeError | None = None
        told = None
        try:
            mine = work()
            told = tell(mine)
        except MergeError as error:
            fault = error
        place = Place(socket.gethostname(), os.getpid())
        all_told = self._gather((place, None if fault is None else message_of(fault), told))
        self.places = [theirs[0] for theirs in all_told]
        faults = {rank: theirs[1] for rank, theirs in enumerate(all_told) if theirs[1] is not None}
        if fault is not None:
            self._known = {text for rank, text in faults.items() if rank < self.number and rank in self.here}
            raise fault
        for rank, text in faults.items():
            raise OtherRank(rank, self.name(rank), f"cannot start: {text}")
        return mine, [theirs[2] for theirs in all_told]

    def _gather(self, value: Any) -> list[Any]:
        """`value` of every rank. On a thread of its own: Python's signals wait for what is done in C."""
        got: queue.SimpleQueue[list[Any] | BaseException] = queue.SimpleQueue()

        def work() -> None:
            try:
                load()
                from accelerate import PartialState
                from accelerate.utils import gather_object

                state = PartialState(cpu=True, timeout=TIMEOUT)
                self.number, self.count = state.process_index, state.num_processes
                got.put(gather_object([value]))
            except BaseException as fault:
                got.put(fault)

        threading.Thread(target=work, name="ranks", daemon=True).start()
        found = None
        wait = NOTE_SECONDS
        while found is None:
            try:
                found = got.get(timeout=wait)
            except queue.Empty:
                if wait == NOTE_SECONDS:
                    self._note(f"rank {self.number} waits for the others: the launcher says {self.count} processes")
                wait = 3600.0
        if isinstance(found, BaseException):
            reason = str(found).strip().split("\n")[0]
            hint = "what it says itself, if anything, stands beside this message or on the other machine"
            fault = StoppedError(f"a rank ended, or cannot be reached, before the merge began: {reason}", hint=hint)
            self._known = {message_of(fault)}
            raise fault
        return found


def load() -> None:
    """Import accelerate, and torch with it."""
    # accelerate counts physical cores where this is not set, which fails in some containers. A merge has threads of its
    # own.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import accelerate.utils  # noqa: F401


def message_of(fault: MergeError) -> str:
    """What is wrong, in one line and without hints, for another rank to tell."""
    return "; ".join(problem.message for problem in fault.problems)


ALONE = Ranks()


def launched(note: Callable[[str], None] = lambda text: None) -> Ranks:
    """The ranks that a launcher's environment variables speak of; one alone where there are none. `note` is told where
    they wait long for one another."""
    count, number = (next((os.environ[n] for n in names if n in os.environ), "") for names in (COUNTS, NUMBERS))
    if not (count.isdecimal() and number.isdecimal() and int(count) > 1):
        return Ranks()
    return Ranks(int(number), int(count), note)


def launched_alone() -> bool:
    """Whether accelerate was asked for several processes and has started this one by itself: without a GPU it starts
    the others only with `--multi_gpu`."""
    return launched().count == 1 and "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank does: units, files of the inputs to digest by number, and shards to digest by output and number."""

    units: tuple[Unit, ...]
    inputs: tuple[int, ...]
    shards: tuple[tuple[int, int], ...]


def divide(plan: Plan, inputs: Sequence[Path], count: int) -> list[Share]:
    """The shares of `count` ranks: units in the order of the files, so that each reads and writes a stretch of them,
    with about as many bytes read and written each; a file is digested by the rank that reads or writes most of it.
    Depends on the plan alone, not on what is done already."""
    shards = [(number, shard) for number, output in enumerate(plan.outputs) for shard in range(output.kept)]
    if count == 1:
        return [Share(plan.units, tuple(range(len(inputs))), tuple(shards))]
    weights = [_weight(unit) for unit in plan.units]
    total, before = max(1, sum(weights)), 0
    units: list[list[Unit]] = [[] for _ in range(count)]
    read: dict[str, Counter[int]] = {str(path): Counter() for path in inputs}
    wrote: dict[tuple[int, int], Counter[int]] = {shard: Counter() for shard in shards}
    for unit, weight in zip(plan.units, weights, strict=True):
        rank = min(count - 1, (2 * before + weight) * count // (2 * total))
        before += weight
        units[rank].append(unit)
        for node in unit.nodes:
            if node.load is not None:
                read[node.load.file][rank] += load_bytes(node, min(node.numel, unit.stop - unit.start))
        for number, tensor in unit.targets:
            if (number, tensor.shard) in wrote:  # masks that will be coded have no digest yet
                wrote[number, tensor.shard][rank] += unit.stop - unit.start
    for number, shard in shards:  # a file is digested once, whatever names it has
        same = plan.outputs[number].shards[shard].same
        if same is not None:
            wrote[number, shard] = wrote[same]
    return [
        Share(
            tuple(units[rank]),
            tuple(number for number, found in enumerate(read.values()) if _most(found) == rank),
            tuple(shard for shard, found in wrote.items() if _most(found) == rank),
        )
        for rank in range(count)
    ]


def _weight(unit: Unit) -> int:
    """Bytes that a unit reads in one pass and writes."""
    return written(unit) + sum(load_bytes(node, min(node.numel, unit.stop - unit.start)) for node in unit.nodes)


def _most(found: Counter[int]) -> int:
    """The rank with the most bytes, the lowest of several; 0 where none has any."""
    return max(sorted(found), key=lambda rank: found[rank], default=0)
