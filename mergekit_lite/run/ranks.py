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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from mergekit_lite.errors import InterruptedRun, MergeError, StoppedError, UsageError
from mergekit_lite.plan.model import Plan, Unit
from mergekit_lite.plan.order import load_bytes
from mergekit_lite.run.execute import written

T = TypeVar("T")
# What launchers call the number of processes and the number of this one; accelerate reads the same.
COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
NUMBERS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
TIMEOUT = timedelta(days=1)  # rank 0 may digest all inputs first; a rank that ends is noticed at once


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank runs."""

    host: str
    process: int


class OtherRank(StoppedError):
    """Another rank failed, so this one stopped; `rank` is the other one's number, where it is known."""

    def __init__(self, rank: int | None, message: str, hint: str | None = None):
        super().__init__(message, hint=hint)
        self.rank = rank


class Ranks:
    """The `count` processes that share a merge, of which this is number `number`. `places` says where they run, once
    they have spoken to each other."""

    def __init__(self, number: int = 0, count: int = 1):
        self.number, self.count = number, count
        self.places = [Place(socket.gethostname(), os.getpid())] * count
        self._known: set[str] = set()  # faults that a lower rank on this machine has too

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
        lowest = min(rank for rank in self.here if rank != getattr(fault, "rank", None))
        common = isinstance(fault, OtherRank | InterruptedRun) or str(fault) in self._known
        return self.number == lowest or not common

    def agree(self, make: Callable[[], Plan], **options: object) -> Plan:
        """The plan that `make` gives on every rank. Raises what `make` raises, OtherRank where it raises on another
        rank, and UsageError where ranks have different plans, outputs, inputs or `options`."""

        def tell(plan: Plan) -> tuple[Any, Any]:
            inputs = [(f.nbytes, f.mtime_ns) for c in plan.checkpoints.values() for f in c.shards]
            return (plan.digest, [os.path.abspath(output.to) for output in plan.outputs], options), inputs

        plan, told = self.together(make, tell)
        first = told[0]
        for rank, theirs in enumerate(told):
            if theirs[0] != first[0]:
                hint = "start every rank with the same recipe and the same options, in the same folder"
                raise UsageError(f"{self.name(rank)} is about to do another merge than rank 0", hint=hint)
            if theirs[1] != first[1]:
                hint = "let all ranks read the same files, or copies with the same modification times"
                raise UsageError(f"{self.name(rank)} has other input files than rank 0", hint=hint)
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
        all_told = self._gather((place, None if fault is None else str(fault), told))
        self.places = [theirs[0] for theirs in all_told]
        faults = {rank: theirs[1] for rank, theirs in enumerate(all_told) if theirs[1] is not None}
        if fault is not None:
            self._known = {text for rank, text in faults.items() if rank < self.number and rank in self.here}
            raise fault
        for rank, text in faults.items():
            raise OtherRank(rank, f"{self.name(rank)} cannot start: {text.removeprefix('error: ')}")
        return mine, [theirs[2] for theirs in all_told]

    def _gather(self, value: Any) -> list[Any]:
        """`value` of every rank. On a thread of its own: Python's signals wait for what is done in C."""
        got: queue.SimpleQueue[list[Any] | BaseException] = queue.SimpleQueue()

        def work() -> None:
            try:
                # accelerate counts physical cores where this is not set, which fails in some containers. A merge has
                # threads of its own.
                os.environ.setdefault("OMP_NUM_THREADS", "1")
                from accelerate import PartialState
                from accelerate.utils import gather_object

                state = PartialState(cpu=True, timeout=TIMEOUT)
                self.number, self.count = state.process_index, state.num_processes
                got.put(gather_object([value]))
            except BaseException as fault:
                got.put(fault)

        threading.Thread(target=work, name="ranks", daemon=True).start()
        found = None
        while found is None:
            try:
                found = got.get(timeout=0.5)
            except queue.Empty:
                continue
        if isinstance(found, BaseException):
            reason = str(found).strip().split("\n")[0]
            hint = "what it says itself, if anything, stands beside this message or on the other machine"
            raise OtherRank(None, f"a rank ended, or cannot be reached, before the merge began: {reason}", hint)
        return found


ALONE = Ranks()


def launched() -> Ranks:
    """The ranks that a launcher's environment variables speak of; one alone where there are none."""
    count, number = (next((os.environ[n] for n in names if n in os.environ), "") for names in (COUNTS, NUMBERS))
    if not (count.isdecimal() and number.isdecimal() and int(count) > 1):
        return Ranks()
    return Ranks(int(number), int(count))


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


def divide(plan: Plan, inputs: Sequence[str], count: int) -> list[Share]:
    """The shares of `count` ranks: units in the order of the files, so that each reads and writes a stretch of them,
    with about as many bytes read and written each; a file is digested by the rank that reads or writes most of it.
    Depends on the plan alone, not on what is done already."""
    weights = [_weight(unit) for unit in plan.units]
    total, before = max(1, sum(weights)), 0
    units: list[list[Unit]] = [[] for _ in range(count)]
    read: dict[str, Counter[int]] = {path: Counter() for path in inputs}
    wrote: dict[tuple[int, int], Counter[int]] = {
        (number, shard): Counter() for number, output in enumerate(plan.outputs) for shard in range(len(output.shards))
    }
    for unit, weight in zip(plan.units, weights, strict=True):
        rank = min(count - 1, (2 * before + weight) * count // (2 * total))
        before += weight
        units[rank].append(unit)
        for node in unit.nodes:
            if node.load is not None:
                read[node.load.file][rank] += load_bytes(node, min(node.numel, unit.stop - unit.start))
        for number, tensor in unit.targets:
            wrote[number, tensor.shard][rank] += unit.stop - unit.start
    readers, writers = [_owner(c) for c in read.values()], _owners(wrote)
    return [
        Share(
            tuple(units[rank]),
            tuple(number for number, owner in enumerate(readers) if owner == rank),
            tuple(shard for shard, owner in writers.items() if owner == rank),
        )
        for rank in range(count)
    ]


def _weight(unit: Unit) -> int:
    """Bytes that a unit reads in one pass and writes."""
    return written(unit) + sum(load_bytes(node, min(node.numel, unit.stop - unit.start)) for node in unit.nodes)


def _owner(bytes_of: Counter[int]) -> int:
    return max(bytes_of, key=lambda rank: (bytes_of[rank], -rank), default=0)


def _owners(files: Mapping[tuple[int, int], Counter[int]]) -> dict[tuple[int, int], int]:
    return {file: _owner(bytes_of) for file, bytes_of in files.items()}
