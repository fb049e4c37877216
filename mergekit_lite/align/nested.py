"""Assignments within assignments: heads with free coordinates inside them, experts with hidden units of their own.

What a pair of groups is worth is the best that can be made of it inside, so the groups' own assignment is exact. To
pair heads by <Q_i^T K_i, Q_j^T K_j> and the same of V and O, which no inner permutation changes, was tried on three
pairs of small ViTs trained apart on digits: the barrier was 2.65 on average against 2.63 with the residual stream
matched and 2.40 against 2.63 without, where unmatched it is 2.63 and the ends' loss 0.25: neither connects them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations as arrangements
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from mergekit_lite.align.apply import Order, moves, permuted
from mergekit_lite.align.assign import Costs, value
from mergekit_lite.align.cost import Pair, add_products, empty, products_of, rows
from mergekit_lite.align.experts import solve_experts
from mergekit_lite.align.solve import Outcome, UnitCosts, Visit, plain_names
from mergekit_lite.align.trees import Tree
from mergekit_lite.errors import Problem, RecipeError
from mergekit_lite.family.spaces import Space, Use
from mergekit_lite.lazy import Tensor, torch

TRIED = 24  # orders of the units of a group that are all tried where their inner coordinates depend on it
NOWHERE = -1  # a use of a child that is in no use of its parent
TURNS = 20  # of order and inner coordinates, where there are more


_Place = tuple[str, int, int]  # tensor, place of the parent's use in its list, rank among several in one unit


def solve_nested(visit: Visit) -> Outcome:
    """A space and its children. Experts are read pair by pair; of any other space all tensors are kept in memory."""
    if visit.tree.root.renames and not visit.tree.fixed:
        return solve_experts(visit)
    pairs = {pair.name: pair for pair in visit.ledger.pairs(visit.tree, visit.permutations, plain_names(visit))}
    inside = Inside(visit, pairs)
    root, tree = visit.tree.root, visit.tree
    costs = inside.between()
    found: dict[str, Order] = {}
    best: dict[tuple[int, int], _Match] = {}
    outer = costs.groups.copy() if root.group > 1 else empty(root.groups)
    for i in range(root.groups):
        for j in [i] if tree.fixed else range(root.groups):
            visit.check()
            best[i, j] = inside.pair(i, j, costs.units)
            outer[i, j] += best[i, j].cost
    matched = np.arange(root.groups) if tree.fixed else visit.assign(outer)
    for i, j in enumerate(matched):
        for kind, order in best[i, int(j)].inner.items():
            found[inside.child(kind, i).name] = order
    if not tree.fixed:
        found[root.name] = np.concatenate([j * root.group + best[i, int(j)].order for i, j in enumerate(matched)])
    now = {space.name: visit.current(space) for space in tree.spaces}
    return Outcome(found, _value(visit, pairs, now), _value(visit, pairs, found))


def _value(visit: Visit, pairs: Mapping[str, Pair], permutations: Mapping[str, Order]) -> float:
    found = moves(visit.tree.spaces, permutations, visit.shapes)
    return sum(
        pair.weight * products_of(pair.a, permuted(found[name], pair.b) if name in found else pair.b)
        for name, pair in pairs.items()
    )


@dataclass(frozen=True)
class _Match:
    """How group j of B fills group i of A best: the order of its units, of every child's, and what that costs."""

    order: Order
    inner: dict[str, Order]
    cost: float


