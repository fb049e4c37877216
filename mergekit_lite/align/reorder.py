"""Smooth order: the units of a space in an order in which neighbours are alike, the function of the network unchanged
(Neural Metamorphosis, ECCV 2024, arXiv 2410.11878).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from mergekit_lite.align.apply import Order, group_order, moves, permuted
from mergekit_lite.align.cost import Tensors, rows
from mergekit_lite.align.distances import Metric, UnitDistances, variation
from mergekit_lite.align.path import Distances, path_length, shortest_path
from mergekit_lite.align.trees import Shapes
from mergekit_lite.errors import InputError
from mergekit_lite.family.spaces import Space
from mergekit_lite.lazy import Tensor, torch


@dataclass(frozen=True, slots=True)
class Smoothness:
    """One space before and after. The length is the sum of distances between neighbouring units (with groups: those
    within each group and those between whole groups); the variation is the sum of absolute differences between
    neighbouring units in one tensor, the mean over the uses of the space."""

    length_before: float
    length_after: float
    variation_before: float
    variation_after: float


def reorder(
    spaces: Sequence[Space],
    of: Tensors,
    *,
    shapes: Shapes,
    kinds: Collection[str] = ("mlp",),
    metric: Metric = "l1",
    starts: int = 4,
    seed: int = 0,
    threads: Executor | None = None,
    check: Callable[[], None] = lambda: None,
    report: Callable[[str, int, int], None] = lambda space, done, total: None,
) -> tuple[dict[str, Order], dict[str, Smoothness]]:
    """The permutation of every space of `kinds` that makes its order smooth, and its figures, by the space's name.

    A unit is everything that its space's uses hold of it, running statistics left out. The order is the shortest path
    that nearest neighbour from `starts` seeded first units, 2-opt and Or-opt find; for nine units or fewer the shortest
    there is. It is never longer than the one that was. Units in groups are ordered within each group first, then the
    groups as wholes. A space within another is ordered as it lies after the other was permuted.

    `of` gives a tensor by name; each is read twice for every space that uses it. `shapes` holds those of all tensors
    that the spaces name. Memory: 4 n² bytes for n units (8 n² in float64), and two copies of one tensor (of one tensor
    of all experts, where experts are ordered). `threads` share the distances; none of them may wait for this call.
    `check` raises to stop; `report` gets a space that is done, how many are, and how many there are.

    Raises InputError for tensors with NaN or infinite values.
    """
    chosen = [space for space in spaces if space.kind in kinds]
    parents = {space.name: space for space in spaces}
    found: dict[str, Order] = {}
    figures: dict[str, Smoothness] = {}
    for done, space in enumerate(chosen, start=1):
        units = Units(space, lineage(space, parents), found, shapes, of)

        def path(distances: Distances) -> Order:
            return shortest_path(distances, starts=starts, seed=seed, check=check)

        def between(count: int) -> UnitDistances:
            return UnitDistances(count, metric, threads, check)

        if space.group == 1:
            order, before, after = _plain(units, between, path)
        else:
            order, before, after = _grouped(units, between, path)
        smoothness = Smoothness(before, after, *units.variations(order))
        found[space.name], figures[space.name] = order, smoothness
        report(space.name, done, len(chosen))
    return found, figures


def lineage(space: Space, named: dict[str, Space]) -> list[Space]:
    """The spaces that this one lies in, the outermost first."""
    found: list[Space] = []
    while space.parent is not None:
        space = named[space.parent]
        found.insert(0, space)
    return found


class Units:
    """What the uses of a space hold of its units, as it lies once the spaces around it are permuted."""

    def __init__(self, space: Space, around: list[Space], found: dict[str, Order], shapes: Shapes, of: Tensors):
        self.space, self._of = space, of
        self._moves = moves(around, found, shapes)

    def each(self, order: Order | None = None) -> Iterator[tuple[bool, Tensor]]:
        """For one use after the other: whether it is by groups, and (units or groups, numbers per each) in `order`."""
        space = self.space
        for use in space.uses:
            if use.weighed:
                count = space.groups if use.grouped else space.size
                held = rows(self._tensor(use.tensor), use, count)
                if order is not None:
                    held = held[group_order(space, order) if use.grouped else order]
                yield use.grouped, held
        for names in space.renames:
            yield False, torch.stack([self._tensor(names[i]).reshape(-1) for i in _all(space, order)])

    def variations(self, order: Order) -> tuple[float, float]:
        """The variation now and in `order`."""
        groups = group_order(self.space, order)
        found = [(variation(held), variation(held[groups if by else order])) for by, held in self.each()]
        return _mean([now for now, _ in found]), _mean([then for _, then in found])

    def _tensor(self, name: str) -> Tensor:
        move = self._moves.get(name)
        tensor = self._of(name) if move is None else permuted(move, self._of(move.source))
        return tensor if tensor.dtype == torch.float64 else tensor.float()


def _all(space: Space, order: Order | None) -> Order:
    return np.arange(space.size, dtype=np.int64) if order is None else order


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def _plain(
    units: Units, between: Callable[[int], UnitDistances], path: Callable[[Distances], Order]
) -> tuple[Order, float, float]:
    """The order of units that stand alone; the length before and after."""
    total = between(units.space.size)
    for _, held in units.each():
        total.add(held)
    distances = _finite(total, units.space)
    order = path(distances)
    return order, path_length(distances, _all(units.space, None)), path_length(distances, order)


def _grouped(
    units: Units, between: Callable[[int], UnitDistances], path: Callable[[Distances], Order]
) -> tuple[Order, float, float]:
    """The same for units in groups: within each group, then the groups. Where that comes out longer, as they were."""
    space, group = units.space, units.space.group
    inner = [between(group) for _ in range(space.groups)]
    for grouped, held in units.each():
        if not grouped:
            for own, part in zip(inner, held.split(group), strict=True):
                own.add(part)
    within = [_finite(own, space) for own in inner]
    orders = [path(distances) for distances in within]
    identity = _all(space, None)

    def lengths(order: Order | None) -> tuple[float, Distances]:
        total = between(space.groups)
        for _, held in units.each(order):
            total.add(held.reshape(space.groups, -1))
        kept = [identity[:group]] * space.groups if order is None else orders
        return sum(path_length(d, p) for d, p in zip(within, kept, strict=True)), _finite(total, space)

    inside_before, apart = lengths(None)
    before = inside_before + path_length(apart, identity[: space.groups])
    inside, apart = lengths(np.concatenate([i * group + order for i, order in enumerate(orders)]))
    outer = path(apart)
    after = inside + path_length(apart, outer)
    if after >= before:
        return identity, before, before
    return np.concatenate([i * group + orders[i] for i in outer]), before, after


def _finite(total: UnitDistances, space: Space) -> Distances:
    distances = total.matrix()
    if not np.isfinite(distances).all():
        raise InputError(
            f"the tensors of the space `{space.name}` hold NaN or infinite values",
            hint="`merge inspect --stats` finds them; leave this kind of space out of `spaces`",
        )
    return distances
