"""Weighted sums, and the arithmetic that other methods share."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergekit_lite.errors import RecipeError
from mergekit_lite.lazy import Tensor
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import Param, Params


def weighted_sum(xs: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i x_i in the order of the inputs; an input with weight 0 takes no part, whatever it holds.

    Multiplication and addition are separate operations: a fused one may be used for some elements of a block and not
    for others, and would make the result depend on where a block ends.
    """
    total: Tensor | None = None
    for x, weight in zip(xs, weights, strict=True):
        if weight == 0:
            continue
        term = x if weight == 1 else x * weight
        if total is None:
            total = term.clone() if term is x else term
        else:
            total.add_(term)
    return xs[0].new_zeros(xs[0].shape) if total is None else total


def sole(weights: Sequence[float]) -> int | None:
    """The index of the only weight that is not zero, or None."""
    used = [i for i, weight in enumerate(weights) if weight != 0]
    return used[0] if len(used) == 1 else None


def _pick(params: Params, inputs: int) -> int | None:
    index = sole(params["weight"])
    return index if index is not None and (params["normalize"] or params["weight"][index] == 1) else None


def _check(params: Params, inputs: int) -> str | None:
    if params["normalize"] and math.fsum(params["weight"]) == 0:
        return "the weights add up to 0, so they cannot be normalised: change them, or set `normalize: false`"
    return None


@method(
    Param("weight", "number", 1.0, "share of this input in the sum; negative ones subtract", per_input=True),
    Param("normalize", "flag", True, "divide the weights by their sum"),
    paper="Model soups, ICML 2022, arXiv 2203.05482",
    pick=_pick,
    check=_check,
    plain=True,
)
def linear(xs: Sequence[Tensor], weight: Sequence[float], normalize: bool) -> Tensor:
    """Weighted mean, or with `normalize: false` the weighted sum: a model soup.

    out = sum_i w_i x_i, with w_i = weight_i / sum_j weight_j where `normalize` is true.

    Takes one or more tensors of one shape and gives that shape, in the dtype of the arithmetic (float32 or float64).
    Weights are normalised in double precision; the sum runs in the order of the inputs. Where one weight alone is not
    zero and comes to 1, that input is copied bit for bit. Weights that add up to 0 cannot be normalised: an error.

    Source: Wortsman et al., Model soups, ICML 2022, arXiv 2203.05482 (uniform and weighted soup).
    """
    if not normalize:
        return weighted_sum(xs, weight)
    total = math.fsum(weight)
    if total == 0:
        raise RecipeError("the weights of `linear` add up to 0", hint="change them, or set `normalize: false`")
    return weighted_sum(xs, [w / total for w in weight])
