"""The parts of KnOTS for statistics over all tensors: into the directions that the models share, and back.

Blocks in shared directions have as many rows as there are directions; they are kept in the shape of the delta, the
other rows being 0. Entries that are 0 do not count as entries, so that these rows change no statistic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.derived import AnyMeasure, Staged, Sums
from mergekit_lite.methods.random import derive_key
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.select import Bound, OrderStatistics, keep_count
from mergekit_lite.methods.sparsify import largest
from mergekit_lite.methods.spec import REQUIRED, Block, Param, Params
from mergekit_lite.methods.spectral import SVD, left_basis, mean, wide

PAPER = "KnOTS, ICLR 2025, arXiv 2410.19735"
Shape = tuple[int, ...]

RANK = Param("rank", "integer", None, "rank of each model's delta, where it is known", 1)
MIN_SINGULAR = Param(
    "min_singular", "number", 1e-5, "singular values up to this part of the largest count as zero", 1e-7, 1, False, True
)


def directions(deltas: Sequence[Tensor], rank: int | None, svd: str, key: int, min_singular: float) -> Tensor:
    """Orthonormal directions (m, r) of the columns of all deltas (m, n_t) together."""
    count = deltas[0].shape[0] if rank is None else rank * len(deltas)
    return left_basis(deltas, count, svd, key, min_singular)[0]


def _rows(shape: Shape) -> int:
    return shape[0] if len(shape) > 1 else 1


def _basis(shapes: Sequence[Shape]) -> Shape:
    rows = _rows(shapes[0])
    return rows, min(rows, sum(math.prod(shape) // max(1, rows) for shape in shapes))


@method(
    RANK,
    MIN_SINGULAR,
    SVD,
    takes="delta",
    reach="matrix",
    shape=_basis,
    public=False,
    paper=PAPER,
)
def shared_basis(xs: Sequence[Tensor], rank: int | None, min_singular: float, svd: str) -> Tensor:
    """The directions of the deltas' columns, as a matrix (m, k) with k the smaller of m and the number of all columns:
    orthonormal columns, then columns of zeros.

    Of deltas that are no matrices it is 0; it is NaN where one of them holds a NaN or infinity.
    """
    side = _rows(tuple(xs[0].shape))
    basis = torch.zeros(_basis([tuple(x.shape) for x in xs]), dtype=torch.float64, device=xs[0].device)
    if not all(bool(x.isfinite().all()) for x in xs):
        basis.fill_(torch.nan)
    elif _is_matrix(xs[0], side) and any(bool(x.any()) for x in xs):
        deltas = [x.reshape(side, -1) for x in xs]
        found = directions(deltas, rank, svd, derive_key(0, "left"), min_singular)
        basis[:, : found.shape[1]] = found
    return basis.to(xs[0].dtype)


@method(inputs=(2, 2), takes="delta", reach="matrix", public=False, paper=PAPER)
def to_shared(xs: Sequence[Tensor]) -> Tensor:
    """A delta in the shared directions, U^T D, with U the second input. 0 where D is no matrix."""
    delta, basis = xs
    block = torch.zeros_like(delta)
    if _is_matrix(delta, len(basis)):
        block.view(len(basis), -1)[: basis.shape[1]] = wide(basis).T @ wide(delta.reshape(len(basis), -1))
    return block


@method(inputs=(3, None), takes="delta", reach="matrix", public=False, paper=PAPER)
def from_shared(xs: Sequence[Tensor]) -> Tensor:
    """The way back, U B, of the first input B with U, the second. Where B is no matrix, the mean of all others."""
    block, basis, *deltas = xs
    if not _is_matrix(block, len(basis)):
        return mean(deltas).to(block)
    rows = block.reshape(len(basis), -1)[: basis.shape[1]]
    return (wide(basis) @ wide(rows)).reshape(block.shape).to(block.dtype)


def _is_matrix(x: Tensor, rows: int) -> bool:
    return rows > 1 and x.numel() > rows


def _measure(params: Params, inputs: int, numels: Sequence[int]) -> Staged:
    """How many entries are not 0; then the magnitude of the last one kept."""

    def after(stages: Sequence[AnyMeasure]) -> AnyMeasure | None:
        if len(stages) == 2:
            return None
        (count,) = stages[0].result(0)
        return OrderStatistics([max(1, keep_count(int(count), params["density"]))], numels)

    return Staged(Sums(1, lambda _, xs, start: [xs[0] != 0]), after)


@method(
    Param("density", "number", REQUIRED, "share of the entries that is kept", 0, 1, open_low=True),
    inputs=(1, 1),
    takes="delta",
    reach="pooled",
    measure=_measure,
    rounds=3,
    positioned=True,
    public=False,
    paper=PAPER,
)
def trim_shared(xs: Sequence[Tensor], density: float, block: Block, stat: tuple[Any, ...] | None = None) -> Tensor:
    """Keep the largest entries: a share `density` of the entries of all tensors that are not 0."""
    assert stat is not None
    bounds: tuple[Bound, ...] = stat[1]
    return largest(xs[0], bounds[0], block.start)
