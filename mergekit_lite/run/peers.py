"""While several ranks merge: what each has to say to the others, and whether all of them are still there.

A rank says it in its journal, which the others read. Nobody waits inside a call that cannot be interrupted, and a rank
that ends without a word, by `kill -9` or with its machine, is known by the lock on its journal, which the system lets
go of. No clocks are compared and there is no time limit: a rank may be slow.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from mergekit_lite.errors import InterruptedRun, MergeError, StoppedError
from mergekit_lite.plan.model import Plan
from mergekit_lite.run.journal import Journal, is_held, path_of
from mergekit_lite.run.progress import Progress, written
from mergekit_lite.run.ranks import OtherRank, Ranks, message_of
from mergekit_lite.run.sink import partial

LOOK_SECONDS = 0.5  # how often a rank looks after the others while it works
LAST = "digests"  # what a rank says when it has nothing more to do
FAILED = "failed"
GONE_SECONDS = 30.0  # how long a network file system may show neither the old name of a folder nor the new one


class _Failed(NamedTuple):
    """Why a run stops. In the order of these, the lowest one is the cause: a rank that was interrupted may have been so
    since another one had failed."""

    interrupted: bool
    rank: int
    reason: str


@dataclass
class _Peer:
    """Another rank, as far as its journal has been read."""

    rank: int
    path: Path
    at: int = 0
    said: dict[str, Any] = field(default_factory=dict)
    units: set[int] = field(default_factory=set)
    dead: bool = False


class Peers:
    """The other ranks of a run. A context manager around the work: within, a thread looks after them; an error that
    leaves it is told to them. One alone has no peers, and then nothing here does anything."""

    def __init__(self, plan: Plan, ranks: Ranks, journal: Journal, before: Iterable[int], run: str):
        """`before` are units that the others need not do, since an earlier run did them; `run` names this run."""
        self._plan, self._ranks, self._journal, self._run = plan, ranks, journal, run
        self._before = frozenset(before)
        self._last: Progress | None = None
        folder = partial(plan.outputs[0].to)
        self._peers = [_Peer(rank, path_of(folder, rank)) for rank in range(ranks.count) if rank != ranks.number]
        self._weights: Mapping[int, int] = {unit.id: written(unit) for unit in plan.units} if self._peers else {}
        self._fault: StoppedError | None = None
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="peers", daemon=True)

    def __enter__(self) -> Peers:
        if self._peers:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._peers:
            return
        self._stopped.set()
        self._thread.join()
        if error is None:
            return
        other = error if isinstance(error, OtherRank) else None
        interrupted = isinstance(error, KeyboardInterrupt | InterruptedRun)
        if interrupted:
            # A launcher interrupts the other ranks when one has ended.
            cause = self._cause()
            other = None if cause is None or cause.interrupted else cause
        if other is not None:
            failed = _Failed(other.interrupted, other.rank, other.reason)
        else:
            text = "was interrupted" if interrupted else f"failed: {_text(error)}"
            failed = _Failed(interrupted, self._ranks.number, text)
        with contextlib.suppress(MergeError):  # where the disk is full, the lock alone tells
            self._journal.say(FAILED, failed)
        if other is not None and other is not error:
            raise other from error

    def check(self) -> None:
        """Raise OtherRank where another rank has failed."""
        if self._fault is not None:
            raise self._fault

    def exchange(self, key: str, value: Any, waiting: Callable[[], None] = lambda: None) -> list[Any]:
        """What every rank says under `key`, once all have said it; this one says `value`, fit for JSON. `waiting` is
        called meanwhile. Raises OtherRank where one fails first."""
        if self._peers:
            self._journal.say(key, value)
        while not all(key in peer.said for peer in self._peers):
            self._pause(waiting)
        said = {peer.rank: peer.said[key] for peer in self._peers} | {self._ranks.number: value}
        return [said[rank] for rank in range(self._ranks.count)]

    def leave(self, value: Any) -> None:
        """Say the last thing to rank 0 and wait until it has published. Raises OtherRank where that does not happen."""
        self._journal.say(LAST, value)
        to = Path(self._plan.outputs[0].to)  # the last one to be renamed
        missing: float | None = None
        while partial(self._plan.outputs[0].to).exists() or not to.exists():
            if self._journal.path.parent.exists():
                missing = None
            elif missing is None:
                missing = time.monotonic()
            elif time.monotonic() - missing > GONE_SECONDS:
                raise StoppedError(f"`{self._journal.path.parent}` has gone", hint="start the merge again")
            self._pause(lambda: None)

    def widen(self, progress: Progress) -> Progress:
        """The progress of this rank's share as progress of the whole merge, with what the others have made safe."""
        if not self._peers or progress.phase != "merge":
            return progress
        self._last = progress
        with self._lock:
            others = self._before.union(*(peer.units for peer in self._peers))
        return replace(
            progress,
            done=progress.done + sum(self._weights[unit] for unit in others),
            total=sum(self._weights.values()),
            tensors=progress.tensors + len(others),
            all_tensors=len(self._weights),
        )

    def again(self, tell: Callable[[Progress], None]) -> None:
        """Tell the progress once more, since the others went on."""
        if self._last is not None:
            tell(self.widen(self._last))

    def _pause(self, waiting: Callable[[], None]) -> None:
        """Wait a little, then look at the others at once, since there is nothing else to do."""
        waiting()
        time.sleep(min(LOOK_SECONDS, 0.02 * self._ranks.count))
        self._look()
        self.check()

    def _work(self) -> None:
        while not self._stopped.wait(LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        """Read what is new from all others, and notice the one that failed."""
        try:
            self._read()
        except StoppedError as fault:
            self._fault = fault
            return
        if any(peer.dead or FAILED in peer.said for peer in self._peers):
            self._fault = self._cause()

    def _cause(self) -> OtherRank | None:
        """Why the run cannot go on: a rank that failed or is dead, rather than one that was interrupted for it."""
        with contextlib.suppress(StoppedError):
            self._read()
        found = []
        for peer in self._peers:
            if FAILED in peer.said:
                found.append(_Failed(*peer.said[FAILED]))
            elif peer.dead:
                found.append(_Failed(False, peer.rank, "ended without a word: was it killed?"))
        # A rank that stops since another failed tells of the other. Told back, it is nothing new.
        found = [failed for failed in found if failed.rank != self._ranks.number]
        if not found:
            return None
        interrupted, rank, reason = min(found)
        return OtherRank(rank, self._ranks.name(rank), reason, "the same command with `--resume` goes on", interrupted)

    def _read(self) -> None:
        with self._lock:
            for peer in self._peers:
                try:
                    self._read_one(peer)
                except OSError as fault:
                    # Its folder has been renamed, or rank 0 has taken its journal in: the end is near.
                    if fault.errno not in (errno.ENOENT, errno.ESTALE):
                        raise StoppedError(f"cannot read `{peer.path}`: {fault.strerror}") from fault
                except (ValueError, KeyError) as fault:
                    raise StoppedError(f"the journal `{peer.path}` is damaged") from fault

    def _read_one(self, peer: _Peer) -> None:
        file = os.open(peer.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            held = is_held(file)  # asked first, so that its last words are not missed
            data = bytearray()
            while part := os.pread(file, 1 << 20, peer.at + len(data)):
                data += part
        finally:
            os.close(file)
        whole = data[: data.rfind(b"\n") + 1]
        peer.at += len(whole)
        for line in whole.splitlines():
            entry = json.loads(line)
            if "unit" in entry and peer.rank:
                peer.units.add(entry["unit"])
            elif entry.get("run") == self._run and "say" in entry:
                peer.said[entry["say"]] = entry["value"]
        # Rank 0 has more to do after its last word; its journal leaves with the folder.
        if not held and (LAST not in peer.said or peer.rank == 0):
            peer.dead = peer.path.exists()


def _text(error: BaseException) -> str:
    return message_of(error) if isinstance(error, MergeError) else f"{type(error).__name__}: {error}"
