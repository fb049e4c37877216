"""Experts and the hidden units inside them: which expert plays which part, and which unit within it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mergekit_lite.align.apply import Order, moves, permuted
from mergekit_lite.align.assign import Costs, value
from mergekit_lite.align.cost import add_products, empty, products_of, rows
from mergekit_lite.align.solve import Outcome, UnitCosts, Visit, plain_names
from mergekit_lite.errors import Problem, RecipeError
from mergekit_lite.family.spaces import Space
from mergekit_lite.lazy import Tensor

EVERY = 1 << 28  # entries of inner costs up to which every pair of experts is solved
CANDIDATES = 3  # experts of B tried for each of A beyond that
KEPT = 1 << 31  # bytes of experts of both networks that are kept in memory to be read once


@dataclass(frozen=True)
class _Inner:
    """The best inner orders of a pair of experts and what it costs with them; `now`: with the present ones."""

    orders: dict[str, Order]
    cost: float
    now: float


def solve_experts(visit: Visit) -> Outcome:
    """A space of renamed tensors whose units hold spaces of their own.

    The cost of a pair is that of the plain tensors (the router) and of the best inner match. Where there are too many
    large experts for every pair, an inner match is made for the `CANDIDATES` experts of B most like one of A, by the
    router's rows and the sorted norms of the hidden units, and for any other pair that is assigned all the same.
    """
    root, tree = visit.tree.root, visit.tree
    if root.group > 1:
        hint = "Leave out the inner kind or the grouping."
        raise RecipeError(Problem(f"`{root.name}` has grouped units with spaces inside them", hint=hint))
    costs = UnitCosts.none(root)
    for pair in visit.ledger.pairs(tree, visit.permutations, plain_names(visit)):
        costs.add(visit, pair)
    shelf = _Shelf(visit)
    similar = shelf.survey(costs.units)
    now = visit.current(root)
    count = root.size
    inner = max(child.size for child in tree.children)
    if (count * inner) ** 2 <= EVERY or not shelf.filled:
        wanted = [list(range(count)) for _ in range(count)]
    else:
        wanted = [
            sorted({int(now[i]), *map(int, np.argsort(-similar[i], kind="stable")[:CANDIDATES])}) for i in range(count)
        ]
    found: dict[tuple[int, int], _Inner] = {}
    for i, candidates in enumerate(wanted):
        for j in candidates:
            visit.check()
            found[i, j] = shelf.pair(i, j)
    p = _outer(visit, costs.units, found, shelf)
    inside = {
        shelf.child(kind, i).name: order for i, j in enumerate(p) for kind, order in found[i, int(j)].orders.items()
    }
    before = value(costs.units, now) - sum(found[i, int(j)].now for i, j in enumerate(now))
    after = value(costs.units, p) - sum(found[i, int(j)].cost for i, j in enumerate(p))
    return Outcome({root.name: p, **inside}, before, after)


def _outer(visit: Visit, units: Costs, found: dict[tuple[int, int], _Inner], shelf: _Shelf) -> Order:
    """Which expert goes where. A pair that was not tried counts as no better inside than the worst that was; if it is
    assigned all the same, it is tried and all are assigned again."""
    while True:
        worst = max(match.cost for match in found.values())
        outer = units + worst
        for (i, j), match in found.items():
            outer[i, j] = units[i, j] + match.cost
        p = visit.assign(outer)
        missing = [(i, int(j)) for i, j in enumerate(p) if (i, int(j)) not in found]
        if not missing:
            return p
        for i, j in missing:
            visit.check()
            found[i, j] = shelf.pair(i, j)


@dataclass
class _Shelf:
    """The experts' tensors, kept where they fit into `KEPT` bytes and read again where not."""

    visit: Visit
    filled: bool = field(init=False)  # whether experts say anything about each other now
    _kept: dict[tuple[int, int], dict[str, Tensor]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        wanted, tree = set(self.visit.names), self.visit.tree
        self._renames = [names for names in tree.root.renames if wanted.issuperset(names)]
        self.filled = bool(self._renames)
        self._moves = moves(self.visit.ledger.outside(tree), self.visit.permutations, self.visit.shapes)
        numbers = sum(int(np.prod(self.visit.shapes[name])) for names in self._renames for name in names)
        self._keep = 2 * 4 * numbers <= KEPT
        inner = {use.tensor for child in tree.children for use in child.uses if use.weighed}
        self._whole = [names for names in self._renames if not inner.issuperset(names)]

    def child(self, kind: str, slot: int) -> Space:
        child = self.visit.tree.child(kind, slot)
        if child is None:
            raise RecipeError(
                Problem(
                    f"expert {slot} of `{self.visit.tree.root.name}` has no space `{kind}`, others have",
                    hint="Experts can only change places if they are alike.",
                )
            )
        return child

    def survey(self, units: Costs) -> NDArray[np.float64]:
        """How much each expert of B is like each of A, (count, count), by what can be told without matching inside.
        Reads every expert once."""
        norms: tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]] = ([], [])
        for i in range(self.visit.tree.root.size):
            self.visit.check()
            mine, theirs = self._tensors(0, i), self._tensors(1, i)
            for name in mine:
                self.visit.ledger.note(name, mine[name], None if name in self._moves else theirs[name])
            norms[0].append(self._norms(i, mine))
            norms[1].append(self._norms(i, theirs))
        a, b = (np.stack(found) for found in norms)
        length = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)[None, :]
        inside = np.divide(a @ b.T, length, out=np.zeros_like(length), where=length > 0)
        scale = np.abs(units).max()
        return np.asarray(inside - units / scale if scale > 0 else inside)

    def _norms(self, slot: int, tensors: Mapping[str, Tensor]) -> NDArray[np.float64]:
        found = []
        for kind in self.visit.tree.kinds:
            child = self.child(kind, slot)
            squares = np.zeros(child.size)
            for use in child.uses:
                if use.weighed and use.tensor in tensors:
                    squares += rows(tensors[use.tensor], use, child.size).square().sum(1).double().cpu().numpy()
            found.append(np.sort(np.sqrt(squares)))
        return np.concatenate(found)

    def _tensors(self, which: int, slot: int) -> dict[str, Tensor]:
        if (which, slot) in self._kept:
            return self._kept[which, slot]
        ledger, found = self.visit.ledger, {}
        for names in self._renames:
            name = names[slot]
            if which == 0:
                found[name] = ledger.like(name)
            else:
                move = self._moves.get(name)
                b = ledger.of(name if move is None else move.source)
                found[name] = b if move is None else permuted(move, b)
        if self._keep:
            self._kept[which, slot] = found
        return found

    def pair(self, i: int, j: int) -> _Inner:
        """Expert j of B matched to expert i of A."""
        mine, theirs, visit = self._tensors(0, i), self._tensors(1, j), self.visit
        whole = 0.0
        for names in self._whole:
            weight = visit.ledger.weight(names[i], names[j])
            whole -= weight * products_of(mine[names[i]], theirs[names[j]])
        cost, now, orders = whole, whole, {}
        for kind in visit.tree.kinds:
            a, b = self.child(kind, i), self.child(kind, j)
            inner = empty(a.size)
            for use_a, use_b in zip(a.uses, b.uses, strict=True):
                if use_a.weighed and use_a.tensor in mine:
                    weight = visit.ledger.weight(use_a.tensor, use_b.tensor)
                    left, right = rows(mine[use_a.tensor], use_a, a.size), rows(theirs[use_b.tensor], use_b, a.size)
                    add_products(inner, left, right, weight, visit.threads)
            orders[kind] = visit.assign(inner)
            cost -= value(inner, orders[kind])
            now -= value(inner, visit.current(a))
        return _Inner(orders, cost, now)
