"""Axes on their own: structures over as many places as there are, tied to each other at random."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mergekit_lite.align.axis import Sum, Tree, atoms, chain, cut, fresh, places_of, product, unify


@st.composite
def trees(draw: Any, size: int, depth: int = 3) -> Tree:
    """A structure with `size` places."""
    factors = [n for n in range(2, size) if size % n == 0]
    choice = draw(st.sampled_from(["atom", "sum", "product"])) if depth and size > 1 else "atom"
    if choice == "product" and factors:
        outer = draw(st.sampled_from(factors))
        return product([draw(trees(outer, depth - 1)), draw(trees(size // outer, depth - 1))])
    if choice == "sum":
        first = draw(st.integers(1, size - 1))
        return chain([draw(trees(first, depth - 1)), draw(trees(size - first, depth - 1))])
    return fresh(size, fixed=draw(st.integers(0, 9)) == 0)


def order_of(tree: Tree, orders: dict[Any, np.ndarray]) -> np.ndarray:
    """The order of an axis' places, by marking each place with the coordinates of all its atoms and sorting it out."""
    size = tree.size
    order = np.arange(size)
    for atom, starts, block in places_of(tree):
        step = np.arange(size)
        for start in starts:
            for i, source in enumerate(orders[atom]):
                step[start + i * block : start + (i + 1) * block] = np.arange(block) + start + source * block
        order = order[step]
    return order


@given(st.data(), st.integers(1, 36), st.integers(0, 2**32 - 1))
def test_axes_that_are_tied_take_every_permutation_alike(data: Any, size: int, seed: int) -> None:
    a, b, c = (data.draw(trees(size)) for _ in range(3))
    unify(a, b)
    unify(b, c)
    if size > 1:
        cut(a, data.draw(st.integers(1, size - 1)))
    random = np.random.default_rng(seed)
    free = {atom for tree in (a, b, c) for atom in atoms(tree)}
    orders = {atom: np.arange(atom.size) if atom.fixed else random.permutation(atom.size) for atom in free}
    made = [order_of(tree, orders) for tree in (a, b, c)]
    assert sorted(made[0]) == list(range(size))
    assert (made[0] == made[1]).all() and (made[1] == made[2]).all()


def test_cutting_a_sum_of_products() -> None:
    heads, width, rest = fresh(3), fresh(2), fresh(5)
    halves = cut(chain([product([heads, width]), rest]), 4)
    assert halves is not None and [half.size for half in halves] == [4, 7]
    assert isinstance(product([heads, width]), Sum)
