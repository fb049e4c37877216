"""A least-squares merge whose input covariances are estimated from the deltas."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.select import keep_count
from mergekit_lite.methods.spec import Block, Param
from mergekit_lite.methods.spectral import SVD, mean, on_matrices, triplets, wide

TINY = 1e-12  # keeps the logarithm of the size of a delta that is zero


def spread(sizes: Sequence[float]) -> float:
    """How much the sizes of the deltas differ: variance over squared mean of their logarithms; 0 of a single one."""
    logs = [math.log(size + TINY) for size in sizes]
    centre = math.fsum(logs) / len(logs)
    if len(logs) == 1:
        return 0.0
    return math.fsum((x - centre) ** 2 for x in logs) / (len(logs) - 1) / (centre**2 + TINY)


def covariance(delta: Tensor) -> Tensor:
    """The scatter (n, n) of the rows of a matrix (m, n) about their mean: an estimate of the inputs' covariance."""
    centred = delta - delta.mean(dim=0, keepdim=True)
    return centred.T @ centred


def _merged(
    deltas: Sequence[Tensor], ridge: float, heterogeneity: float, rank_share: float, svd: str, key: int
) -> Tensor:
    rows, columns = deltas[0].shape
    sizes = [float(wide(d).square().sum()) for d in deltas]
    uneven = spread(sizes) > heterogeneity
    # sum_t S_t, sum_t D_t S_t, sum_t e_t, sum_t e_t D_t
    scatter = deltas[0].new_zeros(columns, columns, dtype=torch.float64)
    response = torch.zeros_like(deltas[0], dtype=torch.float64)
    ridges, damped = 0.0, torch.zeros_like(response)
    for delta in map(wide, deltas):
        sigma = covariance(delta)
        scale = 1 / (float(sigma.trace()) + TINY) if uneven else 1.0
        scatter += sigma.mul_(scale)
        response += delta @ sigma
        ridges += ridge * scale
        damped += ridge * scale * delta
    prior = scatter.mean(dim=0, keepdim=True) / (math.fsum(sizes) / len(sizes) if uneven else 1.0)
    system = scatter.clone()
    system.diagonal().add_(ridges)
    # X A = B as A^T X^T = B^T.
    result: Tensor = torch.linalg.solve((system + prior).T, (response + damped).T).T
    if uneven:
        rest = response - mean(deltas) @ system
        found = triplets(result + rest, keep_count(min(rows, columns), rank_share), svd, key)
        result = result + found.s.mean() * (found.u @ found.v.T)
    return result


@method(
    Param("ridge", "number", 0.01, "added to the diagonal of a covariance, in squared weights", 0, open_low=True),
    Param("heterogeneity", "number", 0.3, "spread of the deltas' sizes from which they are normalised", 0),
    Param("rank_share", "number", 0.3, "share of the directions that the refinement flattens", 0, 1, open_low=True),
    Param("lambda", "number", 1.0, "factor of the merged delta"),
    SVD,
    takes="delta",
    gives="delta",
    base="required",
    reach="matrix",
    positioned=True,
    paper="ACE-Merging, CVPR 2026, arXiv 2603.02945",
)
def ace(
    xs: Sequence[Tensor],
    ridge: float,
    heterogeneity: float,
    rank_share: float,
    lambda_: float,
    svd: str,
    block: Block,
) -> Tensor:
    """RegMean without data: the covariance of a layer's inputs is read off the model's own change.

    With C_t the delta D_t (m, n) less the mean of its rows, S_t = C_t^T C_t, e_t = ridge, and 1 a column of n ones:

        X = (sum_t D_t (S_t + e_t I)) (sum_t (S_t + e_t I) + 1 c)^-1,   c = 1^T sum_t S_t / n,   out = lambda X.

    Where the sizes |D_t|^2 are uneven, that is the variance of their logarithms over their squared mean is above
    `heterogeneity`, S_t and e_t are divided by trace(S_t), c also by the mean size, and X is refined:

        X + mean(s_1 ... s_k) U_k V_k^T,   U diag(s) V^T = X + sum_t D_t (S_t - mean_u (S_u + e_u I)),

    k = floor(rank_share min(m, n)) but at least 1.

    Takes one or more deltas of one shape and gives that shape, in the dtype of the arithmetic; the system is solved in
    double precision. Tensors of three or more axes count as matrices (first axis, the rest); vectors, scalars and
    matrices with a side of 1 are averaged, times lambda. `ridge` is an absolute number, as published: deltas with
    squared entries far below it are merely averaged. The published code puts C_t for D_t in the first factor too, by
    which the mean row of every delta is lost.

    Source: Xu et al., ACE-Merging, CVPR 2026, arXiv 2603.02945 (ridge 0.01, heterogeneity 0.3, rank_share 0.3).
    """
    return on_matrices(
        xs,
        lambda deltas: lambda_ * _merged(deltas, ridge, heterogeneity, rank_share, svd, block.key),
        lambda deltas: lambda_ * mean(deltas),
    )
