"""A flat spectrum over the directions that models share and over those that each has for itself."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.random import derive_key
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.select import drop_count
from mergekit_lite.methods.spec import Block, Param
from mergekit_lite.methods.spectral import NEGLIGIBLE, SVD, mean, on_matrices, polar, triplets, wide


def split_ranks(size: int, models: int, common_share: float) -> tuple[int, int]:
    """How many directions are shared, and how many each model gets for itself, of `size` in all."""
    own = min(round((size - drop_count(size, common_share)) / models), size // models)
    return size - own * models, own


def _merged(deltas: Sequence[Tensor], common_share: float, svd: str, key: int) -> Tensor:
    common, own = split_ranks(min(deltas[0].shape), len(deltas), common_share)
    total = mean(deltas) * len(deltas)
    # What is next to nothing is so beside the deltas, not beside what is left of them.
    floor = NEGLIGIBLE * max(float(torch.linalg.matrix_norm(wide(d))) for d in deltas)
    shared = triplets(total, common, "exact", 0, floor)
    found = [shared]
    if own:
        for i, delta in enumerate(deltas):
            rest = wide(delta) - shared.u @ (shared.u.T @ wide(delta))
            found.append(triplets(rest, own, svd, derive_key(key, i), floor))
    s = torch.cat([t.s for t in found])
    if not len(s):
        return total
    u, v = (polar(torch.cat(parts, dim=1)) for parts in zip(*((t.u, t.v) for t in found), strict=True))
    return s.sum() / (common + own * len(deltas)) * (u @ v.T)


@method(
    Param("common_share", "number", 0.8, "share of the directions that is taken from the sum of all deltas", 0, 1),
    Param("lambda", "number", 1.0, "factor of the merged delta"),
    SVD,
    takes="delta",
    gives="delta",
    base="required",
    reach="matrix",
    positioned=True,
    paper="Iso-CTS, ICML 2025, arXiv 2502.04959",
)
def iso_cts(xs: Sequence[Tensor], common_share: float, lambda_: float, svd: str, block: Block) -> Tensor:
    """Give shared directions and each model's own directions the same strength.

    1. U_c, s_c, V_c: the largest singular triplets of sum_t D_t, a share of `common_share` of all r = min(m, n).
    2. U_t, s_t, V_t: of each D_t - U_c U_c^T D_t the largest triplets, round((1 - common_share) r / T) of them, in
       place of the smallest shared ones.
    3. out = lambda (s_1 + ... + s_r) / r orth(U) orth(V)^T, with U = [U_1 ... U_T U_c], V and s alike, orth(P C Q^T) =
       P Q^T.

    Takes one or more deltas of one shape and gives that shape, in the dtype of the arithmetic; decompositions are in
    double precision. Tensors of three or more axes count as matrices (first axis, the rest); vectors, scalars and
    matrices with a side of 1 are averaged, times lambda. Triplets whose singular value is at most a millionth of the
    largest norm of a delta are left out, since their directions are arbitrary; r counts them all the same.
    `svd: randomised` serves step 2; the sum's decomposition is exact.

    Source: Marczak et al., No Task Left Behind, ICML 2025, arXiv 2502.04959 (common_share 0.8).
    """
    return on_matrices(
        xs,
        lambda deltas: lambda_ * _merged(deltas, common_share, svd, block.key),
        lambda deltas: lambda_ * mean(deltas),
    )
