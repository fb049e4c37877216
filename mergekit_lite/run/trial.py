"""Merges that are looked at and thrown away: one plan after the other into one place, where only those tensors are
computed that the plan before did not leave there.

Nothing is made safe against a crash, no digests are formed and no lock is written, as nobody keeps a trial.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lite.plan.identity import Identities, Place
from mergekit_lite.plan.model import Plan, Unit
from mergekit_lite.plan.order import walk
from mergekit_lite.run.copy import ByteSource
from mergekit_lite.run.execute import execute
from mergekit_lite.run.finish import put_beside
from mergekit_lite.run.inputs import beside_fetched, inputs_of
from mergekit_lite.run.journal import Done
from mergekit_lite.run.progress import Findings, Options, written
from mergekit_lite.run.sink import Files, Memory, Sink, partial
from mergekit_lite.run.spectra import with_ranks
from mergekit_lite.run.start import check_tied

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_lite.run.alignment import Solved


@dataclass(frozen=True, slots=True)
class Made:
    """What a trial cost: tensors that were computed or copied, of all there are, and bytes read and written."""

    tensors: int
    all_tensors: int
    bytes_read: int
    bytes_written: int


class _Left:
    """What the plan before has left: tensors by their digests, and statistics by theirs."""

    def __init__(self) -> None:
        self.tensors: dict[Place, str] = {}
        self.pools: dict[str, list[Any]] = {}

    def go(
        self, plan: Plan, identities: Identities, source: ByteSource, sink: Sink, options: Options, fresh: bool
    ) -> tuple[Made, dict[str, Solved]]:
        """Computes what differs from what is there, all of it where the place is `fresh`; also gives the orders of
        units that were found."""
        wanted = identities.tensors()
        before = {} if fresh else self.tensors
        self.tensors = {}  # until it is done: a trial that fails leaves what nobody knows
        stale = {key for key, digest in wanted.items() if before.get(key) != digest}
        todo = [unit for unit in plan.units if any((o, t.shard, t.start) in stale for o, t in unit.targets)]
        needed = _needed(plan, todo)
        smaller = replace(
            plan,
            units=tuple(todo),
            pools={name: nodes for name, nodes in plan.pools.items() if name in needed},
            alignments={name: one for name, one in plan.alignments.items() if name in needed},
        )
        known = {name: self.pools[key] for name in needed if (key := identities.pool(name)) in self.pools}
        found: dict[str, list[Any]] = {}

        def keep(name: str, stats: Sequence[Any]) -> None:
            found[name] = json.loads(json.dumps(list(stats)))  # as a journal keeps them

        options = replace(options, found=keep)
        findings = execute(smaller, source, sink, None, Done(pools=known), options) if todo else Findings()
        self.pools |= {identities.pool(name): stats for name, stats in found.items()}
        self.tensors = dict(wanted)
        nbytes = sum(written(unit) for unit in todo)
        return Made(len(stale), len(wanted), findings.bytes_read, nbytes), findings.alignments


class TrialFolder:
    """A folder that trials are written into, one at a time, for programs that read checkpoints from the disk.

    `path` holds the last one, whole, and is nothing while the next is at work. A program may do there what it likes:
    where it has touched a shard (size, times, links, the file itself), nothing of the trial before is used; whatever
    else it has left there is removed. What writes there while the next trial is looked at is not noticed.
    """

    def __init__(self, path: Path):
        self.path = path
        self._left = _Left()
        self._layout: object = None
        self._seen: object = None
        self._solved: dict[str, Solved] = {}

    def write(self, plan: Plan, options: Options, identities: Identities | None = None) -> Made:
        """Put the only output of `plan`, which is planned for `path`, there. `identities` are those of the plan, where
        they were formed before. Raises what `run` raises of inputs that cannot be read and of a disk that is full."""
        ranked = with_ranks(plan, options)
        if identities is None or ranked is not plan:
            identities = Identities(ranked)
        plan = beside_fetched(ranked)
        (output,) = plan.outputs
        grown = partial(output.to)
        layout = [(shard.file, shard.header, shard.nbytes) for shard in output.shards]
        files = [shard.file for shard in output.shards]
        fresh = layout != self._layout or self._seen != _looks(self.path, files)
        self._layout = None
        if fresh:
            self.clear()
            grown.mkdir(parents=True)
            self._solved = {}
        else:
            _keep_only(self.path, files)
            self.path.rename(grown)
        sink = Files(plan.outputs)
        with inputs_of(plan, options.threads) as reader, contextlib.closing(sink):
            reader.check()
            if fresh:
                check_tied(plan, reader)
                sink.create()
            else:
                sink.reopen()
            options = replace(options, abort=reader.abort)
            made, solved = self._left.go(plan, identities, reader, sink, options, fresh)
            # Orders of units that nothing asked for this time are those of the trial before.
            self._solved = {n: s for n, s in {**self._solved, **solved}.items() if n in plan.alignments}
            put_beside(plan, output, self._solved)
        grown.rename(self.path)
        self._layout = layout
        self._seen = _looks(self.path, files)
        return made

    def clear(self) -> None:
        """Remove what is there."""
        for path in (self.path, partial(str(self.path))):
            with contextlib.suppress(OSError):  # a program may have put a link, or a file, in its place
                path.unlink()
            shutil.rmtree(path, ignore_errors=True)


class TrialTensors:
    """Trials as state dicts, for callables. The tensors are those of the trial before where these are the same, and
    they are overwritten by the next. Where torch knows that one was written to, nothing of the trial before is used; a
    change by way of NumPy is not noticed."""

    def __init__(self) -> None:
        self._left = _Left()
        self._layout: object = None
        self._sink: Memory | None = None
        self._versions: list[int] = []

    def make(self, plan: Plan, source: ByteSource, options: Options) -> tuple[dict[str, Tensor], Made]:
        """The only output of `plan`, whose tensors are read from `source`."""
        (output,) = plan.outputs
        layout = [(t.name, t.shape, t.dtype) for each in output.tensors for t in each.parts]
        fresh = self._sink is None or layout != self._layout or self._versions != self._now()
        if fresh or self._sink is None:
            self._sink = Memory(plan.outputs)
        self._layout = layout
        made, _ = self._left.go(plan, Identities(plan), source, self._sink, options, fresh)
        self._versions = self._now()
        return dict(self._sink.tensors[0]), made

    def _now(self) -> list[int]:
        """How often each tensor was written to."""
        return [] if self._sink is None else [tensor._version for tensor in self._sink.tensors[0].values()]


def _looks(folder: Path, files: Sequence[str]) -> list[tuple[int, ...]] | None:
    """What would change if these files of a folder, or their places, were touched; None where one is missing."""
    parents = {parent for file in files for parent in Path(file).parents}
    found: list[tuple[int, ...]] = []
    try:
        for path in [folder, *(folder / parent for parent in sorted(parents))]:
            about = path.lstat()
            found.append((about.st_mode, about.st_ino, about.st_dev))
        for file in files:
            about = (folder / file).lstat()
            # Its links: another name for it must not show what the next trial writes.
            times = (about.st_mtime_ns, about.st_ctime_ns, about.st_nlink)
            found.append((about.st_mode, about.st_ino, about.st_dev, about.st_size, *times))
    except OSError:
        return None
    return found


def _keep_only(folder: Path, files: Sequence[str]) -> None:
    """Remove all but these files of a folder."""
    kept = {folder / file for file in files}
    homes = {parent for path in kept for parent in path.parents}
    for home in {path.parent for path in kept} | {folder}:
        for path in list(home.iterdir()):
            if path in kept or path in homes:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _needed(plan: Plan, units: Sequence[Unit]) -> set[str]:
    """The statistics over whole models that these units need, directly or for one another."""
    needed: set[str] = set()
    fresh = {node.pool for unit in units for node in unit.nodes if node.pool}
    while fresh:
        needed |= fresh
        looked_at = [n for name in fresh for n in (plan.alignments[name].nodes if name in plan.alignments else ())]
        looked_at += [n for name in fresh for n in plan.pools.get(name, ())]
        fresh = {node.pool for node in walk(looked_at) if node.pool} - needed
    return needed
