"""Low-rank deltas merged in the small space that they span together."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lite.lazy import Tensor
from mergekit_lite.methods.iso_c import flatten_spectrum
from mergekit_lite.methods.knots import DENSITY, ENTRIES, check_rank, merge_entries
from mergekit_lite.methods.random import derive_key
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.shared_space import MIN_SINGULAR, RANK, directions
from mergekit_lite.methods.spec import Block, Param
from mergekit_lite.methods.spectral import SVD, mean, on_matrices, wide
from mergekit_lite.methods.tsv_m import merge_singular_vectors


def _merged(
    deltas: Sequence[Tensor], merge: str, density: float, rank: int | None, min_singular: float, svd: str, key: int
) -> Tensor:
    left = directions(deltas, rank, svd, derive_key(key, "left"), min_singular)
    right = directions([d.T for d in deltas], rank, svd, derive_key(key, "right"), min_singular)
    cores = [left.T @ wide(d) @ right for d in deltas]
    if merge == "tsv_m":
        core = merge_singular_vectors(cores, None, "exact", key)
    elif merge == "iso_c":
        core = flatten_spectrum(cores, 1.0, "exact", key)
    else:
        core = merge_entries(cores, merge, density, key)
    merged: Tensor = left @ core @ right.T
    return merged


@method(
    Param("merge", "choice", "tsv_m", "how the cores are merged", choices=("tsv_m", "iso_c", *ENTRIES)),
    DENSITY,
    RANK,
    MIN_SINGULAR,
    Param("lambda", "number", 1.0, "factor of the merged delta"),
    SVD,
    takes="delta",
    gives="delta",
    base="required",
    reach="matrix",
    positioned=True,
    check=check_rank,
    paper="Core Space, NeurIPS 2025, arXiv 2509.17786",
)
def core_space(
    xs: Sequence[Tensor],
    merge: str,
    density: float,
    rank: int | None,
    min_singular: float,
    lambda_: float,
    svd: str,
    block: Block,
) -> Tensor:
    """Merge the deltas of adapters in the small core space that they span together.

    U holds the directions of all columns, the left singular vectors of [D_1 ... D_T], V those of all rows. With the
    cores M_t = U^T D_t V, at most T times the adapters' rank on a side,

        out = lambda U merge(M_1 ... M_T) V^T,

    where `merge` is `tsv_m` or `iso_c`, or one of the entry-wise merges that `knots` explains, with every tensor by
    itself. Nothing of the deltas is lost by going there: U M_t V^T = D_t. `tsv_m` and `linear` give what they give
    on the whole deltas, with small decompositions, and so does `iso_c`, but that the mean is over the singular values
    of the core, fewer and so larger; the others depend on the directions.

    Takes one or more deltas of one shape and gives that shape, in the dtype of the arithmetic; in double precision
    throughout. It works on whole deltas, not on the factors of an adapter: fold adapters into their base first. The
    published code takes the directions from the stacked factors A_t and B_t: the same spaces, other axes in them, so
    entry-wise merges differ. The rank is found with `min_singular`; where rounding to a stored dtype has blurred it,
    give `rank`. Tensors of three or more axes count as matrices (first axis, the rest); vectors, scalars and matrices
    with a side of 1 are averaged, times lambda.

    Source: Panariello et al., Accurate and Efficient Low-Rank Model Merging in Core Space, NeurIPS 2025, arXiv
    2509.17786.
    """
    return on_matrices(
        xs,
        lambda deltas: lambda_ * _merged(deltas, merge, density, rank, min_singular, svd, block.key),
        lambda deltas: lambda_ * mean(deltas),
    )
