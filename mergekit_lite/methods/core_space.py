"""Low-rank deltas merged in the small space that they span together."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.factored import (
    all_finite,
    left_directions,
    merging,
    packed,
    packed_rank,
    packed_shape,
    pairs_of,
)
from mergekit_lite.methods.iso_c import flatten_spectrum
from mergekit_lite.methods.knots import DENSITY, ENTRIES, LAMBDA, check_rank, merge_entries
from mergekit_lite.methods.random import derive_key
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.shared_space import MIN_SINGULAR, RANK, directions
from mergekit_lite.methods.spec import Block, Method, Param, Params
from mergekit_lite.methods.spectral import SVD, mean, on_matrices, wide
from mergekit_lite.methods.tsv_m import merge_singular_vectors

_MERGE = Param("merge", "choice", "tsv_m", "how the cores are merged", choices=("tsv_m", "iso_c", *ENTRIES))


def _merged(
    deltas: Sequence[Tensor], merge: str, density: float, rank: int | None, min_singular: float, svd: str, key: int
) -> Tensor:
    left = directions(deltas, rank, svd, derive_key(key, "left"), min_singular)
    right = directions([d.T for d in deltas], rank, svd, derive_key(key, "right"), min_singular)
    cores = [left.T @ wide(d) @ right for d in deltas]
    merged: Tensor = left @ _merge_cores(cores, merge, density, key) @ right.T
    return merged


def _merge_cores(cores: Sequence[Tensor], merge: str, density: float, key: int) -> Tensor:
    if merge == "tsv_m":
        return merge_singular_vectors(cores, None, "exact", key)
    if merge == "iso_c":
        return flatten_spectrum(cores, 1.0, "exact", key)
    return merge_entries(cores, merge, density, key)


def core_factors(
    xs: Sequence[Tensor],
    scale: Sequence[float],
    turned: Sequence[bool],
    model: Sequence[int],
    models: int,
    merge: str,
    density: float,
    rank: int | None,
    min_singular: float,
    lambda_: float,
    block: Block,
) -> Tensor:
    """`core_space` of deltas by their factors A_1, B_1, A_2, B_2, ..., as `factored.packed` gives it: the factors
    lambda U and merge(M_1 ... M_T) V^T."""
    pairs = pairs_of(xs, scale, turned, model, models)
    shape = (len(pairs[0].left), pairs[0].right.shape[1])
    most = packed_rank(shape, sum(p.left.shape[1] for p in pairs))
    if not all_finite(xs):
        return xs[0].new_full(packed_shape(shape, most), torch.nan)
    counts = [side if rank is None else rank * len(pairs) for side in shape]
    left, inside = left_directions(pairs, counts[0], min_singular)
    right, across = left_directions([pair.turned for pair in pairs], counts[1], min_singular)
    if not left.shape[1]:
        return xs[0].new_zeros(packed_shape(shape, most))
    cores = [one @ other.T for one, other in zip(inside, across, strict=True)]
    return packed(lambda_ * left, _merge_cores(cores, merge, density, block.key) @ right.T, most, xs[0].dtype)


def _factored(params: Params, shape: tuple[int, ...]) -> tuple[Method, Params] | None:
    kept = (_MERGE, DENSITY, RANK, MIN_SINGULAR, LAMBDA)
    return merging(core_factors, "core_space", shape, *kept), {param.name: params[param.name] for param in kept}


@method(
    _MERGE,
    DENSITY,
    RANK,
    MIN_SINGULAR,
    LAMBDA,
    SVD,
    takes="delta",
    gives="delta",
    base="required",
    reach="matrix",
    positioned=True,
    check=check_rank,
    factored=_factored,
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
    throughout. Where all inputs are LoRA adapters of the base, or deltas of adapters, U and V come from QR
    decompositions of their factors side by side, and nothing of the tensor's size is made before the sum with the base;
    `svd` has no meaning then. The published code takes the directions from the stacked factors A_t and B_t as they are:
    the same spaces, other axes in them, so entry-wise merges differ. The rank is found with `min_singular`; where
    rounding to a stored dtype has blurred it, give `rank`. Tensors of three or more axes count as matrices (first axis,
    the rest); vectors, scalars and matrices with a side of 1 are averaged, times lambda.

    Source: Panariello et al., Accurate and Efficient Low-Rank Model Merging in Core Space, NeurIPS 2025, arXiv
    2509.17786.
    """
    return on_matrices(
        xs,
        lambda deltas: lambda_ * _merged(deltas, merge, density, rank, min_singular, svd, block.key),
        lambda deltas: lambda_ * mean(deltas),
    )
