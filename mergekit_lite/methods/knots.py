"""Low-rank deltas expressed in common directions, then merged entry by entry."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mergekit_lite.methods.elect import elect
from mergekit_lite.methods.linear import weighted_sum
from mergekit_lite.methods.random import derive_key
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.sparsify import sparsify
from mergekit_lite.methods.spec import Block, Param, Params
from mergekit_lite.methods.spectral import SVD, left_basis, mean, on_matrices, wide

ENTRIES = ("ties", "dare_ties", "dare_linear", "linear")
DENSITY = Param(
    "density", "number", 0.2, "share of the entries that is kept: the largest ones, by `dare` random ones", 0, 1, True
)
RANK = Param("rank", "integer", None, "rank of each model's delta, where it is known", 1)
MIN_SINGULAR = Param(
    "min_singular", "number", 1e-5, "singular values up to this part of the largest count as zero", 1e-7, 1, False, True
)


def check_rank(params: Params, inputs: int) -> str | None:
    """The randomised search has to know how many directions it is for."""
    if params["svd"] == "randomised" and params["rank"] is None:
        return "`svd: randomised` needs `rank`: the number of directions it looks for is rank times models"
    return None


def directions(deltas: Sequence[Tensor], rank: int | None, svd: str, key: int, min_singular: float) -> Tensor:
    """Orthonormal directions (m, r) of the columns of all deltas (m, n_t) together."""
    count = deltas[0].shape[0] if rank is None else rank * len(deltas)
    return left_basis(deltas, count, svd, key, min_singular)[0]


def merge_entries(blocks: Sequence[Tensor], merge: str, density: float, key: int) -> Tensor:
    """Blocks of one shape merged entry by entry with one of `ENTRIES`, trimmed within the block."""
    flat = [b.reshape(-1) for b in blocks]
    if merge != "linear":
        flat = [_thinned(x, merge, density, derive_key(key, "mask", i)) for i, x in enumerate(flat)]
    ones = (1.0,) * len(flat)
    if merge in ("ties", "dare_ties"):
        merged: Tensor = elect.fn(flat, weight=ones, aggregate="mean", zero_sign="positive", scope="tensor")
    else:
        merged = weighted_sum(flat, ones)
    return merged.reshape(blocks[0].shape)


def _thinned(x: Tensor, merge: str, density: float, key: int) -> Tensor:
    settings = {"density": density, "gamma": 0.0, "remove_first": True, "select": "exact", "block": Block(0, key)}
    if merge == "ties":
        # The whole block as one row.
        thin: Tensor = sparsify.fn([x.unsqueeze(0)], keep="largest", scope="row", rescale=False, **settings)
    else:
        thin = sparsify.fn([x], keep="random", scope="tensor", rescale=True, **settings)
    return thin.reshape(-1)


def _merged(
    deltas: Sequence[Tensor], merge: str, density: float, rank: int | None, min_singular: float, svd: str, key: int
) -> Tensor:
    basis = directions(deltas, rank, svd, derive_key(key, "left"), min_singular)
    merged: Tensor = basis @ merge_entries([basis.T @ wide(d) for d in deltas], merge, density, key)
    return merged


@method(
    Param("merge", "choice", "ties", "how the aligned blocks are merged", choices=ENTRIES),
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
    paper="KnOTS, ICLR 2025, arXiv 2410.19735",
)
def knots(
    xs: Sequence[Tensor],
    merge: str,
    density: float,
    rank: int | None,
    min_singular: float,
    lambda_: float,
    svd: str,
    block: Block,
) -> Tensor:
    """Express the deltas of adapters in common directions, then merge them with TIES or DARE.

    [D_1 ... D_T] = U diag(s) [V_1 ... V_T]^T, the deltas side by side; out = lambda U merge(B_1 ... B_T) with the
    blocks B_t = diag(s) V_t^T = U^T D_t, and `merge` one of

    - `ties`: of each block the share `density` of the largest entries, a sign elected, the mean of those that have it,
    - `dare_ties`: of each block a random share `density`, divided by it, then signs elected as above,
    - `dare_linear`, `linear`: the sum of such blocks, or of the blocks as they are.

    Takes one or more deltas of one shape and gives that shape, in the dtype of the arithmetic; U is found in double
    precision from sum_t D_t D_t^T. It works on whole deltas, not on the factors of an adapter: fold adapters into their
    base first. U has the directions above `min_singular`; where rounding to a stored dtype has blurred the rank, give
    `rank`. Deltas of full rank are merged too, but gain little. Tensors of three or more axes count as matrices (first
    axis, the rest); vectors, scalars and matrices with a side of 1 are averaged, times lambda.

    The published code trims over the blocks of all layers together and takes 1e-5 as an absolute bound; here each
    tensor is trimmed by itself, and the bound is relative.

    Source: Stoica et al., Model merging with SVD to tie the KnOTS, ICLR 2025, arXiv 2410.19735 (density 0.2, lambda
    0.6 for CLIP with rank 16).
    """
    return on_matrices(
        xs,
        lambda deltas: lambda_ * _merged(deltas, merge, density, rank, min_singular, svd, block.key),
        lambda deltas: lambda_ * mean(deltas),
    )
