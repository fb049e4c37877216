"""Fewer units: which of a space are kept, and what is left of every tensor.

Units that are kept come first, in the order that they had, so a slice is a permutation of which the end is cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mergekit_lite.align.apply import Move, Order
from mergekit_lite.align.cost import Tensors
from mergekit_lite.align.reorder import Units, lineage
from mergekit_lite.align.trees import Shapes
from mergekit_lite.errors import InputError
from mergekit_lite.family.spaces import Space
from mergekit_lite.lazy import torch

Spans = tuple[tuple[int, int], ...]  # [start, stop) along an axis, in order
Kept = tuple[tuple[int, Spans], ...]  # by axis; an axis that is not there is kept whole


def kept_spans(spaces: Sequence[Space], keep: Mapping[str, int], shapes: Shapes) -> dict[str, Kept]:
    """What is left of every tensor that becomes smaller where of each space the first `keep` units are kept; spaces
    that are not named there stay whole."""
    left: dict[str, dict[int, np.ndarray]] = {}
    for space in spaces:
        size = keep.get(space.name, space.size)
        if size == space.size:
            continue
        for use in space.uses:
            whole, first = (space.groups, size // space.group) if use.grouped else (space.size, size)
            axes = left.setdefault(use.tensor, {})
            mask = axes.setdefault(use.axis, np.ones(shapes[use.tensor][use.axis], dtype=bool))
            mask[use.start + first * use.block : use.start + whole * use.block] = False
    return {name: tuple((axis, _spans(axes[axis])) for axis in sorted(axes)) for name, axes in left.items()}


def kept_shape(shape: tuple[int, ...], kept: Kept) -> tuple[int, ...]:
    """The shape of what is left."""
    lengths = {axis: sum(stop - start for start, stop in spans) for axis, spans in kept}
    return tuple(lengths.get(axis, length) for axis, length in enumerate(shape))


def cut(move: Move, kept: Kept, shape: tuple[int, ...]) -> dict[int, Order]:
    """The orders of `move` for a tensor of `shape`, without what is not kept of the permuted tensor."""
    orders = dict(move.orders)
    for axis, spans in kept:
        order = orders.get(axis, np.arange(shape[axis], dtype=np.int64))
        orders[axis] = np.concatenate([order[start:stop] for start, stop in spans])
    return orders


def important(
    spaces: Sequence[Space],
    keep: Mapping[str, int],
    of: Tensors,
    *,
    shapes: Shapes,
    check: Callable[[], None] = lambda: None,
    report: Callable[[str, int, int], None] = lambda space, done, total: None,
) -> tuple[dict[str, Order], dict[str, float]]:
    """For every space of `keep` the permutation that puts the units with the largest L1 norm first, as many as are
    kept, and the share of the space's norm that they hold.

    The norm of a unit is summed in float64 over all that the space's uses hold of it, running statistics left out; of
    equal ones the lower number is kept. Units in groups are kept by whole groups. Those that are kept, and the others
    behind them, stay in their order. A space within another is looked at as it lies after the other was permuted.

    `of` gives a tensor by name, each once for every space that uses it; one is in memory at a time. Raises InputError
    for tensors with NaN or infinite values.
    """
    named = {space.name: space for space in spaces}
    chosen = [space for space in spaces if space.name in keep]
    found: dict[str, Order] = {}
    shares: dict[str, float] = {}
    for done, space in enumerate(chosen, start=1):
        check()
        norms = np.zeros(space.groups)
        for _, held in Units(space, lineage(space, named), found, shapes, of).each():
            norms += held.abs().sum(dim=1, dtype=torch.float64).reshape(space.groups, -1).sum(dim=1).cpu().numpy()
        if not np.isfinite(norms).all():
            raise InputError(
                f"the tensors of the space `{space.name}` hold NaN or infinite values",
                hint="`merge inspect --stats` finds them; `order: leading` looks at no numbers",
            )
        first = keep[space.name] // space.group
        ranked = np.argsort(-norms, kind="stable")
        groups = np.concatenate([np.sort(ranked[:first]), np.sort(ranked[first:])])
        found[space.name] = (groups[:, None] * space.group + np.arange(space.group)).reshape(-1)
        total = float(norms.sum())
        shares[space.name] = float(norms[ranked[:first]].sum()) / total if total else 1.0
        report(space.name, done, len(chosen))
    return found, shares


def _spans(mask: np.ndarray) -> Spans:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return tuple(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