class Inside:
    """The costs of what lies inside the groups of a space whose tensors are all in memory."""

    def __init__(self, visit: Visit, pairs: Mapping[str, Pair]):
        self._visit, self._tree, self._pairs = visit, visit.tree, pairs
        self._root = visit.tree.root
        self._parts = {(child.kind, child.slot): self._sorted(child) for child in visit.tree.children}

    def child(self, kind: str, slot: int) -> Space:
        return self._tree.child(kind, slot) or _uneven(self._tree)

    def _sorted(self, child: Space) -> dict[_Place, dict[int | None, Use]]:
        """A child's uses by the place they have in their group, and there by the unit they belong to: None for those
        that the group has once."""
        found: dict[_Place, dict[int | None, Use]] = {}
        for use in child.uses:
            if use.weighed and use.tensor in self._pairs:
                outer, unit = self._owner(child, use)
                rank = 0
                while unit in found.get((use.tensor, outer, rank), ()):
                    rank += 1
                found.setdefault((use.tensor, outer, rank), {})[unit] = use
        return found

    def _owner(self, child: Space, use: Use) -> tuple[int, int | None]:
        if not self._tree.fixed:
            for k, outer in enumerate(self._root.uses):
                count = self._root.groups if outer.grouped else self._root.size
                unit = (use.start - outer.start) // outer.block
                if (outer.tensor, outer.axis) == (use.tensor, use.axis) and 0 <= unit < count:
                    return k, None if outer.grouped else unit - child.slot * self._root.group
        return NOWHERE, None

    def between(self) -> UnitCosts:
        """The costs of units and groups by all elements that belong to no child."""
        costs = UnitCosts.none(self._root)
        if self._tree.fixed:
            return costs
        for pair in self._pairs.values():
            for use in self._root.uses:
                if use.tensor != pair.name or not use.weighed:
                    continue
                self._visit.check()
                cost = costs.groups if use.grouped else costs.units
                free = self._free(use, len(cost))
                if free.any():
                    a, b = (_taken(rows(t, use, len(cost)), use.block, free) for t in (pair.a, pair.b))
                    add_products(cost, a, b, pair.weight, self._visit.threads)
        return costs

    def _free(self, use: Use, count: int) -> NDArray[np.bool_]:
        """Which elements of a unit's block are no child's: alike for all units."""
        covered = np.zeros(count * use.block, dtype=bool)
        for child in self._tree.children:
            for inner in child.uses:
                if (inner.tensor, inner.axis) == (use.tensor, use.axis) and 0 <= inner.start - use.start < len(covered):
                    first = inner.start - use.start
                    covered[first : first + child.size * inner.block] = True
        per_unit = ~covered.reshape(count, use.block)
        if not (per_unit == per_unit[0]).all():
            _uneven(self._tree)
        return np.asarray(per_unit[0])

    def pair(self, i: int, j: int, units: Costs) -> _Match:
        """The best that group j of B can be for group i of A."""
        g = self._root.group
        block = units[i * g : (i + 1) * g, j * g : (j + 1) * g]
        kinds = {kind: self._kind(kind, i, j) for kind in self._tree.kinds if (kind, i) in self._parts}
        own = {kind: each for kind, (_, each) in kinds.items() if each is not None}
        same = np.arange(g)
        if self._tree.fixed or g == 1:
            return self._given(same, block, kinds)
        if not own:
            return self._given(self._visit.assign(np.ascontiguousarray(block)), block, kinds)
        if _count(g) <= TRIED:
            return min((self._given(np.array(order), block, kinds) for order in arrangements(range(g))), key=_cost)
        return self._in_turns(block, kinds, own)

    def _in_turns(
        self, block: Costs, kinds: Mapping[str, tuple[Costs, Costs | None]], own: Mapping[str, Costs]
    ) -> _Match:
        """Order and inner coordinates one after the other. The first order takes every pair of units at its best."""
        guess, assign = block.copy(), self._visit.assign
        for each in own.values():
            for a, b in np.ndindex(guess.shape):
                guess[a, b] -= value(each[a, b], assign(each[a, b]))
        found = self._given(assign(guess), block, kinds)
        for _ in range(TURNS):
            turned = block.copy()
            for kind, each in own.items():
                p = found.inner[kind]
                turned += each[:, :, np.arange(len(p)), p].sum(axis=2)
            following = self._given(assign(turned), block, kinds)
            if following.cost >= found.cost:
                break
            found = following
        return found

    def _given(self, order: Order, block: Costs, kinds: Mapping[str, tuple[Costs, Costs | None]]) -> _Match:
        """The best inner coordinates for a given order of the units."""
        total, inner = -value(block, order), {}
        for kind, (whole, each) in kinds.items():
            cost = whole if each is None else whole + each[np.arange(len(order)), order].sum(axis=0)
            inner[kind] = self._visit.assign(cost)
            total -= value(cost, inner[kind])
        return _Match(np.asarray(order, dtype=np.int64), inner, total)

    def _kind(self, kind: str, i: int, j: int) -> tuple[Costs, Costs | None]:
        """Costs of the inner coordinates of a pair of groups, (size, size): of what the groups have once, and of every
        pair of their units, (group, group, size, size); None where units have nothing of it."""
        size, g = self.child(kind, i).size, self._root.group
        mine, theirs = self._parts[kind, i], self._parts.get((kind, j), {})
        if mine.keys() != theirs.keys():
            _uneven(self._tree)
        whole = empty(size)
        each = np.zeros((g, g, size, size)) if any(None not in units for units in mine.values()) else None
        for (tensor, outer, rank), uses in mine.items():
            pair = self._pairs[tensor]
            a = {unit: rows(pair.a, use, size) for unit, use in uses.items()}
            b = {unit: rows(pair.b, use, size) for unit, use in theirs[tensor, outer, rank].items()}
            for unit_a, left in a.items():
                for unit_b, right in b.items():
                    cost = whole if each is None or unit_a is None or unit_b is None else each[unit_a, unit_b]
                    add_products(cost, left, right, pair.weight)
        return whole, each


def _taken(units: Tensor, block: int, free: NDArray[np.bool_]) -> Tensor:
    if free.all():
        return units
    return units.reshape(len(units), block, -1)[:, torch.from_numpy(free).to(units.device)].reshape(len(units), -1)


def _cost(match: _Match) -> float:
    return match.cost


def _count(g: int) -> int:
    return int(np.prod(np.arange(1, g + 1), dtype=float))


def _uneven(tree: Tree) -> NoReturn:
    raise RecipeError(
        Problem(
            f"the spaces in `{tree.root.name}` are not alike in all its groups",
            hint="Every group needs children of the same kinds, with the same uses, for groups to change places.",
        )
    )
