"""Which spaces have to be solved together, which tensors tie them to others, and in which order they are visited.

A *tree* is a space with its children: they share one assignment. Two trees are *coupled* if they permute one tensor
along different axes; trees that are not coupled can be solved at the same time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import prod

from mergekit_lite.errors import Problem, RecipeError
from mergekit_lite.family.spaces import Space

NAME = -1  # stands for an axis where a tensor as a whole changes its name

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Tree:
    """`root` and those of its children that may move. `fixed`: the root itself stays as it is.

    `axes` are the axes that the tree permutes, for each tensor that says which units belong together.
    """

    root: Space
    children: tuple[Space, ...] = ()
    fixed: bool = False
    axes: Mapping[str, frozenset[int]] = field(default_factory=dict)

    @property
    def spaces(self) -> tuple[Space, ...]:
        return self.children if self.fixed else (self.root, *self.children)

    def child(self, kind: str, slot: int) -> Space | None:
        return self._by_slot.get((kind, slot))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of the children, in the order of the list of spaces."""
        return tuple(dict.fromkeys(child.kind for child in self.children))

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_slot", {(child.kind, child.slot): child for child in self.children})

    _by_slot: Mapping[tuple[str, int], Space] = field(init=False, repr=False, compare=False, default_factory=dict)


def trees(spaces: Sequence[Space], kinds: Collection[str]) -> list[Tree]:
    """The trees of all spaces of these kinds, in the order of `spaces`. Raises RecipeError for grandchildren."""
    named = {space.name: space for space in spaces}
    children: dict[str, list[Space]] = defaultdict(list)
    roots: dict[str, Space] = {}
    for space in spaces:
        if space.parent is not None:
            parent = named[space.parent]
            if parent.parent is not None:
                hint = "Make it a child of the outer space."
                raise RecipeError(
                    Problem(f"`{space.name}` lies in `{parent.name}`, which lies in another space", hint=hint)
                )
            if space.kind in kinds:
                children[parent.name].append(space)
                roots[parent.name] = parent
        elif space.kind in kinds:
            roots[space.name] = space
    order = [space for space in spaces if space.name in roots]
    return [_tree(root, tuple(children[root.name]), root.kind not in kinds) for root in order]


def _tree(root: Space, children: tuple[Space, ...], fixed: bool) -> Tree:
    axes: dict[str, set[int]] = defaultdict(set)
    for space in children if fixed else (root, *children):
        for use in space.uses:
            if use.weighed:
                axes[use.tensor].add(use.axis)
        for name in chain.from_iterable(space.renames):
            axes[name].add(NAME)
    return Tree(root, children, fixed, {name: frozenset(found) for name, found in axes.items()})


class Couplings:
    """For every tree the tensors it shares with others along another axis. Trees are known by their place in a list."""

    def __init__(self, found: Sequence[Tree], shapes: Shapes):
        self.trees = found
        users: dict[str, list[int]] = defaultdict(list)
        for i, tree in enumerate(found):
            for name in tree.axes:
                users[name].append(i)
        # others[i][tensor]: the trees coupled to tree i through this tensor, i itself if it permutes several axes of it
        self.others: list[dict[str, frozenset[int]]] = []
        for i, tree in enumerate(found):
            ties = {name: frozenset(j for j in users[name] if self._tied(i, j, name)) for name in tree.axes}
            self.others.append(ties)
        self.neighbours = [frozenset(chain.from_iterable(ties.values())) for ties in self.others]
        self._shapes = shapes

    def _tied(self, i: int, j: int, name: str) -> bool:
        axes = self.trees[i].axes[name] | self.trees[j].axes[name]
        if i == j:  # an expert and its inner units are one assignment
            axes -= {NAME}
        return len(axes) > 1

    @property
    def any(self) -> bool:
        return any(self.neighbours)

    def anchored(self, i: int, solved: Collection[int]) -> list[str]:
        """The tensors of tree i whose other axes stay as they are or are solved."""
        return [name for name, others in self.others[i].items() if others <= set(solved)]

    def length(self, i: int, names: Iterable[str]) -> float:
        """How many numbers of these tensors each unit of tree i has, on average."""
        return sum(prod(self._shapes[name]) for name in names) / self.trees[i].root.size

    def first_rounds(self, order: Sequence[int]) -> list[list[tuple[int, list[str]]]]:
        """Rounds of the first sweep: (tree, the tensors to solve it from). The tree with most anchored numbers per unit
        goes first, ties in the given order; with it go all that depend on nothing unsolved. Trees of one round are not
        coupled. Without any anchor a tree takes all its tensors, the other trees as they are."""
        left, solved, rounds = list(order), set[int](), []
        while left:
            names = {i: self.anchored(i, solved) for i in left}
            best = max(left, key=lambda i: self.length(i, names[i]))
            if not names[best]:
                names[best] = list(self.trees[best].axes)
            now = [best]
            for i in left:
                free = self.neighbours[i] <= solved
                if i != best and free and not any(i in self.neighbours[j] for j in now):
                    now.append(i)
            rounds.append([(i, names[i]) for i in now])
            solved.update(now)
            left = [i for i in left if i not in solved]
        return rounds

    def rounds(self, order: Sequence[int]) -> list[list[int]]:
        """Rounds of trees that are not coupled; solving them gives what solving them in the given order does."""
        level: dict[int, int] = {}
        for i in order:
            level[i] = 1 + max((level[j] for j in self.neighbours[i] if j in level), default=-1)
        found: list[list[int]] = [[] for _ in range(max(level.values(), default=-1) + 1)]
        for i in order:
            found[level[i]].append(i)
        return found
