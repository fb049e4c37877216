"""What an axis of a tensor consists of: classes of interchangeable positions, their products and their sums.

    Atom         positions that may change places with each other, `size` of them
    Product      row-major: position i * inner + j of the axis is position i of the first part and j of the second, as a
                 flattened (channels, height, width) or (heads, coordinates)
    Sum          one part after the other, as concatenated or fused projections

Two axes that an operation ties to each other are made one (`unify`): atoms are bound to each other, or to the finer
structure of the other side. Where two structures have no common refinement, both sides become fixed. A permutation of
an atom's positions that is applied wherever the atom stands is then something that every operation carries through.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod


@dataclass(eq=False, slots=True)
class Atom:
    """A class of positions. `fixed`: they may not change places. `bound`: what the class turned out to consist of."""

    size: int
    fixed: bool = False
    bound: Tree | None = None


@dataclass(frozen=True, slots=True)
class Product:
    parts: tuple[Tree, ...]

    @property
    def size(self) -> int:
        return prod(part.size for part in self.parts)


@dataclass(frozen=True, slots=True)
class Sum:
    parts: tuple[Tree, ...]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)


Tree = Atom | Product | Sum
UNIT: Tree = Product(())  # an axis of length 1


def fresh(size: int, fixed: bool = False) -> Tree:
    """An axis of which nothing is known yet or, if `fixed`, whose positions keep their places."""
    return UNIT if size == 1 else Atom(size, fixed)


def product(parts: Iterable[Tree]) -> Tree:
    """The product in its normal form: no product within it, no part of size 1, no sum as its first part."""
    flat: list[Tree] = []
    for part in map(resolve, parts):
        flat += part.parts if isinstance(part, Product) else [part]
    if len(flat) == 1:
        return flat[0]
    if flat and isinstance(flat[0], Sum):
        return chain(product([part, *flat[1:]]) for part in flat[0].parts)
    return Product(tuple(flat))


def chain(parts: Iterable[Tree]) -> Tree:
    """The sum in its normal form: no sum within it, no part of size 0."""
    flat: list[Tree] = []
    for part in map(resolve, parts):
        flat += part.parts if isinstance(part, Sum) else [part] if part.size else []
    return flat[0] if len(flat) == 1 else Sum(tuple(flat))


def resolve(tree: Tree) -> Tree:
    """The tree in its normal form, with every bound atom replaced by what it is bound to."""
    if isinstance(tree, Atom):
        if tree.bound is None:
            return tree
        tree.bound = resolve(tree.bound)
        return tree.bound
    return product(tree.parts) if isinstance(tree, Product) else chain(tree.parts)


def atoms(tree: Tree) -> Iterator[Atom]:
    """The atoms of a tree, from its start to its end."""
    tree = resolve(tree)
    if isinstance(tree, Atom):
        yield tree
    else:
        for part in tree.parts:
            yield from atoms(part)


def fix(tree: Tree) -> None:
    """From now on nothing in this axis changes places."""
    for atom in atoms(tree):
        atom.fixed = True


def unify(a: Tree, b: Tree) -> None:
    """Make two axes of one length the same. Where that cannot be, fix both."""
    if a.size and not _unified(a, b):
        fix(a)
        fix(b)


def cut(tree: Tree, at: int) -> tuple[Tree, Tree] | None:
    """The first `at` positions and the rest, neither of them empty; None where a product stands across the place."""
    tree = resolve(tree)
    if isinstance(tree, Atom):
        first, rest = fresh(at, tree.fixed), fresh(tree.size - at, tree.fixed)
        tree.bound = Sum((first, rest))
        return first, rest
    if isinstance(tree, Product):
        inner = prod(part.size for part in tree.parts[1:])
        halves = cut(tree.parts[0], at // inner) if at % inner == 0 else None
        return halves and (product([halves[0], *tree.parts[1:]]), product([halves[1], *tree.parts[1:]]))
    before: list[Tree] = []
    for i, part in enumerate(tree.parts):
        if at == 0:
            return chain(before), chain(tree.parts[i:])
        if at < part.size:
            halves = cut(part, at)
            return halves and (chain([*before, halves[0]]), chain([halves[1], *tree.parts[i + 1 :]]))
        before.append(part)
        at -= part.size
    raise AssertionError("the place lies outside the axis")


def places_of(tree: Tree) -> Iterator[tuple[Atom, list[int], int]]:
    """Every atom of an axis with where its positions lie: position i at `start + i * block` and the `block - 1` places
    after it, for each of the starts."""
    return _places(resolve(tree), [0], 1)


def _places(tree: Tree, starts: list[int], block: int) -> Iterator[tuple[Atom, list[int], int]]:
    if isinstance(tree, Atom):
        yield tree, starts, block
    elif isinstance(tree, Sum):
        offset = 0
        for part in tree.parts:
            yield from _places(part, [start + offset * block for start in starts], block)
            offset += part.size
    else:
        inner = tree.size * block
        for part in tree.parts:
            span, inner = inner, inner // part.size
            yield from _places(part, starts, inner)
            # What comes after this part repeats for each of its positions.
            starts = [start + i * inner for start in starts for i in range(span // inner)]


def _unified(a: Tree, b: Tree) -> bool:
    a, b = resolve(a), resolve(b)
    if a == b:
        return True
    if isinstance(a, Atom):
        return _bind(a, b)
    if isinstance(b, Atom):
        return _bind(b, a)
    if isinstance(a, Sum) or isinstance(b, Sum):
        a, b = (a, b) if isinstance(a, Sum) else (b, a)
        halves = cut(b, a.parts[0].size)
        return halves is not None and _unified(a.parts[0], halves[0]) and _unified(chain(a.parts[1:]), halves[1])
    if a.parts[0].size > b.parts[0].size:
        a, b = b, a
    first, second = a.parts[0], b.parts[0]
    if second.size == first.size:
        return _unified(first, second) and _unified(product(a.parts[1:]), product(b.parts[1:]))
    if second.size % first.size:
        return False
    # The longer first part, an atom, consists of the shorter one and of a rest.
    rest = fresh(second.size // first.size)
    return _unified(second, Product((first, rest))) and _unified(product(a.parts[1:]), product([rest, *b.parts[1:]]))


def _bind(atom: Atom, tree: Tree) -> bool:
    if atom.fixed:
        fix(tree)
    atom.bound = tree
    return True
