"""Task singular vectors, made orthogonal across tasks."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.random import derive_key
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.select import keep_count
from mergekit_lite.methods.spec import Block, Param
from mergekit_lite.methods.spectral import SVD, mean, on_matrices, polar, triplets


def merge_singular_vectors(deltas: Sequence[Tensor], rank_share: float | None, svd: str, key: int) -> Tensor:
    """The TSV-M merge of matrices of one shape, in double precision. Zero matrices take no part."""
    count = keep_count(min(deltas[0].shape), 1 / len(deltas) if rank_share is None else rank_share)
    found = [triplets(d, count, svd, derive_key(key, i)) for i, d in enumerate(deltas) if bool(d.any())]
    u, v = (torch.cat(parts, dim=1) for parts in zip(*((t.u, t.v) for t in found), strict=True))
    s = torch.cat([t.s for t in found])
    return (polar(u) * s) @ polar(v).T


@method(
    Param(
        "rank_share",
        "number",
        None,
        "share of each model's singular triplets that is kept; by default 1 / number of models",
        0,
        1,
        open_low=True,
    ),
    Param("lambda", "number", 1.0, "factor of the merged delta"),
    SVD,
    takes="delta",
    gives="delta",
    base="required",
    reach="matrix",
    positioned=True,
    paper="TSV-Merge, CVPR 2025, arXiv 2412.00081",
)
def tsv_m(xs: Sequence[Tensor], rank_share: float | None, lambda_: float, svd: str, block: Block) -> Tensor:
    """Keep each model's largest singular vectors and make those of different models orthogonal.

    With D_t = U_t S_t V_t^T cut to its k largest triplets, k = floor(rank_share min(m, n)) but at least 1, and
    U = [U_1 ... U_T], V = [V_1 ... V_T], S the singular values in the same order:

        out = lambda orth(U) diag(S) orth(V)^T,   orth(P C Q^T) = P Q^T (orthogonal Procrustes).

    Takes one or more deltas of one shape and gives that shape, in the dtype of the arithmetic; decompositions are in
    double precision. Tensors of three or more axes count as matrices (first axis, the rest); vectors, scalars and
    matrices with a side of 1 are averaged, times lambda. Triplets whose singular value is at most a millionth of their
    model's largest are left out, and so is a model without a change: their directions are arbitrary. Directions that
    several models share exactly are not filled up with arbitrary ones either: copies of one model give its k largest
    triplets. The published code keeps nothing where a matrix has fewer than T singular values; here it is one a model.

    Source: Gargiulo et al., Task Singular Vectors, CVPR 2025, arXiv 2412.00081.
    """
    return on_matrices(
        xs,
        lambda deltas: lambda_ * merge_singular_vectors(deltas, rank_share, svd, block.key),
        lambda deltas: lambda_ * mean(deltas),
    )
