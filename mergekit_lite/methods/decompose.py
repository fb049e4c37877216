"""A matrix as one of low rank and some of its rows kept whole: what MC-SMoE makes of merged experts."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.random import derive_key
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.select import keep_count
from mergekit_lite.methods.spec import Block, Method, Param, Params
from mergekit_lite.methods.spectral import SVD, triplets, wide

PAPER = "MC-SMoE, ICLR 2024, arXiv 2310.01334"
FIGURES = 4  # behind the numbers: |W|, |W - out|, the stable ranks of W and of the result
ROW_NUMBER = 4  # bytes that tell which row is kept
_RANK = Param("rank", "integer", 32, "columns of U and rows of V", 1)
_SHARE = Param("share", "number", 0.1, "share of the rows that are kept whole; 1 leaves the tensor as it is", 0, 1)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a tensor of `rows` by `columns` becomes: U (rows x rank), V (rank x columns) and `kept` rows."""

    rows: int
    columns: int
    rank: int
    kept: int

    @property
    def numbers(self) -> int:
        """How many numbers the parts have together."""
        return self.rank * (self.rows + self.columns) + self.kept * self.columns

    def nbytes(self, number: int) -> int:
        """Bytes of the parts where a number takes `number`: also those that tell which rows are kept."""
        return self.numbers * number + self.kept * ROW_NUMBER


def parts_of(shape: Sequence[int], rank: int, share: float) -> Parts | None:
    """The parts of a tensor of this shape, its axes behind the first taken as one; None where they would have no fewer
    numbers than the tensor, which then stays as it is."""
    rows, columns = (shape[0] if shape else 1), math.prod(shape[1:])
    if len(shape) < 2 or min(rows, columns) < 2:
        return None
    parts = Parts(rows, columns, rank, keep_count(rows, share))
    return parts if parts.numbers < rows * columns else None


def split(matrix: Tensor, parts: Parts, svd: str, key: int) -> tuple[Tensor, Tensor]:
    """U V + S in double precision (m, n), and the numbers of the rows of S, ascending; of a finite `matrix`."""
    matrix = wide(matrix)
    made = triplets(matrix, parts.rank, svd, key, floor=0.0).matrix()
    scores = (matrix - made).abs().mean(dim=1)
    kept = scores.argsort(descending=True, stable=True)[: parts.kept].sort().values
    # A row of U V + S that S has is the row itself: as a sum it would be rounded.
    made[kept] = matrix[kept]
    return made, kept


def stable_rank(matrix: Tensor, svd: str, key: int) -> float:
    """|W|_F^2 / |W|_2^2 of a matrix (m, n); 0 where it is all zeros."""
    matrix = wide(matrix)
    largest = triplets(matrix, 1, svd, key, floor=0.0).s
    return float((matrix * matrix).sum() / largest[0] ** 2) if len(largest) else 0.0


def _pick(params: Params, inputs: int) -> int | None:
    return 0 if params["share"] >= 1 else None


@method(_RANK, _SHARE, SVD, inputs=(1, 1), reach="matrix", positioned=True, pick=_pick, paper=PAPER)
def decompose(xs: Sequence[Tensor], rank: int, share: float, svd: str, block: Block) -> Tensor:
    """Reduce a matrix to low rank and some rows that are kept whole: MC-SMoE's compression of merged experts.

        out = U V + S,

    with U V of all matrices of this rank the nearest to W (Eckart and Young, 1936), and S the rows of W - U V with the
    largest mean |.|, the first of equals, as many as `share` says. Where a row is in S, out has the row of W.

    Takes one tensor and gives its shape, in the dtype of the arithmetic; decompositions are in double precision.
    Tensors of three or more axes count as matrices (first axis, the rest). What would take no fewer numbers in parts
    is given back as it is, vectors and scalars always; NaN throughout where there is a NaN or infinity.

    The result has the size that it had, so that every program loads it. Where a save writes the step itself, the run
    tells, and the lock keeps, the error |W - out| / |W| of every tensor, the bytes that U, V and S would take in its
    dtype, and the stable rank |W|_F^2 / |W|_2^2 before and after. The published method goes on to train U, V and S.

    Source: Li et al., Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy, ICLR 2024,
    arXiv 2310.01334 (rank 32 for 768 by 3,072, a share of 10 percent).
    """
    x = xs[0]
    parts = parts_of(tuple(x.shape), rank, share)
    if parts is None:
        return x.clone()
    if not bool(x.isfinite().all()):
        return torch.full_like(x, torch.nan)
    made, _ = split(x.reshape(parts.rows, parts.columns), parts, svd, block.key)
    return made.reshape(x.shape).to(x.dtype)


def decompose_and_tell(xs: Sequence[Tensor], rank: int, share: float, svd: str, block: Block) -> Tensor:
    """`decompose` of a tensor that has parts, as a vector, and behind it the `FIGURES`."""
    x = xs[0]
    made = decompose.fn(xs, rank=rank, share=share, svd=svd, block=block)
    if not bool(x.isfinite().all()):
        return torch.cat([made.reshape(-1), made.new_full((FIGURES,), torch.nan)])
    before, after = (wide(t).flatten(1) for t in (x, made))
    key = derive_key(block.key, "stable rank")
    norms = [float(torch.linalg.vector_norm(before)), float(torch.linalg.vector_norm(before - after))]
    ranks = [stable_rank(t, svd, key) for t in (before, after)]
    return torch.cat([made.reshape(-1), made.new_tensor([*norms, *ranks])])


@functools.cache
def telling() -> Method:
    """`decompose_and_tell` as a method of the plan, which stands for `decompose` where a save writes that."""
    return method(
        _RANK,
        _SHARE,
        SVD,
        inputs=(1, 1),
        reach="matrix",
        shape=lambda shapes: (math.prod(shapes[0]) + FIGURES,),
        positioned=True,
        name="decompose",
        figures=FIGURES,
        public=False,
        paper=PAPER,
    )(decompose_and_tell)
