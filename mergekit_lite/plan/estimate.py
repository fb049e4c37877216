"""How long a run takes: bytes, elements by method and decompositions by shape, each at its rate. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergekit_lite.plan import rates
from mergekit_lite.plan.model import Alignment, Node, Plan
from mergekit_lite.plan.order import passes, rounds_of, walk
from mergekit_lite.vocabulary.graft import Graft


def seconds(plan: Plan, threads: int) -> float:
    """Seconds that a run of `plan` takes with `threads` threads on the machine of the benchmarks, within a factor of
    two or three. A tensor that cannot be cut keeps one thread busy, however many there are. The search for an order of
    units (`permute`) counts with the products of all units, which take most of it."""
    costs = _Costs()
    units = [costs.work(unit.nodes, unit.stop - unit.start) for unit in plan.units]
    pooled = [node for members in plan.pools.values() for node in members if node.reach == "pooled"]
    moved = plan.bytes_read * rates.READ + plan.bytes_written * rates.WRITE
    searched = sum(_search(alignment) for alignment in plan.alignments.values())
    shared = (sum(units) + costs.measuring(pooled, None) + moved + searched) / threads
    limit = plan.bytes_read / rates.READ_LIMIT + plan.bytes_written / rates.WRITE_LIMIT
    copying = all(unit.targets[0][1].copied for unit in plan.units)
    start = rates.START_COPYING if copying else rates.START
    return start + max(1e-9 * max(shared, max(units, default=0.0)), limit)


def _search(alignment: Alignment) -> float:
    """Nanoseconds of one core for an order of units: in every pass each unit is multiplied with every other one."""
    if not alignment.models or not alignment.searched:
        return 0.0
    if alignment.layers:
        # Every expert but the dominant ones, unit by unit of the one that it joins.
        pairs = sum((layer.count - layer.into) * layer.units * layer.numel for layer in alignment.layers)
        return pairs * rates.PRODUCT if dict(alignment.params)["align"] else 0.0
    sizes = {name: node.numel for name, node in alignment.models[0].items()}
    chosen = [space for space in alignment.spaces if space.kind in alignment.kinds]
    products = sum(space.size * sizes[use.tensor] for space in chosen for use in space.uses)
    return passes(alignment) * products * rates.PRODUCT * max(1, len(alignment.models) - 1)


class _Costs:
    """Nanoseconds of one core for the nodes of a plan, without reading and writing."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int], float] = {}  # an element of a method, by the id of its settings

    def work(self, nodes: Sequence[Node], numel: int) -> float:
        """Every pass over `numel` elements of an output tensor."""
        measured = [node for node in nodes if node.reach == "measured"]
        return sum([self.kernel(node, numel) for node in nodes if node.method]) + self.measuring(measured, numel)

    def measuring(self, measured: Sequence[Node], numel: int | None) -> float:
        """The passes that statistics take together, over `numel` elements or all of each node."""
        own = {node.id for node in measured}
        once = 0.0
        for node in walk(measured):
            count = node.numel if numel is None else numel
            if node.id in own:
                once += rates.STATISTIC * len(node.inputs) * count
            elif node.method is not None:
                once += self.kernel(node, count)
        return rounds_of(measured) * once

    def kernel(self, node: Node, numel: int) -> float:
        """One use of a method on `numel` elements of its result; a matrix method takes all of them."""
        if node.reach == "matrix":
            return _matrix(node)
        assert node.method is not None
        if node.method.combines:
            return _sums(node) * numel / max(1, node.numel)
        identity = (node.method.name, id(node.params), len(node.inputs))
        found = self._known.get(identity)
        if found is None:
            found = self._known[identity] = _element(node)
        return found * numel


def _element(node: Node) -> float:
    """An element of a method that works element by element or row by row."""
    method = node.method
    assert method is not None
    own = rates.ELEMENT.get(method.name)
    if own is not None:
        return own
    if method.beside is not None:
        # A low-rank product is a sum over the first axis of its first factor.
        return rates.KERNEL * math.prod(node.inputs[1].shape[:1])
    per_input = rates.ROWS if node.reach == "row" and not method.gathers else rates.KERNEL
    drawn = rates.RANDOM if method.positioned and node.reach == "element" else 0.0
    return per_input * len(node.inputs) + drawn


def _sums(node: Node) -> float:
    """All rows of a tensor that are sums of others: for each term the products of a row with every shared one."""
    settings = dict(node.params)
    graft: Graft = settings["graft"]
    terms: int = settings["k"]
    products = len(graft.sums) * terms * len(graft.atoms) * math.prod(node.inputs[1].shape[1:])
    return products * rates.PRODUCT + node.numel * rates.KERNEL


def _matrix(node: Node) -> float:
    """The decompositions of one tensor, by its shape as a matrix."""
    assert node.method is not None
    name = node.method.name
    if name in rates.PRODUCTS:
        return rates.PRODUCTS[name] * node.inputs[0].shape[0] * node.numel
    if name in rates.FACTORS:
        rank = sum(a.shape[0] for a in node.inputs[::2])
        return rates.FACTORS[name] * rank * sum(n.numel for n in node.inputs)
    if name in rates.ELEMENT:
        return rates.ELEMENT[name] * len(node.inputs) * node.numel
    # Factors, and numbers with figures behind them, are one vector: what is decomposed is the input.
    shape = node.shape if len(node.shape) > 1 else node.inputs[0].shape
    rows, columns = max(1, math.prod(shape[:1])), max(1, math.prod(shape[1:]))
    once, each = rates.MATRIX.get(name, rates.MATRIX_OTHER)
    steps: int = dict(node.params).get("steps", 1)
    return (once + each * len(node.inputs) * steps) * min(rows, columns) * rows * columns
