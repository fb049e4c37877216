"""Nodes become numbers, block by block. A statistic is gathered first, in rounds over the same blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mergekit_lite.checkpoint.meta import TensorMeta
from mergekit_lite.errors import MergeError
from mergekit_lite.methods.measure import Measure, Part
from mergekit_lite.methods.spec import Block, Method, keywords
from mergekit_lite.plan.model import Node
from mergekit_lite.plan.order import grain_of, reach_of, row_length, walk
from mergekit_lite.plan.words import count


class Source(Protocol):
    """Where stored tensors come from."""

    def read(self, meta: TensorMeta, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a tensor, flat, in the stored dtype."""
        ...


Stats = dict[int, Any]  # node id -> what its measure found for this tensor


@dataclass
class Blocks:
    """Computes nodes block by block: `compute` is the dtype of the arithmetic, `block` the elements of one block (at
    least one grain). `watch` is told of every loaded block of the last pass; `report` of every step of a long iteration
    in a node; `stopped` is asked between blocks and steps."""

    source: Source
    compute: torch.dtype
    block: int
    stopped: Callable[[], None]
    watch: Callable[[TensorMeta, Tensor], None] = field(default=lambda meta, values: None)
    report: Callable[[Node, int, int], None] = field(default=lambda node, done, total: None)
    _kept: dict[int, Tensor] = field(default_factory=dict, init=False)  # what all blocks of a tensor need, by node id

    def spans(self, nodes: Sequence[Node], start: int, stop: int) -> Iterator[tuple[int, int]]:
        """[start, stop) in blocks of whole grains."""
        grain = grain_of(nodes)
        size = max(grain, self.block // grain * grain)
        while start < stop:
            self.stopped()
            end = min(stop, start + size)
            yield start, end
            start = end

    def value(self, node: Node, start: int, stop: int, stats: Stats, memo: dict[int, Tensor], last: bool) -> Tensor:
        """Elements [start, stop) of `node`, flat, in the compute dtype. `memo` holds what this block has given so far;
        `stats` the statistics of this tensor; `last` tells the pass that makes the output."""
        known = memo.get(node.id)
        if known is not None:
            return known
        if node.load is not None:
            result = self.source.read(node.load, start, stop).to(self.compute)
            if last:
                self.watch(node.load, result)
        else:
            assert node.method is not None
            arguments = keywords(dict(node.params))
            reach = reach_of(node)
            if reach == "matrix":
                # The whole tensor is one block, and a statistic beside it may have another size.
                whole = [self.value(below, 0, below.numel, stats, memo, last) for below in node.inputs]
                xs = [x.reshape(below.shape) for x, below in zip(whole, node.inputs, strict=True)]
            elif node.method.beside is not None:
                xs = self._beside(node, node.method.beside(dict(node.params)), start, stop, stats, memo, last)
            else:
                xs = [self.value(below, start, stop, stats, memo, last) for below in node.inputs]
                if reach == "row":
                    xs = [x.reshape(-1, row_length(node)) for x in xs]
            if node.id in stats:
                arguments["stat"] = stats[node.id]
            if node.method.positioned:
                arguments["block"] = Block(start, node.key)
            if node.method.reports:
                arguments["report"] = functools.partial(self._step, node)
            result = apply(node.method, xs, arguments, node.numel if reach == "matrix" else stop - start)
        memo[node.id] = result
        return result

    def _beside(
        self,
        node: Node,
        ways: Sequence[str],
        start: int,
        stop: int,
        stats: Stats,
        memo: dict[int, Tensor],
        last: bool,
    ) -> list[Tensor]:
        """The rows of the first input in [start, stop), and of every further one what `ways` says, as matrices. What is
        not cut into rows is read once and kept."""
        length = row_length(node)
        top, bottom = start // length, stop // length
        xs = [self.value(node.inputs[0], start, stop, stats, memo, last).reshape(-1, length)]
        for below, way in zip(node.inputs[1:], ways, strict=True):
            if way == "rows":
                width = below.numel * length // node.numel
                part = self.value(below, top * width, bottom * width, stats, memo, last)
                xs.append(part.reshape(bottom - top, width))
                continue
            if below.id not in self._kept:
                self._kept[below.id] = self.value(below, 0, below.numel, stats, {}, False)
            whole = self._kept[below.id]
            if last and start == 0 and below.load is not None and below.id not in memo:
                memo[below.id] = whole
                self.watch(below.load, whole)
            matrix = whole.reshape(below.shape[0], -1)
            xs.append(matrix if way == "whole" else matrix[:, top:bottom])
        return xs

    def _step(self, node: Node, done: int, total: int) -> None:
        self.stopped()
        self.report(node, done, total)

    def measure(self, roots: Sequence[Node], stats: Stats) -> None:
        """Fill `stats` with the statistics of every measured node below `roots`. Nodes that do not depend on one
        another are measured in the same passes, so that their inputs are read together."""
        waiting = [n for n in walk(roots) if reach_of(n) == "measured" and n.id not in stats]
        while waiting:
            ready = [n for n in waiting if not any(m is not n and m in waiting for m in walk([n]))]
            gather([[n] for n in ready], [measure_of([n]) for n in ready], stats, self.feed)
            waiting = [n for n in waiting if n not in ready]

    def feed(self, work: Sequence[tuple[Node, Part]], stats: Stats) -> None:
        """Give every part the blocks of its node's inputs, grain by grain, in one pass over the tensor."""
        active = list(work)
        nodes = list(walk(node for node, _ in work))
        grain = grain_of(nodes)
        for start, stop in self.spans(nodes, 0, work[0][0].numel):
            memo: dict[int, Tensor] = {}
            for entry in list(active):
                node, part = entry
                xs = [self.value(below, start, stop, stats, memo, False) for below in node.inputs]
                for at in range(start, stop, grain):
                    if part.add([x[at - start : at - start + grain] for x in xs], at):
                        active.remove(entry)
                        break
            if not active:
                return


def apply(method: Method, xs: Sequence[Tensor], arguments: Mapping[str, Any], numel: int) -> Tensor:
    """What `method` makes of a block, flat. An outside method's faults are told as such, with its module; a result that
    is no tensor of `numel` numbers would leave a hole in the output and is a fault too. Raises MergeError."""
    hint = f"this is a fault of `{method.module}`, which brings the method"
    try:
        result = method.fn(xs, **arguments)
    except Exception as fault:
        if isinstance(fault, MergeError) or method.module.startswith("mergekit_lite."):
            raise
        raise MergeError(f"method `{method.name}` failed: {fault!r}", hint=hint) from fault
    if not isinstance(result, Tensor) or result.numel() != numel:
        given = count(result.numel(), "number") if isinstance(result, Tensor) else f"a {type(result).__name__}"
        raise MergeError(f"method `{method.name}` gave {given} for a block of {count(numel, 'number')}", hint=hint)
    return result.reshape(-1)


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


def subset(stats: Mapping[int, Any], roots: Sequence[Node]) -> Stats:
    """The statistics that the nodes below `roots` use."""
    return {n.id: stats[n.id] for n in walk(roots) if n.id in stats}
