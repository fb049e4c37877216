"""Statistics over all tensors of a step, gathered before the first output byte: one task per tensor, many threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from typing import Any

from mergekit_lite.methods.measure import Measure, Part
from mergekit_lite.plan.model import Node
from mergekit_lite.plan.order import walk
from mergekit_lite.run.evaluate import Blocks, measure_of
from mergekit_lite.run.program import Stats

Members = tuple[Node, ...]


def levels(pools: Mapping[str, Members]) -> list[list[str]]:
    """The pools in the order in which they can be measured: a level needs only the statistics of those before it."""
    pool_of = {node.id: name for name, members in pools.items() for node in members}
    needs = {
        name: {pool_of[n.id] for n in walk(members) if n.id in pool_of} - {name} for name, members in pools.items()
    }
    ordered: list[list[str]] = []
    done: set[str] = set()
    while len(done) < len(pools):
        level = [name for name in pools if name not in done and needs[name] <= done]
        ordered.append(level)
        done.update(level)
    return ordered


def measure_pools(
    pools: Mapping[str, Members],
    known: Mapping[str, Sequence[Any]],
    blocks: Blocks,
    threads: Executor,
    report: Callable[[str, Node], None],
    found: Callable[[str, Sequence[Any]], None],
) -> Stats:
    """The statistics of every pool, by node id. `known` holds those of an earlier run; `found` is told of new ones,
    pool by pool; `report` of each finished tensor."""
    stats: Stats = {}
    for name in known:
        stats.update({node.id: stat for node, stat in zip(pools[name], known[name], strict=True)})
    for level in levels(pools):
        going = {name: measure_of(pools[name]) for name in level if name not in known}
        while going:
            parts = {name: [measure.part(i) for i in range(len(pools[name]))] for name, measure in going.items()}
            _round(pools, parts, stats, blocks, threads, report)
            going = {
                name: measure
                for name, measure in going.items()
                if not _closed(name, measure, parts, pools, stats, found)
            }
    return stats


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
        local = dict(stats)
        with blocks.lane():
            blocks.measure([node for _, node, _ in work], local)
            blocks.feed([(node, part) for _, node, part in work], local)
        return [(name, node) for name, node, _ in work]

    # As they finish, so that a failure is not left waiting behind a tensor that takes long.
    for finished in as_completed([threads.submit(one, work) for work in together]):
        for name, node in finished.result():
            report(name, node)
