"""Rules for operations that move, cut, join or choose elements and compute nothing (see ops.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

from mergekit_lite.align.axis import UNIT, Tree, chain, cut, fix, fresh, product, unify
from mergekit_lite.align.node import Axes, Call, Rule, broadcast, dims_of


def _view(call: Call) -> list[Axes]:
    """The same elements in another shape: runs of axes that hold as many elements are tied to each other."""
    shape = call.shapes[0]
    axes = [axis for axis in call.first.axes if axis.size != 1]
    sizes = [size for size in shape if size != 1]
    if prod(sizes) != prod(call.first.shape) or 0 in sizes:
        return []
    made: list[Tree] = []
    while axes:
        before, after = [axes.pop(0)], [fresh(sizes.pop(0))]
        while (held := prod(axis.size for axis in before)) != (taken := prod(axis.size for axis in after)):
            if held < taken:
                before.append(axes.pop(0))
            else:
                after.append(fresh(sizes.pop(0)))
        unify(product(after), product(before))
        made += after
    rest = iter(made)
    return [tuple(UNIT if size == 1 else next(rest) for size in shape)]


def _permute(call: Call) -> list[Axes]:
    axes = call.first.axes
    return [tuple(axes[d] for d in dims_of(call, "dims"))]


def _transpose(call: Call) -> list[Axes]:
    axes = list(call.first.axes)
    i, j = call["dim0"], call["dim1"]
    axes[i], axes[j] = axes[j], axes[i]
    return [tuple(axes)]


def _expand(call: Call) -> list[Axes]:
    return [broadcast([call.first.axes], call.shapes[0])]


def _repeat(call: Call) -> list[Axes]:
    counts = call["repeats"]
    axes = (*[UNIT] * (len(counts) - len(call.first.axes)), *call.first.axes)
    return [tuple(product([fresh(n), axis]) for n, axis in zip(counts, axes, strict=True))]


def _cat(call: Call) -> list[Axes]:
    values = [value.axes for value in call["tensors"] if value.shape != (0,)]
    d = call["dim"] % len(values[0])
    for axes in values[1:]:
        for i, axis in enumerate(axes):
            if i != d:
                unify(values[0][i], axis)
    joined = chain(axes[d] for axes in values)
    return [tuple(joined if i == d else axis for i, axis in enumerate(values[0]))]


def _parts(call: Call, sizes: Sequence[int]) -> tuple[list[Tree], Callable[[Tree], Axes]]:
    """An axis as parts of these sizes, and what puts a part in the axis's place."""
    axes = call.first.axes
    d = call["dim"] % len(axes)
    parts: list[Tree] = []
    rest = axes[d]
    for size in sizes[:-1]:
        halves = cut(rest, size) if 0 < size < rest.size else None
        if halves is None:
            fix(axes[d])
            parts = [fresh(size, fixed=True) for size in sizes]
            break
        parts.append(halves[0])
        rest = halves[1]
    else:
        parts.append(rest)
    return parts, lambda part: (*axes[:d], part, *axes[d + 1 :])


def _split(call: Call) -> list[Axes]:
    d = call["dim"] % len(call.first.axes)
    parts, put = _parts(call, [shape[d] for shape in call.shapes])
    return [put(part) for part in parts]


def _slice(call: Call) -> list[Axes]:
    axes, d = call.first.axes, call["dim"] % len(call.first.axes)
    size, taken = axes[d].size, call.shapes[0][d]
    start = call["start"] or 0
    start = min(max(start + size if start < 0 else start, 0), size)
    if taken == 0:
        return []
    if call["step"] != 1:
        fix(axes[d])
        return [(*axes[:d], fresh(taken, fixed=True), *axes[d + 1 :])]
    sizes = [start, taken, size - start - taken]
    place = 1 if start else 0
    parts, put = _parts(call, [size for size in sizes if size])
    return [put(parts[place])]


def _select(call: Call) -> list[Axes]:
    axes, d = call.first.axes, call["dim"] % len(call.first.axes)
    size = axes[d].size
    start = call["index"] % size
    _parts(call, [part for part in (start, 1, size - start - 1) if part])
    return [(*axes[:d], *axes[d + 1 :])]


def _pad(call: Call) -> list[Axes]:
    """Zeros before and after: a part of their own, whatever its order."""
    axes, pad = list(call.first.axes), call["pad"]
    for i in range(len(pad) // 2):
        before, after = pad[2 * i : 2 * i + 2]
        if before < 0 or after < 0:
            return []
        axes[-1 - i] = chain([fresh(before), axes[-1 - i], fresh(after)])
    return [tuple(axes)]


def _index(call: Call) -> list[Axes]:
    """Chosen places along neighbouring axes, which are fixed."""
    axes, chosen = call["self"].axes, call["indices"]
    places = [d for d, index in enumerate(chosen) if index is not None]
    first, end = places[0], places[-1] + 1
    if len(places) != end - first:
        return []
    for d in places:
        fix(axes[d])
    indices = [chosen[d].axes for d in places]
    rank = max(map(len, indices))
    return [(*axes[:first], *broadcast(indices, call.shapes[0][first : first + rank]), *axes[end:])]


VIEWS: Mapping[str, Rule] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten"), _view),
    "permute": _permute,
    "transpose": _transpose,
    "t": lambda call: [call.first.axes[::-1]],
    "expand": _expand,
    "repeat": _repeat,
    "cat": _cat,
    "split_with_sizes": _split,
    "split": _split,
    "slice": _slice,
    "select": _select,
    "constant_pad_nd": _pad,
    "index": _index,
}
