"""Each delta cut to its largest singular values, which are scaled up to the old nuclear norm."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.random import derive_key
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.select import keep_count
from mergekit_lite.methods.spec import Block, Param
from mergekit_lite.methods.spectral import SVD, Triplets, mean, on_matrices, triplets


def truncate(found: Triplets, eta: float) -> Triplets:
    """The fewest largest triplets whose singular values make up a share of `eta` of all, scaled up to the whole sum."""
    sums = found.s.cumsum(0)
    total = sums[-1]
    kept = min(len(sums), int(torch.searchsorted(sums, eta * total)) + 1)
    return Triplets(found.u[:, :kept], found.s[:kept] * (total / sums[kept - 1]), found.v[:, :kept])


def _merged(deltas: Sequence[Tensor], eta: float, rank_share: float, svd: str, key: int) -> Tensor:
    count = keep_count(min(deltas[0].shape), rank_share)
    total = torch.zeros(deltas[0].shape, dtype=torch.float64, device=deltas[0].device)
    for i, delta in enumerate(deltas):
        if bool(delta.any()):
            total += truncate(triplets(delta, count, svd, derive_key(key, i), 0.0), eta).matrix()
    return total / len(deltas)


@method(
    Param("eta", "number", 0.4, "share of the nuclear norm that the kept triplets make up", 0, 1, open_low=True),
    Param("rank_share", "number", 1.0, "share of the singular triplets that is looked at", 0, 1, open_low=True),
    Param("lambda", "number", 1.0, "factor of the mean"),
    SVD,
    takes="delta",
    gives="delta",
    base="required",
    reach="matrix",
    positioned=True,
    paper="STAR, NAACL 2025, arXiv 2502.10339",
)
def star(xs: Sequence[Tensor], eta: float, rank_share: float, lambda_: float, svd: str, block: Block) -> Tensor:
    """Cut each delta to its largest singular values, scale these up to the old nuclear norm, and average.

    With D_t = U diag(s) V^T and k the smallest number with s_1 + ... + s_k >= eta sum(s):

        out = lambda mean_t (sum(s) / (s_1 + ... + s_k)) sum_{i <= k} s_i u_i v_i^T.

    Takes one or more deltas of one shape and gives that shape, in the dtype of the arithmetic; decompositions are in
    double precision. Tensors of three or more axes count as matrices (first axis, the rest); vectors, scalars and
    matrices with a side of 1 are averaged, times lambda. With `rank_share` below 1 sum(s) runs over the largest
    triplets alone, as the published code does for adapters of known rank; `svd: randomised` is of use only then.

    Source: Lee et al., STAR, NAACL 2025, arXiv 2502.10339 (eta 40 percent).
    """
    return on_matrices(
        xs,
        lambda deltas: lambda_ * _merged(deltas, eta, rank_share, svd, block.key),
        lambda deltas: lambda_ * mean(deltas),
    )
