"""How much memory a match takes, from shapes alone: what a plan states before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from math import prod

from mergekit_lite.align.cost import PIECE, ROWS
from mergekit_lite.align.experts import KEPT
from mergekit_lite.align.trees import Shapes
from mergekit_lite.family.moe import ExpertLayer
from mergekit_lite.family.spaces import Space


def matching_bytes(space: Space, shapes: Shapes, *, children: Sequence[Space] = (), number: int = 4) -> int:
    """The most bytes in use while a space and those of its children that may move are solved, on one thread.

    `number`: bytes of a number of the tensors as they are read (4 for float32, 8 for float64). Counted are the costs in
    float64, of which SciPy makes no copy, the tensors that are held together, with their copies in another order, and
    the products of `ROWS` rows. Trees solved at the same time take that much each.
    """
    n, groups = space.size, space.groups
    costs = 8 * n * n + (8 * groups * groups if space.group > 1 else 0)
    pieces = number * ROWS * n + 2 * 8 * PIECE
    renamed = set(chain.from_iterable(space.renames))
    used = {use.tensor for each in (space, *children) for use in each.uses if use.weighed} - renamed
    sizes = {name: number * prod(shapes[name]) for name in used | renamed}
    flying = 5 * max((sizes[name] for name in used), default=0)  # A, B, B in another order, both as rows of units
    twice = _both_axes(space) & used
    if twice:
        costs += 8 * n * n
    kept = sum(2 * sizes[name] for name in twice)
    if not children:
        kept += max((sum(2 * sizes[name] for name in names) for names in space.renames), default=0)
        return costs + pieces + flying + kept
    inner = max(child.size for child in children)
    if renamed:
        experts = 2 * sum(sizes[name] for name in renamed)
        two = 5 * max(sum(sizes[names[e]] for names in space.renames) for e in range(n))
        return costs + pieces + flying + 8 * inner * inner + number * ROWS * inner + two + min(experts, KEPT)
    each = 8 * inner * inner * (space.group**2 + 1) + 8 * groups**2 * (len(children) // groups + 1) * inner
    return costs + pieces + flying + each + 2 * sum(sizes[name] for name in used)


def pair_bytes(layer: ExpertLayer, number: int = 4) -> int:
    """The most bytes in use while the hidden units of one expert of a layer are matched with those of another: both
    whole, one weight of each as rows of units, the products of `ROWS` rows and the costs in float64."""
    largest = max(weight.numel for weight in layer.weights)
    return number * (2 * layer.numel + 3 * largest + ROWS * layer.units) + 8 * layer.units**2


def _both_axes(space: Space) -> set[str]:
    """The tensors that the space permutes along several axes."""
    axes: dict[str, set[int]] = {}
    for use in space.uses:
        axes.setdefault(use.tensor, set()).add(use.axis)
    return {name for name, found in axes.items() if len(found) > 1}
