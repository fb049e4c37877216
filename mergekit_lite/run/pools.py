"""Statistics over all tensors of a step, gathered before the first output byte: one task per tensor, many threads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergekit_lite.methods.measure import Measure, Part
from mergekit_lite.plan.model import Node, Plan
from mergekit_lite.plan.order import walk
from mergekit_lite.run.evaluate import Blocks, freeze, measure_of, subset
from mergekit_lite.run.program import Stats

if TYPE_CHECKING:
    from mergekit_lite.run.alignment import Solved

Members = tuple[Node, ...]


def levels(looked_at: Mapping[str, Sequence[Node]]) -> list[list[str]]:
    """Statistics by name, with the nodes that each looks at, in the order in which they can be formed: a level needs
    only those before it."""
    needs = {name: {n.pool for n in walk(nodes) if n.pool} - {name} for name, nodes in looked_at.items()}
    ordered: list[list[str]] = []
    done: set[str] = set()
    while len(done) < len(needs):
        level = [name for name in needs if name not in done and needs[name] <= done]
        ordered.append(level)
        done.update(level)
    return ordered


@dataclass(frozen=True, slots=True)
class Watchers:
    """Who is told how far it is: of every finished tensor of a pool, of the spaces of an alignment, and of every new
    statistic, by name."""

    tensor: Callable[[str, Node], None]
    space: Callable[[str, str, int, int], None]
    found: Callable[[str, Sequence[Any]], None]


def measure_pools(
    plan: Plan, known: Mapping[str, Sequence[Any]], blocks: Blocks, threads: Executor, watchers: Watchers
) -> tuple[Stats, dict[str, Solved]]:
    """The statistics of every pool and alignment of the plan, by node id, and what was found for the alignments by
    name. `known` holds those of an earlier run."""
    stats: Stats = {}
    solved: dict[str, Solved] = {}
    pools = plan.pools
    for level in levels({**pools, **{name: alignment.nodes for name, alignment in plan.alignments.items()}}):
        for name in level:
            if name in plan.alignments:
                stats.update(_align(name, plan, stats, known, blocks, threads, watchers, solved))
            elif name in known:
                before = [freeze(stat) for stat in known[name]]
                stats.update({node.id: stat for node, stat in zip(pools[name], before, strict=True)})
        going = {name: measure_of(pools[name]) for name in level if name in pools and name not in known}
        while going:
            parts = {name: [measure.part(i) for i in range(len(pools[name]))] for name, measure in going.items()}
            _round(pools, parts, stats, blocks, threads, watchers.tensor)
            going = {
                name: measure
                for name, measure in going.items()
                if not _closed(name, measure, parts, pools, stats, watchers.found)
            }
    return stats, solved


def _align(
    name: str,
    plan: Plan,
    stats: Stats,
    known: Mapping[str, Sequence[Any]],
    blocks: Blocks,
    threads: Executor,
    watchers: Watchers,
    solved: dict[str, Solved],
) -> Stats:
    """Where the nodes that one alignment permutes take their rows from. What was found goes to `solved`."""
    from mergekit_lite.run.alignment import Solved, places, solve

    alignment = plan.alignments[name]
    if name in known:
        solved[name] = Solved.from_json(known[name][0])
    else:
        solved[name] = solve(alignment, stats, blocks, threads, functools.partial(watchers.space, name))
        watchers.found(name, [solved[name].as_json()])
    looked_at = [*plan.pools.values(), *(one.nodes for one in plan.alignments.values())]
    everything = [*(n for unit in plan.units for n in unit.nodes), *(n for nodes in looked_at for n in nodes)]
    return places(alignment, solved[name], (n for n in walk(everything) if n.pool == name))


def _closed(
    name: str,
    measure: Measure,
    parts: Mapping[str, Sequence[Part | None]],
    pools: Mapping[str, Members],
    stats: Stats,
    found: Callable[[str, Sequence[Any]], None],
) -> bool:
    if measure.close(parts[name]):
        return False
    results = [measure.result(i) for i in range(len(pools[name]))]
    stats.update({node.id: stat for node, stat in zip(pools[name], results, strict=True)})
    found(name, results)
    return True


def _round(
    pools: Mapping[str, Members],
    parts: Mapping[str, Sequence[Part | None]],
    stats: Stats,
    blocks: Blocks,
    threads: Executor,
    report: Callable[[str, Node], None],
) -> None:
    """One pass over all tensors. Pools that look at the same inputs are fed together."""
    together: list[list[tuple[str, Node, Part]]] = []
    place: dict[int, int] = {}  # a loaded node's id -> which group reads it
    for name, mine in parts.items():
        for node, part in zip(pools[name], mine, strict=True):
            if part is None:
                continue
            loads = [n.id for n in walk([node]) if n.load is not None]
            at = next((place[i] for i in loads if i in place and together[place[i]][0][1].shape == node.shape), None)
            if at is None:
                at = len(together)
                together.append([])
            together[at].append((name, node, part))
            place.update(dict.fromkeys(loads, at))

    def one(work: list[tuple[str, Node, Part]]) -> list[tuple[str, Node]]:
        local = subset(stats, walk(node for _, node, _ in work))
        with blocks.lane():
            blocks.measure([node for _, node, _ in work], local)
            blocks.feed([(node, part) for _, node, part in work], local)
        return [(name, node) for name, node, _ in work]

    # As they finish, so that a failure is not left waiting behind a tensor that takes long.
    for finished in as_completed([threads.submit(one, work) for work in together]):
        for name, node in finished.result():
            report(name, node)
