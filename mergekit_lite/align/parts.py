"""The trees of many networks that have to be matched together, and their tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from mergekit_lite.align.apply import Move, Order, Permutations, moves, permuted
from mergekit_lite.align.assign import Assign
from mergekit_lite.align.cost import Tensors, products_of
from mergekit_lite.align.match import match
from mergekit_lite.align.trees import Couplings, Shapes, Tree, trees
from mergekit_lite.family.spaces import Space
from mergekit_lite.lazy import Tensor

KEPT = 1 << 31  # bytes of the tensors of all models up to which coupled trees are kept in memory


@dataclass(frozen=True)
class Settings:
    """What every match among many goes by."""

    shapes: Shapes
    kinds: Collection[str]
    max_sweeps: int
    seed: int
    threads: Executor | None
    check: Callable[[], None]
    assign: Assign


@dataclass(frozen=True)
class Part:
    """Trees that are coupled to each other and to no others, and the tensors of all models that they permute."""

    spaces: list[Space]
    trees: list[Tree]
    names: list[str]
    models: list[Tensors]
    settings: Settings

    def identity(self) -> list[dict[str, Order]]:
        return [{s.name: np.arange(s.size) for tree in self.trees for s in tree.spaces} for _ in self.models]

    def permuted(self, model: int, permutations: Permutations) -> Tensors:
        """A model's tensors in the order that the permutations put them in."""
        found = moves(self.spaces, permutations, self.settings.shapes)
        return lambda name: take(found.get(name), name, self.models[model])

    def matched(
        self, like: Tensors, model: int, start: Permutations | None, seed: int
    ) -> tuple[dict[str, Order], bool]:
        """A model matched to given tensors, and whether that ended by itself."""
        s = self.settings
        found = match(
            self.spaces,
            like,
            self.models[model],
            shapes=s.shapes,
            kinds=s.kinds,
            max_sweeps=s.max_sweeps,
            seed=seed,
            threads=s.threads,
            check=s.check,
            assign=s.assign,
            start=start,
        )
        return found.permutations, found.settled

    def agreement(self, permutations: Sequence[Permutations]) -> float:
        orders = [self.permuted(i, p) for i, p in enumerate(permutations)]
        return sum(pair_products([of(name) for of in orders]) for name in self.names)


def take(move: Move | None, name: str, of: Tensors) -> Tensor:
    """A tensor as a move makes it."""
    return of(name) if move is None else permuted(move, of(move.source))


def pair_products(tensors: Sequence[Tensor]) -> float:
    """The sum of the products of every two of these tensors."""
    whole = tensors[0].clone()
    for tensor in tensors[1:]:
        whole += tensor
    return (products_of(whole, whole) - sum(products_of(tensor, tensor) for tensor in tensors)) / 2


def parts_of(spaces: Sequence[Space], models: Sequence[Tensors], settings: Settings) -> list[Part]:
    found = trees(spaces, settings.kinds)
    couplings = Couplings(found, settings.shapes)
    left, parts = set(range(len(found))), []
    while left:
        together, edge = set[int](), {min(left)}
        while edge:
            together |= edge
            edge = {j for i in edge for j in couplings.neighbours[i]} - together
        left -= together
        chosen = [found[i] for i in sorted(together)]
        own = {space.name for tree in chosen for space in (tree.root, *tree.children)}
        names = list(dict.fromkeys(name for tree in chosen for name in tree.axes))
        parts.append(Part([s for s in spaces if s.name in own], chosen, names, list(models), settings))
    return parts


def kept(part: Part) -> Part:
    """The part with its tensors in memory, where they are one layer's or small enough."""
    numbers = sum(prod(part.settings.shapes[name]) for name in part.names)
    layer = len(part.trees) == 1 and not part.trees[0].root.renames
    if not layer and 4 * numbers * len(part.models) > KEPT:
        return part
    held: list[Mapping[str, Tensor]] = []
    for model in part.models:
        part.settings.check()
        held.append({name: model(name) for name in part.names})
    return replace(part, models=[each.__getitem__ for each in held])
