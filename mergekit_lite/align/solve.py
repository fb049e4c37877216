"""The best permutations of one tree while everything else stays as it is: exact assignments, read tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from mergekit_lite.align.apply import Order, Permutations, group_order, moves, permuted
from mergekit_lite.align.assign import Assign, Costs, value
from mergekit_lite.align.cost import Ledger, Pair, add_products, empty, products_of, rows
from mergekit_lite.align.trees import NAME, Shapes, Tree
from mergekit_lite.family.spaces import Space
from mergekit_lite.lazy import torch

REPEATS = 20  # assignments at most for a tensor with both axes in one space


@dataclass(frozen=True)
class Visit:
    """What solving a tree takes: `names` are the tensors to go by, `permutations` those of all spaces now."""

    tree: Tree
    names: Sequence[str]
    permutations: Permutations
    ledger: Ledger
    shapes: Shapes
    assign: Assign
    check: Callable[[], None]
    threads: Executor | None = None

    def current(self, space: Space) -> Order:
        p = self.permutations.get(space.name)
        return np.arange(space.size, dtype=np.int64) if p is None else p


@dataclass(frozen=True)
class Outcome:
    """The best permutations of a tree's spaces; what the cost's tensors gained under the present ones and gain now."""

    permutations: dict[str, Order]
    before: float
    after: float


@dataclass
class UnitCosts:
    """Costs of units and, where they come in groups of more than one, of whole groups."""

    space: Space
    units: Costs
    groups: Costs

    @classmethod
    def none(cls, space: Space) -> UnitCosts:
        units = empty(space.size)
        return cls(space, units, units if space.group == 1 else empty(space.groups))

    def copy(self) -> UnitCosts:
        units = self.units.copy()
        return UnitCosts(self.space, units, units if self.space.group == 1 else self.groups.copy())

    def add(self, visit: Visit, pair: Pair) -> None:
        for use in self.space.uses:
            if use.tensor == pair.name and use.weighed:
                cost = self.groups if use.grouped else self.units
                a, b = rows(pair.a, use, len(cost)), rows(pair.b, use, len(cost))
                add_products(cost, a, b, pair.weight, visit.threads)

    def value(self, p: Order) -> float:
        found = value(self.units, p)
        return found if self.space.group == 1 else found + value(self.groups, group_order(self.space, p))

    def best(self, assign: Assign) -> Order:
        """The exact assignment. Groups go as wholes: a pair of them costs what its best inner order does."""
        g, groups = self.space.group, self.space.groups
        if g == 1:
            return assign(self.units)
        outer, inner = self.groups.copy(), np.empty((groups, groups, g), dtype=np.int64)
        for i in range(groups):
            for j in range(groups):
                block = self.units[i * g : (i + 1) * g, j * g : (j + 1) * g]
                inner[i, j] = assign(np.ascontiguousarray(block))
                outer[i, j] -= value(block, inner[i, j])
        return np.concatenate([j * g + inner[i, j] for i, j in enumerate(assign(outer))])


def solve_plain(visit: Visit) -> Outcome:
    """A space without children. One tensor pair at a time is in memory, but for tensors with several axes in the space
    (those are kept) and for renamed ones (those of all units are kept, one tuple of names at a time)."""
    root = visit.tree.root
    costs, kept = UnitCosts.none(root), []
    for pair in visit.ledger.pairs(visit.tree, visit.permutations, plain_names(visit)):
        visit.check()
        if len(visit.tree.axes[pair.name]) > 1:
            kept.append(pair)
        else:
            costs.add(visit, pair)
    add_renamed(visit, costs)
    now = visit.current(root)
    if kept:
        return _both_axes(visit, costs, kept)
    visit.check()
    p = costs.best(visit.assign)
    return Outcome({root.name: p}, costs.value(now), costs.value(p))


def plain_names(visit: Visit) -> list[str]:
    """The tensors that keep their names, in the tree's order."""
    return [name for name in visit.tree.axes if name in set(visit.names) and NAME not in visit.tree.axes[name]]


def add_renamed(visit: Visit, costs: UnitCosts) -> None:
    """The products of tensors that belong to one unit as a whole, every one of A with every one of B."""
    wanted = set(visit.names)
    for names in visit.tree.root.renames:
        if not wanted.issuperset(names):
            continue
        pairs = list(visit.ledger.pairs(visit.tree, visit.permutations, names))
        for i, mine in enumerate(pairs):
            visit.check()
            for j, theirs in enumerate(pairs):
                weight = visit.ledger.weight(mine.name, theirs.source)
                costs.units[i, j] -= weight * products_of(mine.a, theirs.b)


def _both_axes(visit: Visit, costs: UnitCosts, kept: Sequence[Pair]) -> Outcome:
    """A quadratic assignment for the tensors with several axes in the space: each axis in turn is assigned with the
    others as they are, as long as the sum of all products grows."""
    root = visit.tree.root

    def total(p: Order) -> float:
        found = moves([root], {root.name: p}, visit.shapes)
        sums = (k.weight * products_of(k.a, permuted(found[k.name], k.b) if found else k.b) for k in kept)
        return costs.value(p) + sum(sums)

    now = visit.current(root)
    before = total(now)
    p, after = now, before
    first = costs.best(visit.assign)
    if (gained := total(first)) > before:
        p, after = first, gained
    for _ in range(REPEATS):
        visit.check()
        tried = costs.copy()
        found = moves([root], {root.name: p}, visit.shapes)
        for pair in kept:
            orders = found[pair.name].orders if found else {}
            for use in root.uses:
                if use.tensor != pair.name or not use.weighed:
                    continue
                b = pair.b
                for axis, order in orders.items():
                    b = b if axis == use.axis else b.index_select(axis, torch.from_numpy(order).to(b.device))
                cost = tried.groups if use.grouped else tried.units
                add_products(cost, rows(pair.a, use, len(cost)), rows(b, use, len(cost)), pair.weight, visit.threads)
        following = tried.best(visit.assign)
        if (gained := total(following)) <= after:
            break
        p, after = following, gained
    return Outcome({root.name: p}, before, after)
