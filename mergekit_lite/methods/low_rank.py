"""A delta as the two factors of an adapter. No recipe names these methods: the plan uses them for `as: lora`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from mergekit_lite.lazy import Tensor, torch
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
    kept = len(found.s)
    b = matrix.new_zeros(matrix.shape[0], rank)
    a = matrix.new_zeros(rank, matrix.shape[1])
    b[:, :kept] = found.u * found.s.sqrt()
    a[:kept] = (found.v * found.s.sqrt()).T
    stored = getattr(torch, dtype)
    a, b = a.to(delta.dtype).to(stored), b.to(delta.dtype).to(stored)
    left = torch.linalg.vector_norm(matrix - wide(b) @ wide(a))
    whole = torch.linalg.vector_norm(matrix)
    parts = [a.reshape(-1), b.reshape(-1), torch.stack([whole, left])]
    return torch.cat([part.to(delta.dtype) for part in parts])


def needed(xs: Sequence[Tensor], rank: int, energy: float, svd: str, transposed: bool, block: Block) -> Tensor:
    """The least rank, from 1 to `rank`, whose singular triplets hold the share `energy` of |D|^2; as a vector of one
    number. `rank` where none does, or where D holds a NaN or infinity."""
    delta = xs[0]
    if not bool(delta.isfinite().all()):
        return delta.new_full((1,), rank)
    matrix, found = _found(delta, rank, svd, transposed, block.key)
    # What is left, summed from the smallest up: 1 - share would lose the digits that a share near 1 is about.
    squares = found.s * found.s
    whole = float((matrix * matrix).sum())
    beyond = 0.0 if len(squares) == full_rank(tuple(delta.shape)) else max(0.0, whole - float(squares.sum()))
    left = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)]) + beyond  # by i: with i triplets
    enough = (left <= (1 - energy) * whole).nonzero()
    count = int(enough[0]) if len(enough) else rank
    return delta.new_full((1,), max(1, min(count, rank)))


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
