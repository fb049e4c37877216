"""What it takes to read a plan's inputs from the Hub by ranges: bytes to fetch, room for them. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from mergekit_lite.checkpoint.meta import TensorMeta
from mergekit_lite.plan.model import Node, Plan, Unit
from mergekit_lite.plan.order import passes, rounds_of, walk


def bytes_fetched(plan: Plan) -> int:
    """Bytes of tensors that a run fetches from the Hub: those of its units once, and those of statistics over all
    tensors of a step, or of the search for an order of units, once more in every pass. 0 where all lies on this disk.
    """
    far = far_files(plan)
    if not far:
        return 0
    units = _stored((node for unit in plan.units for node in unit.nodes), far)
    pooled = [node for members in plan.pools.values() for node in members]
    total = units + rounds_of(pooled) * _stored(walk(pooled), far)
    for alignment in plan.alignments.values():
        total += passes(alignment) * _stored(walk(alignment.nodes), far)
    return total


def far_files(plan: Plan) -> set[str]:
    """The files that are read from the Hub, by path."""
    shards = [shard for checkpoint in plan.checkpoints.values() for shard in checkpoint.shards]
    return {shard.path for shard in shards if shard.remote is not None}


def streams(plan: Plan) -> int:
    """From how many places a thread reads in turn."""
    far = far_files(plan)
    return max((len(_loads(unit.nodes, far)) for unit in plan.units), default=1) or 1


def spool_bytes(plan: Plan, threads: int) -> int:
    """Bytes of the tensors that `threads` threads have at work at once where they read them several times, or their
    rows in another order; 0 where they read all in order and once."""
    far = far_files(plan)
    sizes: dict[tuple[str, tuple[int, ...]], int] = {}
    for unit in plan.units:
        if _again(unit):
            sizes[unit.name, unit.nodes[-1].shape] = sum(meta.nbytes for meta in _loads(unit.nodes, far))
    return sum(sorted(sizes.values())[-2 * threads :])


def _again(unit: Unit) -> bool:
    """Whether a unit comes back to bytes that it has read: statistics, rows in another order, what stands beside."""
    return any(
        node.reach == "measured"
        or (node.method is not None and (node.method.gathers or node.method.beside is not None))
        for node in unit.nodes
    )


def _loads(nodes: Iterable[Node], far: set[str]) -> set[TensorMeta]:
    loads = {node.load for node in nodes if node.load is not None}
    return {part for load in loads for part in load.parts if part.file in far}


def _stored(nodes: Iterable[Node], far: set[str]) -> int:
    return sum(meta.nbytes for meta in _loads(nodes, far))
