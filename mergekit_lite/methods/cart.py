"""What each model has apart from the average of all, cut to low rank."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lite.lazy import Tensor
from mergekit_lite.methods.random import derive_key
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.select import keep_count
from mergekit_lite.methods.spec import Block, Param
from mergekit_lite.methods.spectral import SVD, mean, on_matrices, triplets, wide


def _merged(deltas: Sequence[Tensor], rank_share: float, factor: float, svd: str, key: int) -> Tensor:
    centre = mean(deltas)
    count = keep_count(min(centre.shape), rank_share)
    result = centre.clone()
    for i, delta in enumerate(deltas):
        result += factor * triplets(wide(delta) - centre, count, svd, derive_key(key, i), 0.0).matrix()
    return result


@method(
    Param("rank_share", "number", 0.08, "share of each model's singular triplets that is kept", 0, 1, open_low=True),
    Param("lambda", "number", 1.0, "factor of the sum of what the models have apart from their average"),
    SVD,
    takes="delta",
    gives="delta",
    base="required",
    reach="matrix",
    positioned=True,
    paper="CART, arXiv 2412.12153",
)
def cart(xs: Sequence[Tensor], rank_share: float, lambda_: float, svd: str, block: Block) -> Tensor:
    """Add to the average of the models what each of them has apart from it, cut to low rank.

    out = m + lambda sum_t low_rank(D_t - m), with m = mean_t D_t and low_rank the k largest singular triplets,
    k = floor(rank_share min(m, n)) but at least 1. With all triplets it is the plain average.

    Takes one or more deltas of one shape and gives that shape, in the dtype of the arithmetic; decompositions are in
    double precision. The base itself cancels: it only serves to take differences. Tensors of three or more axes count
    as matrices (first axis, the rest); vectors, scalars and matrices with a side of 1 are averaged.

    Source: Choi et al., Revisiting Weight Averaging for Model Merging, arXiv 2412.12153 (rank 8 percent).
    """
    return on_matrices(xs, lambda deltas: _merged(deltas, rank_share, lambda_, svd, block.key), mean)
