"""What permutations do to tensors: which stored tensor an output tensor comes from, and in which order along each axis.

Permutations are applied space by space in the order of the list, parents before children, so a child permutes what its
parent's permutation has put into its slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergekit_lite.family.spaces import Space

Order = NDArray[np.int64]
Permutations = Mapping[str, Order]  # by the space's name; a space that is not there stays as it is


@dataclass(frozen=True, slots=True)
class Move:
    """How a permuted tensor is made: from the tensor `source`, taken along each axis of `orders` in that order."""

    source: str
    orders: Mapping[int, Order] = field(default_factory=dict)


def moves(
    spaces: Sequence[Space], permutations: Permutations, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Move]:
    """What happens to every tensor that is changed. `shapes` holds at least the tensors that the spaces use."""
    found: dict[str, Move] = {}
    for space in spaces:
        p = permutations.get(space.name)
        if p is None or is_identity(p):
            continue
        for names in space.renames:
            before = [found.get(name, Move(name)) for name in names]
            found.update({name: before[p[i]] for i, name in enumerate(names)})
        for use in space.uses:
            before_axis = found.get(use.tensor, Move(use.tensor))
            order = before_axis.orders.get(use.axis)
            if order is None:
                order = np.arange(shapes[use.tensor][use.axis], dtype=np.int64)
            taken = places(group_order(space, p) if use.grouped else p, use.block)
            order = np.concatenate((order[: use.start], order[use.start + taken], order[use.start + len(taken) :]))
            found[use.tensor] = Move(before_axis.source, {**before_axis.orders, use.axis: order})
    return {name: move for name, move in found.items() if move.source != name or move.orders}


def permuted(move: Move, tensor: Any) -> Any:
    """A whole tensor (torch or NumPy) taken along its axes."""
    for axis, order in move.orders.items():
        tensor = tensor[(slice(None),) * axis + (order,)]
    return tensor


def places(p: Order, block: int) -> Order:
    """The order of elements where each unit has `block` neighbouring ones."""
    return p if block == 1 else (p[:, None] * block + np.arange(block)).reshape(-1)


def group_order(space: Space, p: Order) -> Order:
    """The order of the space's groups under a permutation of its units."""
    return p[:: space.group] // space.group


def is_identity(p: Order) -> bool:
    return bool((p == np.arange(len(p))).all())


def fault(space: Space, p: Order) -> str | None:
    """Why `p` is no permutation of this space, or None."""
    if p.shape != (space.size,):
        return f"`{space.name}` has {space.size} units, this permutation {p.size}"
    if not (np.sort(p) == np.arange(space.size)).all():
        return f"`{space.name}`: not every unit stands in one slot"
    if not (p // space.group == np.repeat(group_order(space, p), space.group)).all():
        return f"`{space.name}`: units leave their groups of {space.group}"
    return None


def composed(spaces: Sequence[Space], first: Permutations, second: Permutations) -> dict[str, Order]:
    """The permutations that do what `first` and then `second` do, for every space."""
    origin = _Origins(spaces)
    return {s.name: _of(origin.under(s, second), first)[_of(s, second)] for s in spaces}


def inverse(spaces: Sequence[Space], permutations: Permutations) -> dict[str, Order]:
    """The permutations that undo these, for every space."""
    origin = _Origins(spaces)
    found: dict[str, Order] = {}
    for space in spaces:
        found[space.name] = np.argsort(_of(origin.under(space, found), permutations), kind="stable")
    return found


class _Origins:
    """Finds the space whose content stands in a child space's slot before its parent is permuted."""

    def __init__(self, spaces: Sequence[Space]):
        self._named = {space.name: space for space in spaces}
        self._children = {(space.parent, space.kind, space.slot): space for space in spaces if space.parent}

    def under(self, space: Space, permutations: Permutations) -> Space:
        if space.parent is None:
            return space
        parent = self._named[space.parent]
        slot = int(group_order(parent, _of(parent, permutations))[space.slot])
        return self._children[self.under(parent, permutations).name, space.kind, slot]


def _of(space: Space, permutations: Permutations) -> Order:
    p = permutations.get(space.name)
    return np.arange(space.size, dtype=np.int64) if p is None else p
