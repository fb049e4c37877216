"""A delta as the two factors of an adapter. No recipe names these methods: the plan uses them for `as: lora`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.factored import (
    MODEL,
    MODELS,
    SCALE,
    TURNED,
    Pair,
    all_finite,
    norm,
    pairs_of,
    singular,
    sum_of,
)
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import REQUIRED, Block, Method, Param
from mergekit_lite.methods.spectral import SVD, Triplets, triplets, wide

FIGURES = 2  # behind the factors: the norm of the delta, and of what they leave of it
_TRANSPOSED = Param("transposed", "flag", False, "the weight is stored as in x out")
Shape = tuple[int, ...]


def factor_shapes(delta: Shape, rank: int, transposed: bool) -> tuple[Shape, Shape]:
    """The shapes of the factors of a delta as peft stores them: A (r x in, with a kernel's axes behind) and B (out x r,
    with axes of length 1). `rank` is that of the delta at most."""
    if transposed:
        return (rank, delta[0]), (delta[1], rank)
    return (rank, *delta[1:]), (delta[0], rank, *(1 for _ in delta[2:]))


def full_rank(delta: Shape) -> int:
    """The largest rank that a delta of this shape can have, its axes behind the first taken as one."""
    return min(delta[0], math.prod(delta[1:]))


def _found(delta: Tensor, rank: int, svd: str, transposed: bool, key: int) -> tuple[Tensor, Triplets]:
    matrix = wide(delta.T if transposed else delta.flatten(1))
    return matrix, triplets(matrix, rank, svd, key, floor=0.0)


def low_rank(xs: Sequence[Tensor], rank: int, svd: str, transposed: bool, dtype: str, block: Block) -> Tensor:
    """The factors A and B of a delta D, one behind the other, and behind them |D| and |D - B A|.

    B = U sqrt(S), A = sqrt(S) V^T from the `rank` largest singular triplets of D, whose axes behind the first are taken
    as one, or of D^T with `transposed`. Of all matrices of this rank B A is the nearest to D (Eckart and Young, 1936).
    The factors are rounded to `dtype` before what they leave is measured. In double precision; what D has not of the
    rank is 0. All are NaN where D holds a NaN or infinity.
    """
    delta = xs[0]
    if not bool(delta.isfinite().all()):
        (size,) = _shape(rank)([tuple(delta.shape)])
        return torch.full((size,), torch.nan, dtype=delta.dtype, device=delta.device)
    matrix, found = _found(delta, rank, svd, transposed, block.key)
    a, b = _halves(found, rank, delta.dtype, dtype)
    left = torch.linalg.vector_norm(matrix - wide(b) @ wide(a))
    return _told(a, b, torch.linalg.vector_norm(matrix), left, delta.dtype)


def _halves(found: Triplets, rank: int, compute: torch.dtype, dtype: str) -> tuple[Tensor, Tensor]:
    """A and B as they are stored, with zeros for what there is not of the rank."""
    kept = min(rank, len(found.s))
    root = found.s[:kept].sqrt()
    b = found.u.new_zeros(len(found.u), rank)
    a = found.v.new_zeros(rank, len(found.v))
    b[:, :kept] = found.u[:, :kept] * root
    a[:kept] = (found.v[:, :kept] * root).T
    stored = getattr(torch, dtype)
    return a.to(compute).to(stored), b.to(compute).to(stored)


def _told(a: Tensor, b: Tensor, whole: Tensor, left: Tensor, compute: torch.dtype) -> Tensor:
    return torch.cat([part.to(compute) for part in (a.reshape(-1), b.reshape(-1), torch.stack([whole, left]))])


def low_rank_of_factors(
    xs: Sequence[Tensor],
    scale: Sequence[float],
    turned: Sequence[bool],
    model: Sequence[int],
    models: int,
    rank: int,
    transposed: bool,
    dtype: str,
) -> Tensor:
    """`low_rank` of a delta that is a sum of products, from its factors A_1, B_1, A_2, B_2, ... alone: of `models`
    deltas, which is 1."""
    (delta,) = pairs_of(xs, scale, turned, model, models)
    if not all_finite(xs):
        return xs[0].new_full((rank * (len(delta.left) + delta.right.shape[1]) + FIGURES,), torch.nan)
    delta = delta.turned if transposed else delta
    found = singular(delta)
    a, b = _halves(found, rank, xs[0].dtype, dtype)
    left = norm(sum_of([delta, Pair(-wide(b), wide(a))]))
    return _told(a, b, torch.linalg.vector_norm(found.s), left, xs[0].dtype)


def needed(xs: Sequence[Tensor], rank: int, energy: float, svd: str, transposed: bool, block: Block) -> Tensor:
    """The least rank, from 1 to `rank`, whose singular triplets hold the share `energy` of |D|^2; as a vector of one
    number. `rank` where none does, or where D holds a NaN or infinity."""
    delta = xs[0]
    if not bool(delta.isfinite().all()):
        return delta.new_full((1,), rank)
    matrix, found = _found(delta, rank, svd, transposed, block.key)
    squares = found.s * found.s
    whole = float((matrix * matrix).sum())
    beyond = 0.0 if len(squares) == full_rank(tuple(delta.shape)) else max(0.0, whole - float(squares.sum()))
    return delta.new_full((1,), _least(squares, beyond, whole, rank, energy))


def _least(squares: Tensor, beyond: float, whole: float, rank: int, energy: float) -> int:
    """The least rank, up to `rank`, that leaves a share of at most 1 - `energy` of `whole`; `beyond` is left whatever
    the rank is."""
    # What is left, summed from the smallest up: 1 - share would lose the digits that a share near 1 is about.
    left = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)]) + beyond  # by i: with i triplets
    enough = (left <= (1 - energy) * whole).nonzero()
    count = int(enough[0]) if len(enough) else rank
    return max(1, min(count, rank))


def needed_of_factors(
    xs: Sequence[Tensor],
    scale: Sequence[float],
    turned: Sequence[bool],
    model: Sequence[int],
    models: int,
    rank: int,
    energy: float,
) -> Tensor:
    """`needed` of a delta that is a sum of products, from its factors."""
    (delta,) = pairs_of(xs, scale, turned, model, models)
    if not all_finite(xs):
        return xs[0].new_full((1,), rank)
    squares = singular(delta).s ** 2
    return xs[0].new_full((1,), _least(squares, 0.0, float(squares.sum()), rank, energy))


def _shape(rank: int) -> Callable[[Sequence[tuple[int, ...]]], tuple[int, ...]]:
    return lambda shapes: (rank * (shapes[0][0] + math.prod(shapes[0][1:])) + FIGURES,)


@functools.cache
def factoring(rank: int) -> Method:
    """`low_rank` as a method of the plan for factors of one rank, which decides the shape of its result."""
    return method(
        Param("rank", "integer", rank, "columns of B and rows of A", 1),
        SVD,
        _TRANSPOSED,
        Param("dtype", "choice", REQUIRED, "of the stored factors", choices=()),
        takes="delta",
        inputs=(1, 1),
        reach="matrix",
        shape=_shape(rank),
        positioned=True,
        figures=FIGURES,
        public=False,
    )(low_rank)


@functools.cache
def factoring_factors(rank: int, delta: Shape) -> Method:
    """`low_rank_of_factors` as a method of the plan for factors of one rank, of deltas of one shape."""
    return method(
        SCALE,
        TURNED,
        MODEL,
        MODELS,
        Param("rank", "integer", rank, "columns of B and rows of A", 1),
        _TRANSPOSED,
        Param("dtype", "choice", REQUIRED, "of the stored factors", choices=()),
        takes="delta",
        reach="matrix",
        shape=lambda shapes: _shape(rank)([delta]),
        figures=FIGURES,
        public=False,
    )(low_rank_of_factors)


@functools.cache
def measuring_factors() -> Method:
    """`needed_of_factors` as a method of the plan."""
    return method(
        SCALE,
        TURNED,
        MODEL,
        MODELS,
        Param("rank", "integer", REQUIRED, "the largest rank to give", 1),
        Param("energy", "number", REQUIRED, "the share of the squared norm to keep", 0, 1, open_low=True),
        takes="delta",
        reach="matrix",
        shape=lambda shapes: (1,),
        public=False,
    )(needed_of_factors)


@functools.cache
def measuring() -> Method:
    """`needed` as a method of the plan."""
    return method(
        Param("rank", "integer", REQUIRED, "the largest rank to give", 1),
        Param("energy", "number", REQUIRED, "the share of the squared norm to keep", 0, 1, open_low=True),
        SVD,
        _TRANSPOSED,
        takes="delta",
        inputs=(1, 1),
        reach="matrix",
        shape=lambda shapes: (1,),
        positioned=True,
        public=False,
    )(needed)
