"""Nodes become numbers, block by block. A statistic is gathered first, in rounds over the same blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from mergekit_lite.checkpoint.meta import TensorMeta
from mergekit_lite.lazy import Tensor
from mergekit_lite.methods.measure import Measure, Part
from mergekit_lite.plan.model import Node
from mergekit_lite.plan.order import grain_of, walk
from mergekit_lite.run.program import Loads, Program, Stats


@dataclass
class Blocks:
    """Computes nodes block by block: `loader` makes what loads them, `block` is the elements of one block (at least one
    grain). `watch` is told of every loaded block of the last pass; `report` of every step of a long iteration in a
    node; `stopped` is asked between blocks and steps. A thread works in a `lane`."""

    loader: Callable[[], Loads]
    block: int
    stopped: Callable[[], None]
    lane: Callable[[], AbstractContextManager[Any]] = nullcontext
    watch: Callable[[TensorMeta, Tensor], None] | None = None
    report: Callable[[Node, int, int], None] = field(default=lambda node, done, total: None)

    def spans(self, nodes: Sequence[Node], start: int, stop: int) -> Iterator[tuple[int, int]]:
        """[start, stop) in blocks of whole grains."""
        grain = grain_of(nodes)
        size = max(grain, self.block // grain * grain)
        while start < stop:
            self.stopped()
            end = min(stop, start + size)
            yield start, end
            start = end

    def last(self, roots: Sequence[Node], start: int, stop: int, stats: Stats) -> Iterator[tuple[int, list[Tensor]]]:
        """The last pass over elements [start, stop) of `roots`: where a block begins, and the block of every root,
        flat, in the compute dtype."""
        program = Program(roots, self.loader(), stats, self.watch, self._step)
        for begin, end in self.spans(list(walk(roots)), start, stop):
            yield begin, program.run(begin, end)

    def _step(self, node: Node, done: int, total: int) -> None:
        self.stopped()
        self.report(node, done, total)

    def measure(self, roots: Sequence[Node], stats: Stats) -> None:
        """Fill `stats` with the statistics of every measured node below `roots`. Nodes that do not depend on one
        another are measured in the same passes, so that their inputs are read together."""
        waiting = [n for n in walk(roots) if n.reach == "measured" and n.id not in stats]
        while waiting:
            ready = [n for n in waiting if not any(m is not n and m in waiting for m in walk([n]))]
            gather([[n] for n in ready], [measure_of([n]) for n in ready], stats, self.feed)
            waiting = [n for n in waiting if n not in ready]

    def feed(self, work: Sequence[tuple[Node, Part]], stats: Stats) -> None:
        """Give every part the blocks of its node's inputs, grain by grain, in one pass over the tensor."""
        active = list(work)
        nodes = list(walk(node for node, _ in work))
        grain = grain_of(nodes)
        loader = self.loader()
        program: Program | None = None
        for start, stop in self.spans(nodes, 0, work[0][0].numel):
            if program is None:
                below = list({n.id: n for node, _ in active for n in node.inputs}.values())
                program = Program(below, loader, stats, None, self._step)
            blocks = {node.id: block for node, block in zip(below, program.run(start, stop), strict=True)}
            for entry in list(active):
                node, part = entry
                xs = [blocks[n.id] for n in node.inputs]
                for at in range(start, stop, grain):
                    if part.add([x[at - start : at - start + grain] for x in xs] if stop - start > grain else xs, at):
                        active.remove(entry)
                        program = None  # a smaller one is enough from here on
                        break
            if not active:
                return


def measure_of(members: Sequence[Node]) -> Measure:
    """A fresh measure for the nodes that share one statistic."""
    node = members[0]
    assert node.method is not None
    if node.method.measure is None:
        raise TypeError(f"method `{node.method.name}` is measured but names no measure")
    measure: Measure = node.method.measure(dict(node.params), len(node.inputs), [n.numel for n in members])
    return measure


Feed = Callable[[Sequence[tuple[Node, Part]], Stats], None]


def gather(groups: Sequence[Sequence[Node]], measures: Sequence[Measure], stats: Stats, feed: Feed) -> None:
    """Carry `measures` through their rounds over the nodes of one tensor and store the results in `stats`."""
    going = list(zip(groups, measures, strict=True))
    while going:
        parts = [[measure.part(i) for i in range(len(group))] for group, measure in going]
        work = [
            (node, part)
            for (group, _), mine in zip(going, parts, strict=True)
            for node, part in zip(group, mine, strict=True)
            if part is not None
        ]
        if work:
            feed(work, stats)
        again = []
        for (group, measure), mine in zip(going, parts, strict=True):
            if measure.close(mine):
                again.append((group, measure))
            else:
                stats.update({node.id: measure.result(i) for i, node in enumerate(group)})
        going = again


def freeze(stat: Any) -> Any:
    """A statistic as it comes back from a journal: lists become tuples again."""
    return tuple(freeze(part) for part in stat) if isinstance(stat, (list, tuple)) else stat


def subset(stats: Mapping[int, Any], nodes: Iterable[Node]) -> Stats:
    """The statistics that `nodes` use."""
    return {n.id: stats[n.id] for n in nodes if n.id in stats}
