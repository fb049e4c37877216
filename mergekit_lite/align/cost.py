"""Inner products between the units of two networks, tensor by tensor, and what is known of every tensor pair so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from mergekit_lite.align.apply import Permutations, moves, permuted
from mergekit_lite.align.assign import Costs
from mergekit_lite.align.trees import Shapes, Tree
from mergekit_lite.errors import InputError, Problem
from mergekit_lite.family.spaces import Space, Use
from mergekit_lite.lazy import Tensor, torch

Tensors = Callable[[str], Tensor]
ROWS = 1024  # rows of a cost matrix computed at once: the same on any number of threads
LARGEST = (1e18, 1e150)  # norm of a tensor whose products can be summed in float32 and in float64
PIECE = 1 << 22  # elements whose products are kept at once when a sum over a tensor is taken


def rows(tensor: Tensor, use: Use, count: int) -> Tensor:
    """What belongs to each of the `count` units (or groups) along a use: (count, numbers per unit)."""
    along = tensor.narrow(use.axis, use.start, count * use.block).movedim(use.axis, 0)
    return along.reshape(count, -1)


def add_products(cost: Costs, a: Tensor, b: Tensor, weight: float, threads: Executor | None = None) -> None:
    """Subtracts weight * a b^T from `cost`, which an assignment minimises: a (n, k), b (m, k), cost (n, m). Blocks of
    rows go to `threads` and touch nothing of each other, so the result is the same on any number of them."""
    out = torch.from_numpy(cost)

    def block(start: int) -> None:
        products = a[start : start + ROWS] @ b.T
        out[start : start + ROWS].sub_(products.to(out.device), alpha=weight)

    starts = range(0, len(cost), ROWS)
    if threads is None or len(starts) == 1:
        for start in starts:
            block(start)
    else:
        for done in [threads.submit(block, start) for start in starts]:
            done.result()


def products_of(a: Tensor, b: Tensor) -> float:
    """The inner product of two tensors of one shape, summed in float64."""
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    pieces = range(0, flat_a.numel(), PIECE)
    return math.fsum(float((flat_a[i : i + PIECE] * flat_b[i : i + PIECE]).sum(dtype=torch.float64)) for i in pieces)


@dataclass(frozen=True, slots=True)
class Pair:
    """One tensor of both networks as a tree sees it: `b` is permuted by every space outside the tree. `weight` is what
    the cost multiplies their products by; `weight_of` gives it for a tensor of one and a differently named one of the
    other network."""

    name: str
    source: str
    a: Tensor
    b: Tensor
    weight: float


class Ledger:
    """Reads tensor pairs, and keeps of each what the diagnostics need: norms, and the products before any move."""

    def __init__(self, spaces: Sequence[Space], shapes: Shapes, like: Tensors, of: Tensors, *, cosine: bool):
        self._shapes, self._like, self._of, self._cosine = shapes, like, of, cosine
        self._norms: dict[tuple[int, str], float] = {}
        self.before: dict[str, float] = {}
        self.counted: set[str] = set()
        self.double = False  # whether any tensor is float64
        self._near = _Near(spaces)

    def like(self, name: str) -> Tensor:
        return self._read(0, name)

    def of(self, name: str) -> Tensor:
        return self._read(1, name)

    def _read(self, which: int, name: str) -> Tensor:
        tensor = (self._like, self._of)[which](name)
        self.double = self.double or tensor.dtype == torch.float64
        if (which, name) not in self._norms:
            norm = math.sqrt(products_of(tensor, tensor))
            if not norm < LARGEST[tensor.dtype == torch.float64]:
                model = ("fixed", "permuted")[which]
                message = f"`{name}` of the {model} model holds NaN, infinite or extremely large values"
                raise InputError(Problem(message, hint="Units cannot be matched by such numbers."))
            self._norms[which, name] = norm
        return tensor

    def weight(self, name: str, source: str) -> float:
        """What products of tensor `name` of the fixed and `source` of the permuted network are multiplied by, once both
        were read."""
        if not self._cosine:
            return 1.0
        norm = self._norms[0, name] * self._norms[1, source]
        return 1.0 / norm if norm else 0.0

    def pairs(self, tree: Tree, permutations: Permutations, names: Sequence[str]) -> Iterator[Pair]:
        """The named tensors one after the other, B permuted by everything but the tree. Only what the caller keeps
        stays in memory."""
        outside = self.outside(tree)
        found = moves(outside, permutations, self._shapes)
        for name in names:
            move = found.get(name)
            source = name if move is None else move.source
            a, b = self.like(name), self.of(source)
            self.note(name, a, b if source == name else None)
            yield Pair(name, source, a, b if move is None else permuted(move, b), self.weight(name, source))
            del a, b

    def note(self, name: str, a: Tensor, b: Tensor | None) -> None:
        """Keeps the products of a tensor before any move, given as it is stored; `b` is read where it is None."""
        if name not in self.before:
            self.before[name] = 0.0  # what it is for tensors of different shapes
            b = self.of(name) if b is None else b
            if a.shape == b.shape:
                self.before[name] = self.weight(name, name) * products_of(a, b)

    def outside(self, tree: Tree) -> list[Space]:
        """The spaces that may change a tensor of the tree, without its own."""
        own = {space.name for space in (tree.root, *tree.children)}
        return [space for space in self._near.spaces(tree.axes) if space.name not in own]

    def current(self, names: Sequence[str], permutations: Permutations) -> float:
        """The weighted products of these tensors under the permutations. Reads them."""
        total = 0.0
        for name in names:
            found = moves(self._near.spaces([name]), permutations, self._shapes).get(name)
            source = name if found is None else found.source
            a, b = self.like(name), self.of(source)
            self.note(name, a, b if source == name else None)
            total += self.weight(name, source) * products_of(a, b if found is None else permuted(found, b))
        return total

    def distance(self, objective: float, names: Sequence[str]) -> float:
        """||A - B|| over these tensors, given the weighted sum of their products; with cosine costs that of the tensors
        scaled to length one."""
        if self._cosine:
            squares = 2.0 * sum(self.weight(name, name) > 0 for name in names)
        else:
            squares = math.fsum(self._norms[which, name] ** 2 for name in names for which in (0, 1))
        return math.sqrt(max(0.0, squares - 2.0 * objective))


class _Near:
    """Finds the spaces that have to do with a tensor, or with one that may take its name."""

    def __init__(self, spaces: Sequence[Space]):
        self._spaces = spaces
        self._users: dict[str, set[int]] = {}
        self._group: dict[str, set[str]] = {}
        for i, space in enumerate(spaces):
            for use in space.uses:
                self._users.setdefault(use.tensor, set()).add(i)
            for names in space.renames:
                for name in names:
                    self._users.setdefault(name, set()).add(i)
                    self._group.setdefault(name, set()).update(names)

    def spaces(self, names: Sequence[str] | Mapping[str, object]) -> list[Space]:
        found: set[int] = set()
        for name in names:
            for same in self._group.get(name, (name,)):
                found |= self._users.get(same, set())
        return [self._spaces[i] for i in sorted(found)]


def empty(n: int) -> Costs:
    return np.zeros((n, n))
