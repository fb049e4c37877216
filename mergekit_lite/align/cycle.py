"""Many networks matched all at once and all spaces together, over relaxed permutations (C²M³, arXiv 2405.17897).

Each model p has permutations P_p into one common order, and the sum of <P_p θ_p, P_q θ_q> over all pairs is maximised:
whatever comes out is consistent around every cycle of models. Frank-Wolfe: the gradient's best permutations are one
exact assignment per tree and model, with all the others as they are; a step goes towards all of them at once, as far as
the objective grows. A relaxed permutation is a weighted list of permutations, which serves every kind of space alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mergekit_lite.align.apply import Move, Order, moves, permuted
from mergekit_lite.align.cost import Tensors
from mergekit_lite.align.match import match
from mergekit_lite.align.parts import Part, pair_products
from mergekit_lite.align.solve import UnitCosts
from mergekit_lite.align.trees import Tree
from mergekit_lite.align.turns import merge_many, star
from mergekit_lite.lazy import Tensor

STEPS = 30  # of Frank-Wolfe at most
GAIN = 1e-4  # the part of the objective that a step must add


@dataclass(frozen=True)
class _Atom:
    """Permutations of all spaces, their weight in the mixture, and what those of each tree do to tensors."""

    weight: float
    permutations: dict[str, Order]
    moves: tuple[dict[str, Move], ...]

    @classmethod
    def of(cls, part: Part, permutations: dict[str, Order]) -> _Atom:
        shapes = part.settings.shapes
        return cls(1.0, permutations, tuple(moves(tree.spaces, permutations, shapes) for tree in part.trees))


def cycle(part: Part) -> tuple[list[dict[str, Order]], int, bool]:
    """The joint solution: started from every model matched to the first, rounded to permutations at the end, and then
    matched to the mean of the others in turn, which can only add. Whatever agrees more, this or the start so treated,
    is taken. Needs memory for no more than one tensor of all models, but reads them at each step of the search."""
    begun, _, _ = star(part)
    if len(part.models) == 1:
        return begun, 0, True
    mixtures = [[_Atom.of(part, p)] for p in begun]
    for _ in range(STEPS):
        part.settings.check()
        towards = [_Atom.of(part, _vertex(part, mixtures, model)) for model in range(len(part.models))]
        step, gain, value = _line(part, mixtures, towards)
        if gain <= GAIN * max(1.0, abs(value)):
            break
        mixtures = [_stepped(mixture, p, step) for mixture, p in zip(mixtures, towards, strict=True)]
    rounded = [_rounded(part, mixture) for mixture in mixtures]
    answers = [merge_many(part, start) for start in (begun, rounded)]
    return max(answers, key=lambda answer: part.agreement(answer[0]))


def _stepped(mixture: Sequence[_Atom], towards: _Atom, step: float) -> list[_Atom]:
    kept = [replace(atom, weight=(1.0 - step) * atom.weight) for atom in mixture]
    return [atom for atom in (*kept, replace(towards, weight=step)) if atom.weight > 1e-6]


def _mixed(part: Part, model: int, mixture: Sequence[_Atom], without: Tree | None = None) -> Tensors:
    """A model's tensors under a mixture, every tree but one mixed by itself: along each of its axes a tensor is the
    weighted mean of what the permutations make of it."""
    chosen = [k for k, tree in enumerate(part.trees) if tree is not without]
    found = [[(atom.weight, atom.moves[k]) for atom in mixture] for k in chosen]
    touching = [set().union(*(each for _, each in atoms)) for atoms in found]

    def of(name: str, first: int = 0) -> Tensor:
        for k in range(first, len(chosen)):
            if name in touching[k]:
                inner: dict[str, Tensor] = {}
                total: Tensor | None = None
                for weight, each in found[k]:
                    move = each.get(name, Move(name))
                    if move.source not in inner:
                        inner[move.source] = of(move.source, k + 1)
                    taken = weight * permuted(move, inner[move.source])
                    total = taken if total is None else total + taken
                assert total is not None
                return total
        return part.models[model](name)

    return of


def _vertex(part: Part, mixtures: Sequence[Sequence[_Atom]], model: int) -> dict[str, Order]:
    """The permutations of a model that agree best with all the others, each tree with the rest as it is."""
    others = [_mixed(part, i, mixture) for i, mixture in enumerate(mixtures) if i != model]
    s = part.settings

    def like(name: str) -> Tensor:
        total = others[0](name)
        for other in others[1:]:
            total = total + other(name)
        return total

    found: dict[str, Order] = {}
    for tree in part.trees:
        own = [space for space in part.spaces if space in (tree.root, *tree.children)]
        kinds = {space.kind for space in tree.spaces}
        of = _mixed(part, model, mixtures[model], tree)
        found |= match(
            own, like, of, shapes=s.shapes, kinds=kinds, max_sweeps=1, threads=s.threads, check=s.check, assign=s.assign
        ).permutations
    return found


def _line(part: Part, mixtures: Sequence[Sequence[_Atom]], towards: Sequence[_Atom]) -> tuple[float, float, float]:
    """The best step from 0 to 1, what it adds to the objective and the objective before. The objective is a polynomial
    in the step, of twice as many degrees as a tensor has permuted axes, and known from its values at as many points as
    it has coefficients."""
    axes = max(sum(len(tree.axes.get(name, ())) for tree in part.trees) for name in part.names)
    points = np.linspace(0.0, 1.0, 2 * axes + 1)
    values = []
    for point in points:
        stepped = [_stepped(m, p, float(point)) for m, p in zip(mixtures, towards, strict=True)]
        models = [_mixed(part, i, mixture) for i, mixture in enumerate(stepped)]
        values.append(sum(pair_products([of(name) for of in models]) for name in part.names))
    fitted = np.polynomial.Polynomial.fit(points, values, len(points) - 1)
    roots = np.asarray(fitted.deriv().roots(), dtype=np.complex128)
    turning = [float(root.real) for root in roots if abs(root.imag) < 1e-9 and 0 < root.real < 1]
    best = max([0.0, 1.0, *turning], key=lambda step: float(fitted(step)))
    return best, float(fitted(best)) - values[0], values[0]


def _rounded(part: Part, mixture: Sequence[_Atom]) -> dict[str, Order]:
    """The permutations nearest to a mixture: of units, and inside matched groups of what lies in them."""
    found: dict[str, Order] = {}
    for tree in part.trees:
        root = tree.root
        matched = np.arange(root.groups)
        if not tree.fixed:
            costs = UnitCosts.none(root)
            for atom in mixture:
                costs.units[np.arange(root.size), atom.permutations[root.name]] -= atom.weight
            found[root.name] = costs.best(part.settings.assign)
            matched = found[root.name][:: root.group] // root.group
        for child in tree.children:
            cost = np.zeros((child.size, child.size))
            for atom in mixture:
                if tree.fixed or _filler(atom, tree, child.slot) == matched[child.slot]:
                    cost[np.arange(child.size), atom.permutations[child.name]] -= atom.weight
            found[child.name] = part.settings.assign(cost)
    return found


def _filler(atom: _Atom, tree: Tree, slot: int) -> int:
    """The group that an atom puts into a slot."""
    return int(atom.permutations[tree.root.name][slot * tree.root.group] // tree.root.group)
