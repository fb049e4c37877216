"""The combinations of adapters that peft's `add_weighted_adapter` makes, of deltas or of factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergekit_lite.errors import RecipeError
from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.factored import all_finite, merging, packed, packed_rank, packed_shape, pairs_of
from mergekit_lite.methods.random import derive_key
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.sparsify import sparsify
from mergekit_lite.methods.spec import Block, Method, Param, Params
from mergekit_lite.methods.spectral import wide

COMBINATIONS = ("linear", "ties", "magnitude_prune", "dare_linear", "dare_ties")
_WEIGHT = Param("weight", "number", 1.0, "factor of this adapter", per_input=True)
_COMBINATION = Param("combination", "choice", "linear", "how tensors are put together", choices=COMBINATIONS)
_DENSITY = Param("density", "number", 0.5, "share of the entries that is kept; `linear` keeps all", 0, 1, True)
_MAJORITY = Param("majority", "choice", "total", "what a sign is elected by", choices=("total", "frequency"))
_ON = Param("on", "choice", "deltas", "what is put together", choices=("deltas", "factors"))


def combined(
    xs: Sequence[Tensor], weights: Sequence[float], combination: str, density: float, majority: str, key: int
) -> Tensor:
    """Tensors of one shape put together as peft does, in double precision."""
    kept = [wide(x) for x in xs]
    if combination != "linear" and density < 1:
        kept = [_thinned(x, combination, density, derive_key(key, "mask", i)) for i, x in enumerate(kept)]
    if not combination.endswith("ties"):
        return torch.stack([x * w for x, w in zip(kept, weights, strict=True)]).sum(0)
    stacked = torch.stack(kept)
    votes = stacked if majority == "total" else stacked.sign()
    # A draw goes to plus.
    agree = stacked.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
    weighted = stacked * torch.tensor(weights, dtype=stacked.dtype, device=stacked.device).view(-1, *[1] * xs[0].ndim)
    total: Tensor = (weighted * agree).sum(0)
    return total / agree.sum(0).clamp(min=1)


def _thinned(x: Tensor, combination: str, density: float, key: int) -> Tensor:
    settings = {"density": density, "gamma": 0.0, "remove_first": True, "select": "exact", "compat": False}
    settings["block"] = Block(0, key)
    if combination.startswith("dare"):
        thin: Tensor = sparsify.fn([x.reshape(-1)], keep="random", scope="tensor", rescale=True, **settings)
    else:
        thin = sparsify.fn([x.reshape(1, -1)], keep="largest", scope="row", rescale=False, **settings)
    return thin.reshape(x.shape)


def combine_factors(
    xs: Sequence[Tensor],
    scale: Sequence[float],
    turned: Sequence[bool],
    model: Sequence[int],
    models: int,
    weight: Sequence[float],
    combination: str,
    density: float,
    majority: str,
    block: Block,
) -> Tensor:
    """`weighted_adapter` of factors A_1, B_1, A_2, B_2, ..., as `factored.packed` gives it."""
    count = len(scale)
    pairs = pairs_of(xs, [1.0] * count, turned, range(count), count)
    shape = (len(pairs[0].left), pairs[0].right.shape[1])
    most = packed_rank(shape, sum(p.left.shape[1] for p in pairs))
    if not all_finite(xs):
        return xs[0].new_full(packed_shape(shape, most), torch.nan)
    factors = [weight[i] * s for i, s in zip(model, scale, strict=True)]
    roots = [math.sqrt(abs(f)) for f in factors]
    signed = [math.copysign(root, f) for root, f in zip(roots, factors, strict=True)]
    # The sign goes with A, which is the left factor where the product is turned round.
    lefts = [s if turn else r for s, r, turn in zip(signed, roots, turned, strict=True)]
    rights = [r if turn else s for s, r, turn in zip(signed, roots, turned, strict=True)]
    how = (combination, density, majority)
    left = combined([p.left for p in pairs], lefts, *how, derive_key(block.key, "left"))
    right = combined([p.right for p in pairs], rights, *how, derive_key(block.key, "right"))
    if left.shape[1] > most:  # a rank above the number of rows
        left, right = torch.eye(len(left), dtype=left.dtype, device=left.device), left @ right
    return packed(left, right, most, xs[0].dtype)


def _factored(params: Params, shape: tuple[int, ...]) -> tuple[Method, Params] | None:
    if params["on"] == "deltas":
        return None
    # The weights are by model, the factors not: those that a model lacks take no part.
    weight = Param("weight", "number", 1.0, "factor of each model")
    found = merging(combine_factors, "weighted_adapter", shape, weight, _COMBINATION, _DENSITY, _MAJORITY)
    return found, {name: params[name] for name in ("weight", "combination", "density", "majority")}


def _needs_factors(params: Params) -> bool:
    return bool(params["on"] == "factors")


@method(
    _WEIGHT,
    _COMBINATION,
    _DENSITY,
    _MAJORITY,
    _ON,
    takes="delta",
    gives="delta",
    base="required",
    reach="matrix",
    positioned=True,
    factored=_factored,
    needs_factors=_needs_factors,
    paper="PEFT, 2022, github.com/huggingface/peft",
)
def weighted_adapter(
    xs: Sequence[Tensor],
    weight: Sequence[float],
    combination: str,
    density: float,
    majority: str,
    on: str,
    block: Block,
) -> Tensor:
    """Combine LoRA adapters as peft's `add_weighted_adapter` does.

    With `on: deltas` and p(x) what is kept of x,

        out = sum_t w_t p(D_t)                                  linear, magnitude_prune, dare_linear
        out = sum_(t: sign agrees) w_t p(D_t) / how many agree     ties, dare_ties

    entry by entry and every tensor by itself: `ties` and `magnitude_prune` keep the share `density` of the largest
    entries, `dare_linear` and `dare_ties` a random one, divided by it, `linear` all. The sign is that of the sum of the
    p(D_t), or by `majority: frequency` of their signs; weights have no part in it, and a draw goes to plus. Saved with
    `as: lora` this is what peft calls `svd`, `ties_svd`, `magnitude_prune_svd`, `dare_linear_svd` and `dare_ties_svd`,
    and `linear` at a rank that suffices is `cat`.

    With `on: factors` the same is done to the factors, out = B A with A from the A_t and B from the B_t, the square
    root of |w_t s_t| being the weight of each (s_t the adapter's own scale), the sign with A: what peft calls `linear`,
    `ties` and so on. It is here for what was made so. The factors of one delta are not unique, so what becomes of them
    depends on more than the deltas. All inputs must be LoRA adapters of one rank then.

    Takes one or more deltas of one shape and gives that shape, in the dtype of the arithmetic; sums are in double
    precision. Random masks are not peft's. Tensors that an adapter lacks take no part on factors, and are zeros on
    deltas.

    Source: Mangrulkar et al., PEFT, 2022; Yadav et al., TIES-Merging, 2023, arXiv 2306.01708; Yu et al., DARE, 2024,
    arXiv 2311.03099.
    """
    if on == "factors" and any(bool(x.any()) for x in xs):
        raise RecipeError("`on: factors` needs adapters", hint="name them as models: `{adapter: ADAPTER}`")
    return combined(xs, weight, combination, density, majority, block.key).to(xs[0].dtype)
