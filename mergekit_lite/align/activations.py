"""Matching by what the units do: the correlation of their activations on the same inputs instead of their weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from mergekit_lite.align.apply import Order
from mergekit_lite.align.assign import Assign, Costs, assignment, value
from mergekit_lite.align.match import Solution, moved_share, nothing, silent
from mergekit_lite.align.solve import UnitCosts
from mergekit_lite.align.trees import Tree, trees
from mergekit_lite.family.spaces import Space
from mergekit_lite.lazy import Tensor

Activations = Callable[[str], Tensor]
Correlation = Callable[[Space, Space], Costs]


def match_activations(
    spaces: Sequence[Space],
    like: Activations,
    of: Activations,
    *,
    kinds: Collection[str],
    check: Callable[[], None] = nothing,
    report: Callable[[str, int, int], None] = silent,
    assign: Assign = assignment,
) -> Solution:
    """The permutations under which the units of `of` do what those of `like` do.

    Both give, by a space's name, its activations on the same inputs: (samples, size × numbers per unit), the numbers of
    one unit side by side. Units are matched by the sum of the correlations of their numbers; a number that never
    changes has none. Everything else is as in `match_correlations`.
    """

    def correlation(a: Space, b: Space) -> Costs:
        return correlations(like(a.name), of(b.name), a.size)

    return match_correlations(spaces, correlation, kinds=kinds, check=check, report=report, assign=assign)


def match_correlations(
    spaces: Sequence[Space],
    correlation: Correlation,
    *,
    kinds: Collection[str],
    check: Callable[[], None] = nothing,
    report: Callable[[str, int, int], None] = silent,
    assign: Assign = assignment,
) -> Solution:
    """The permutations with the largest sum of correlations: `correlation(a, b)` gives those of the units of space `a`
    of the one and of space `b` of the other network, (size, size), not overwritten by the caller.

    Activations do not depend on the order of other units, so each tree is one exact assignment: groups as wholes, and
    what lies inside by the best match within each pair. `a` and `b` are different spaces only inside groups, where each
    slot's units are compared with each other slot's. The solution has no distances.
    """
    found: dict[str, Order] = {}
    start, end = 0.0, 0.0
    selected = trees(spaces, kinds)
    for done, tree in enumerate(selected, 1):
        check()
        before, after, permutations = _solve(tree, correlation, assign, check)
        start, end = start + before, end + after
        found |= permutations
        report(tree.root.name, done, len(selected))
    return Solution(found, start, (end,), None, None, True, moved_share(found))


def correlations(a: Tensor, b: Tensor, size: int) -> Costs:
    """The correlations of `size` units of two networks, (size, size), from (samples, size × numbers per unit) each."""
    return np.asarray((_standard(a, size) @ _standard(b, size).T).double().cpu().numpy())


def _standard(x: Tensor, size: int) -> Tensor:
    """Every column with mean 0 and length 1, or 0 where it is constant; (size, numbers per unit × samples)."""
    x = x.reshape(len(x), -1)
    x = x - x.mean(0)
    length = x.norm(dim=0)
    x = x * (length > 0) / length.clamp_min(1e-30)
    return x.T.reshape(size, -1)


def _solve(
    tree: Tree, correlation: Correlation, assign: Assign, check: Callable[[], None]
) -> tuple[float, float, dict[str, Order]]:
    root = tree.root
    costs = UnitCosts.none(root)
    if not tree.fixed:
        costs.units -= correlation(root, root)
    inner: dict[tuple[str, int, int], Order] = {}
    worth = np.zeros((root.groups, root.groups))
    before = 0.0 if tree.fixed else costs.value(np.arange(root.size))
    for kind in tree.kinds:
        for i in range(root.groups):
            for j in [i] if tree.fixed else range(root.groups):
                check()
                a, b = tree.child(kind, i), tree.child(kind, j)
                if a is None or b is None:
                    continue
                cost = -correlation(a, b)
                inner[kind, i, j] = assign(cost)
                worth[i, j] += value(cost, inner[kind, i, j])
                before += value(cost, np.arange(a.size)) if i == j else 0.0
    if tree.fixed:
        matched = np.arange(root.groups)
        after, found = float(np.trace(worth)), {}
    else:
        costs.groups -= worth
        p = costs.best(assign)
        matched = p[:: root.group] // root.group
        after, found = costs.value(p), {root.name: p}
    for child in tree.children:
        order = inner.get((child.kind, child.slot, int(matched[child.slot])))
        if order is not None:
            found[child.name] = order
    return before, after, found
