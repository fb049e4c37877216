"""Singular values of a merged delta scaled back where the models have been added up in one direction."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.select import keep_count
from mergekit_lite.methods.spec import Block, Param
from mergekit_lite.methods.spectral import SVD, on_matrices, triplets, wide


def _calibrated(deltas: Sequence[Tensor], alpha: float, rank_share: float, svd: str, key: int) -> Tensor:
    merged = wide(deltas[0])
    if not bool(merged.any()):
        return merged
    u = triplets(merged, keep_count(min(merged.shape), rank_share), svd, key).u
    response = u.T @ merged
    total = torch.zeros(u.shape[1], dtype=u.dtype, device=u.device)
    for delta in deltas[1:]:
        own = u.T @ wide(delta)
        length = own.square().sum(dim=1)
        # A model that does nothing in a direction says nothing about it: 0, which `alpha` lifts.
        total += ((response * own).sum(dim=1) / length.where(length > 0, 1.0)).clamp(min=alpha)
    gain = (len(deltas) - 1) / total
    return merged + u @ ((gain - 1).unsqueeze(1) * response)


@method(
    Param("alpha", "number", 1.0, "smallest coefficient of a model in a direction", 0, open_low=True),
    Param("rank_share", "number", 1.0, "share of the directions that is calibrated", 0, 1, open_low=True),
    Param("lambda", "number", 1.0, "factor of the calibrated delta"),
    SVD,
    takes="delta",
    gives="delta",
    inputs=(2, None),
    base="required",
    reach="matrix",
    positioned=True,
    paper="SVC, ICML 2026, arXiv 2602.05536",
)
def svc(xs: Sequence[Tensor], alpha: float, rank_share: float, lambda_: float, svd: str, block: Block) -> Tensor:
    """Scale back the singular values of a merge where it counts shared knowledge several times.

    The first input is the merge, of any method, the others are the T models it was made of: `of: [merged, a, b]`. With
    M = U diag(s) V^T the merged delta and D_t the models':

        c_rt = <u_r^T M, u_r^T D_t> / |u_r^T D_t|^2,   g_r = T / sum_t max(alpha, c_rt),   out = lambda U diag(g s) V^T.

    Takes two or more deltas of one shape and gives that shape, in the dtype of the arithmetic; the decomposition is in
    double precision. Tensors of three or more axes count as matrices (first axis, the rest); of vectors, scalars and
    matrices with a side of 1 the merged delta is taken as it is, times lambda. c_rt is 0 where model t does nothing in
    the direction u_r. With `rank_share` below 1 only the largest directions are calibrated, the others stay as they
    are; `svd: randomised` is of use only then. This is the paper's formula; its published code divides by
    max(alpha, mean_t c_rt) instead, and only where all c_rt are positive.

    Source: Li et al., When Shared Knowledge Hurts, ICML 2026, arXiv 2602.05536.
    """
    return on_matrices(
        xs,
        lambda deltas: lambda_ * _calibrated(deltas, alpha, rank_share, svd, block.key),
        lambda deltas: lambda_ * wide(deltas[0]),
    )
