"""Low-rank deltas expressed in common directions, then merged entry by entry."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.elect import elect
from mergekit_lite.methods.factored import (
    all_finite,
    left_directions,
    merging,
    packed,
    packed_rank,
    packed_shape,
    pairs_of,
)
from mergekit_lite.methods.linear import linear, weighted_sum
from mergekit_lite.methods.random import derive_key
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.shared_space import (
    MIN_SINGULAR,
    PAPER,
    RANK,
    directions,
    from_shared,
    shared_basis,
    to_shared,
    trim_shared,
)
from mergekit_lite.methods.sparsify import sparsify
from mergekit_lite.methods.spec import Block, Call, Method, Param, Params, Slot
from mergekit_lite.methods.spectral import SVD, mean, on_matrices, wide

ENTRIES = ("ties", "dare_ties", "dare_linear", "linear")
SCOPES = ("tensor", "global")
LAMBDA = Param("lambda", "number", 1.0, "factor of the merged delta")
MERGE = Param("merge", "choice", "ties", "how the aligned blocks are merged", choices=ENTRIES)
DENSITY = Param(
    "density", "number", 0.2, "share of the entries that is kept: the largest ones, by `dare` random ones", 0, 1, True
)


def check_rank(params: Params, inputs: int) -> str | None:
    """The randomised search has to know how many directions it is for."""
    if params["svd"] == "randomised" and params["rank"] is None:
        return "`svd: randomised` needs `rank`: the number of directions it looks for is rank times models"
    return None


def merge_entries(blocks: Sequence[Tensor], merge: str, density: float, key: int) -> Tensor:
    """Blocks of one shape merged entry by entry with one of `ENTRIES`, trimmed within the block."""
    flat = [b.reshape(-1) for b in blocks]
    if merge != "linear":
        flat = [_thinned(x, merge, density, derive_key(key, "mask", i)) for i, x in enumerate(flat)]
    ones = (1.0,) * len(flat)
    if merge in ("ties", "dare_ties"):
        merged: Tensor = elect.fn(
            flat, weight=ones, aggregate="mean", zero_sign="positive", scope="tensor", compat=False
        )
    else:
        merged = weighted_sum(flat, ones)
    return merged.reshape(blocks[0].shape)


def _thinned(x: Tensor, merge: str, density: float, key: int) -> Tensor:
    settings = {"density": density, "gamma": 0.0, "remove_first": True, "select": "exact", "compat": False}
    settings["block"] = Block(0, key)
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


def merge_factors(
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
    """`merge_in_shared` of deltas by their factors A_1, B_1, A_2, B_2, ..., times lambda, as `factored.packed` gives
    it: the factors U and merge(B_1 ... B_T)."""
    pairs = pairs_of(xs, scale, turned, model, models)
    shape = (len(pairs[0].left), pairs[0].right.shape[1])
    most = packed_rank(shape, sum(p.left.shape[1] for p in pairs))
    if not all_finite(xs):
        return xs[0].new_full(packed_shape(shape, most), torch.nan)
    count = shape[0] if rank is None else rank * len(pairs)
    basis, inside = left_directions(pairs, count, min_singular)
    blocks = [core @ pair.right for core, pair in zip(inside, pairs, strict=True)]
    merged = merge_entries(blocks, merge, density, block.key) if basis.shape[1] else blocks[0]
    return packed(lambda_ * basis, merged, most, xs[0].dtype)


def _factored(params: Params, shape: tuple[int, ...]) -> tuple[Method, Params] | None:
    if params["scope"] != "tensor":
        return None
    kept = (MERGE, DENSITY, RANK, MIN_SINGULAR, LAMBDA)
    found = merging(merge_factors, "merge_in_shared", shape, *kept)
    return found, {param.name: params[param.name] for param in kept}


@method(
    MERGE,
    DENSITY,
    RANK,
    MIN_SINGULAR,
    SVD,
    takes="delta",
    gives="delta",
    reach="matrix",
    positioned=True,
    public=False,
    paper=PAPER,
)
def merge_in_shared(
    xs: Sequence[Tensor], merge: str, density: float, rank: int | None, min_singular: float, svd: str, block: Block
) -> Tensor:
    """Merge deltas in the directions that they share, every tensor by itself: `knots` with `scope: tensor`."""
    return on_matrices(xs, lambda deltas: _merged(deltas, merge, density, rank, min_singular, svd, block.key), mean)


def _check(params: Params, inputs: int) -> str | None:
    if params["scope"] == "global" and params["merge"] in ("dare_linear", "linear"):
        return (
            f"`merge: {params['merge']}` treats every entry by itself, so `scope: global` has no meaning: leave it out"
        )
    return check_rank(params, inputs)


@method(
    MERGE,
    DENSITY,
    Param("scope", "choice", "tensor", "where magnitudes are ranked and drawn votes decided", choices=SCOPES),
    RANK,
    MIN_SINGULAR,
    LAMBDA,
    SVD,
    takes="delta",
    gives="delta",
    base="required",
    composite=True,
    check=_check,
    factored=_factored,
    paper=PAPER,
)
def knots(
    *deltas: Call | Slot,
    merge: str,
    density: float,
    scope: str,
    rank: int | None,
    min_singular: float,
    lambda_: float,
    svd: str,
) -> Call:
    """Express the deltas of adapters in common directions, then merge them with TIES or DARE.

    [D_1 ... D_T] = U diag(s) [V_1 ... V_T]^T, the deltas side by side; out = lambda U merge(B_1 ... B_T) with the
    blocks B_t = diag(s) V_t^T = U^T D_t, and `merge` one of

    - `ties`: of each model's blocks the share `density` of the largest entries, a sign elected, the mean of those that
      have it,
    - `dare_ties`: of each block a random share `density`, divided by it, then signs elected as above,
    - `dare_linear`, `linear`: the sum of such blocks, or of the blocks as they are.

    `scope: tensor`, the default, trims the blocks of every tensor by themselves; a vote that is a draw goes to plus.
    `scope: global` trims those of all tensors together, as the published code does: of the entries that are not 0, and
    a draw goes to the sign that most entries have. It works tensor by tensor all the same, but finds U anew in each of
    its four to seven passes, so it takes as many times as long.

    Takes one or more deltas of one shape and gives that shape, in the dtype of the arithmetic; U is found in double
    precision from sum_t D_t D_t^T. Where all inputs are LoRA adapters of the base, or deltas of such, and `scope` is
    `tensor`, their factors take the place of whole deltas: U comes from a QR decomposition of the factors side by side,
    the merged delta is a product of two factors too, and nothing of the tensor's size is made before the sum with the
    base; `svd` has no meaning then. U has the directions above `min_singular`; where rounding to a stored dtype has
    blurred the rank, give `rank`. Deltas of full rank are merged too, but gain little. Tensors of three or more axes
    count as matrices (first axis, the rest); vectors, scalars and matrices with a side of 1 are averaged, times lambda.

    The published code takes 1e-5 as an absolute bound of singular values, here it is relative; and of density n entries
    it keeps one more, with all that equal it.

    Source: Stoica et al., Model merging with SVD to tie the KnOTS, ICLR 2025, arXiv 2410.19735 (density 0.2, lambda
    0.6 for CLIP with rank 16).
    """
    if scope == "tensor":
        settings = {"merge": merge, "density": density, "rank": rank, "min_singular": min_singular, "svd": svd}
        return linear(merge_in_shared(*deltas, **settings), weight=lambda_, normalize=False)
    basis = shared_basis(*deltas, rank=rank, min_singular=min_singular, svd=svd)
    blocks = [to_shared(delta, basis) for delta in deltas]
    if merge == "ties":
        blocks = [trim_shared(b, density=density) for b in blocks]
    else:
        blocks = [sparsify(b, density=density, keep="random", rescale=True) for b in blocks]
    merged = elect(*blocks, zero_sign="majority", scope="global")
    return linear(from_shared(merged, basis, *deltas), weight=lambda_, normalize=False)
