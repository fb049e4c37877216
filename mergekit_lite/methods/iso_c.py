"""One singular value for all directions of the summed deltas."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lite.lazy import Tensor
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.select import keep_count
from mergekit_lite.methods.spec import Block, Param
from mergekit_lite.methods.spectral import SVD, mean, on_matrices, triplets


def flatten_spectrum(deltas: Sequence[Tensor], rank_share: float, svd: str, key: int) -> Tensor:
    """The Iso-C merge of matrices of one shape, in double precision."""
    total = mean(deltas) * len(deltas)
    if not bool(total.any()):
        return total
    count = keep_count(min(total.shape), rank_share)
    found = triplets(total, count, svd, key)
    return found.s.sum() / count * (found.u @ found.v.T)


@method(
    Param("rank_share", "number", 1.0, "share of the singular triplets that is kept", 0, 1, open_low=True),
    Param("lambda", "number", 1.0, "factor of the merged delta"),
    SVD,
    takes="delta",
    gives="delta",
    base="required",
    reach="matrix",
    positioned=True,
    paper="Iso-C, ICML 2025, arXiv 2502.04959",
)
def iso_c(xs: Sequence[Tensor], rank_share: float, lambda_: float, svd: str, block: Block) -> Tensor:
    """Add up the deltas and give every direction of the sum the same strength.

    With sum_t D_t = U diag(s) V^T, m by n, and r = min(m, n):

        out = lambda (s_1 + ... + s_r) / r U V^T.

    Takes one or more deltas of one shape and gives that shape, in the dtype of the arithmetic; the decomposition is in
    double precision. Tensors of three or more axes count as matrices (first axis, the rest); vectors, scalars and
    matrices with a side of 1 are averaged, times lambda. The mean is that of the published code, but directions whose
    singular value is at most a millionth of the largest stay out of U V^T: which ones a decomposition finds there is
    chance. `rank_share` below 1 keeps the largest triplets alone, r of them; `svd: randomised` is of use only then.

    Source: Marczak et al., No Task Left Behind, ICML 2025, arXiv 2502.04959.
    """
    return on_matrices(
        xs,
        lambda deltas: lambda_ * flatten_spectrum(deltas, rank_share, svd, block.key),
        lambda deltas: lambda_ * mean(deltas),
    )
