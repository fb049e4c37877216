"""What an alignment has done to two networks: distances, singular directions, and the barrier on a path."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from mergekit_lite.align.apply import Move, Permutations, moves, permuted
from mergekit_lite.align.cost import Tensors
from mergekit_lite.align.trees import Shapes
from mergekit_lite.errors import InputError
from mergekit_lite.family.spaces import Space
from mergekit_lite.lazy import Tensor, torch

LEADING = 0.3  # singular values of at least this share of the largest belong to the leading directions


@dataclass(frozen=True, slots=True)
class Likeness:
    """How alike two tensors are.

    `rho` is <A, B> over the sum of products of their singular values, which no order of rows and columns changes: 1
    where all directions agree, 0 where they have nothing in common. `leading` is the same of the `k` directions with
    the largest singular values, all weighed alike: of either those with at least 0.3 of its largest, the smaller number
    of the two. Both are None for vectors, for zeros and where they were not asked for (Ito et al., ICLR 2025, arXiv
    2402.04051).
    """

    distance: float
    rho: float | None = None
    leading: float | None = None
    k: int = 0


@dataclass(frozen=True, slots=True)
class Change:
    """One tensor before and after its permutation."""

    tensor: str
    before: Likeness
    after: Likeness


def likeness(a: Tensor, b: Tensor, *, directions: bool = True) -> Likeness:
    """Two tensors of one shape. Those of more than two axes are taken as matrices of their first axis by the rest."""
    return _likeness(_Parts.of(_real(a), directions), _Parts.of(_real(b), directions))


def changes(
    spaces: Sequence[Space],
    permutations: Permutations,
    like: Tensors,
    of: Tensors,
    *,
    shapes: Shapes,
    names: Collection[str] | None = None,
    directions: bool = True,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Change]:
    """Every tensor that the spaces use (or `names`), one after the other: `of` against `like` as it was, and permuted.

    In memory is one pair of tensors, in float64 where they are, else in float32; with `directions` their singular
    vectors too, which take a decomposition of each: minutes for the largest matrices of a language model. `shapes`
    holds those of all tensors that the spaces name. Raises InputError for tensors with NaN or infinite values.
    """
    moved = moves(spaces, permutations, shapes)
    for name in names if names is not None else used(spaces):
        check()
        move = moved.get(name)
        own, other = (_Parts.of(_finite(name, tensors), directions) for tensors in (like, of))
        before = after = _likeness(own, other)
        if move is not None:
            source = other if move.source == name else _Parts.of(_finite(move.source, of), directions)
            after = _likeness(own, source.permuted(move))
        yield Change(name, before, after)


def used(spaces: Sequence[Space]) -> list[str]:
    """The tensors that the spaces name, running statistics left out, each once."""
    found: dict[str, None] = {}
    for space in spaces:
        found.update(dict.fromkeys(use.tensor for use in space.uses if use.weighed))
        found.update(dict.fromkeys(name for names in space.renames for name in names))
    return list(found)


def barrier(losses: Sequence[float], alphas: Sequence[float] | None = None) -> float:
    """The most that the loss on a path lies above the straight line between its ends: max over alpha of
    L(alpha) - ((1 - alpha) L(0) + alpha L(1)). `alphas` rise from 0 to 1; without them the losses stand at equal
    distances. Since the ends count, it is never below 0. NaN if a loss is."""
    if alphas is None:
        alphas = [i / (len(losses) - 1) for i in range(len(losses))] if len(losses) > 1 else []
    if len(losses) != len(alphas) or len(losses) < 2 or alphas[0] != 0 or alphas[-1] != 1:
        raise ValueError("a path has losses at both ends and as many alphas, from 0 to 1")
    if any(math.isnan(loss) for loss in losses):
        return math.nan
    line = [(1 - alpha) * losses[0] + alpha * losses[-1] for alpha in alphas]
    return max(0.0, *(loss - straight for loss, straight in zip(losses, line, strict=True)))


def summary(found: Sequence[Change]) -> dict[str, float]:
    """Over all tensors: the distance before and after, and each singular figure, the mean of the tensors that have
    it."""
    figures: dict[str, float] = {}
    for time in ("before", "after"):
        each: list[Likeness] = [getattr(change, time) for change in found]
        figures[f"distance_{time}"] = math.sqrt(math.fsum(one.distance**2 for one in each))
        for name in ("rho", "leading"):
            values = [value for one in each if (value := getattr(one, name)) is not None]
            if values:
                figures[f"{name}_{time}"] = math.fsum(values) / len(values)
    return figures


@dataclass(frozen=True)
class _Parts:
    """A tensor and, unless it is a vector or they were not asked for, its singular values and vectors: u (m, r), s (r),
    v (r, n), the tensor taken as m by n."""

    tensor: Tensor
    singular: tuple[Tensor, Tensor, Tensor] | None

    @classmethod
    def of(cls, tensor: Tensor, directions: bool) -> _Parts:
        if not directions or tensor.dim() < 2 or not tensor.numel():
            return cls(tensor, None)
        u, s, v = torch.linalg.svd(tensor.reshape(len(tensor), -1), full_matrices=False)
        return cls(tensor, (u, s, v))

    def permuted(self, move: Move) -> _Parts:
        """A permutation of rows or columns is one of the vectors' entries."""
        tensor = permuted(move, self.tensor)
        if self.singular is None:
            return _Parts(tensor, None)
        u, s, v = self.singular
        columns = Move(move.source, {axis: order for axis, order in move.orders.items() if axis > 0})
        turned = permuted(columns, v.reshape(len(v), *self.tensor.shape[1:])).reshape(v.shape)
        return _Parts(tensor, (u[move.orders[0]] if 0 in move.orders else u, s, turned))


def _likeness(a: _Parts, b: _Parts) -> Likeness:
    distance = float((a.tensor - b.tensor).double().norm())
    if a.singular is None or b.singular is None:
        return Likeness(distance)
    (u, s, v), (other_u, other_s, other_v) = a.singular, b.singular
    bound = float(s.double() @ other_s.double())
    if bound == 0:
        return Likeness(distance)
    inner = float((a.tensor * b.tensor).sum(dtype=torch.float64))
    k = min(int((values >= LEADING * values[0]).sum()) for values in (s, other_s))
    leading = float(((u[:, :k].T @ other_u[:, :k]) * (v[:k] @ other_v[:k].T)).sum(dtype=torch.float64)) / k
    return Likeness(distance, inner / bound, leading, k)


def _real(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _finite(name: str, tensors: Tensors) -> Tensor:
    tensor = _real(tensors(name))
    if not torch.isfinite(tensor).all():
        hint = "`merge inspect --stats` counts them; they have no singular values"
        raise InputError(f"`{name}` holds NaN or infinite values", hint=hint)
    return tensor
