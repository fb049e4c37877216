"""Means of directions on the sphere, worked out on the matrix of inner products alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergekit_lite.lazy import Tensor
from mergekit_lite.methods.gram import Gram, Matrix, from_base, product
from mergekit_lite.methods.linear import sole
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import Param, Params

TINY = 1e-8  # a norm up to this has no direction


def normalized(weight: Sequence[float]) -> list[float]:
    """The weights divided by their sum."""
    total = math.fsum(weight)
    return [w / total for w in weight]


def spherical_mean(gram: Matrix, weight: Sequence[float], steps: int, tol: float) -> list[float]:
    """Factors c_i of the inputs so that sum_i c_i x_i is their weighted mean on the sphere.

    The directions x_i / |x_i| are averaged: from their weighted mean, `steps` times along the mean of the arcs that
    lead to them, until this is at most `tol` long. The result has the weighted mean of the norms; every point on the
    way is a combination of the inputs, so that their inner products are all it takes. Where the directions cancel, or
    a number is not finite, the factors are the weights.
    """
    norms = [math.sqrt(gram[i][i]) for i in range(len(weight))]
    used = [i for i, norm in enumerate(norms) if norm > TINY and weight[i] != 0]
    if not used or not all(math.isfinite(gram[i][j]) for i in used for j in used):
        return list(weight)
    cosines = tuple(tuple(gram[i][j] / norms[i] / norms[j] for j in used) for i in used)
    shares = [weight[i] for i in used]
    point = shares
    length = math.sqrt(max(product(cosines, point, point), 0.0))
    if length <= TINY:
        return list(weight)
    point = [p / length for p in point]
    for _ in range(steps):
        step = [0.0] * len(used)
        for i, share in enumerate(shares):
            cosine = min(max(math.fsum(p * c for p, c in zip(point, cosines[i], strict=True)), -1.0), 1.0)
            away = [-cosine * p for p in point]
            away[i] += 1
            sine = math.sqrt(max(product(cosines, away, away), 0.0))
            if sine > TINY:
                factor = share * math.atan2(sine, cosine) / sine
                step = [s + factor * a for s, a in zip(step, away, strict=True)]
        angle = math.sqrt(max(product(cosines, step, step), 0.0))
        if angle <= tol:
            break
        point = [math.cos(angle) * p + math.sin(angle) / angle * s for p, s in zip(point, step, strict=True)]
        # Rounding leads away from the sphere.
        length = math.sqrt(product(cosines, point, point))
        point = [p / length for p in point]
    radius = math.fsum(share * norms[i] for share, i in zip(shares, used, strict=True))
    factors = [0.0] * len(weight)
    for p, i in zip(point, used, strict=True):
        factors[i] = radius * p / norms[i]
    return factors


def _measure(params: Params, inputs: int, numels: Sequence[int]) -> Gram:
    count = len(params["weight"])
    return Gram(inputs, origin=count if inputs > count else None)


def _check(params: Params, inputs: int) -> str | None:
    several = len(params["weight"]) > 1
    if several and params.get("normalize_weights", True) and math.fsum(params["weight"]) == 0:
        return "the weights add up to 0, so they cannot be normalised: change them"
    return None


def _pick(params: Params, inputs: int) -> int | None:
    if len(params["weight"]) == 1:
        return 0
    index = sole(params["weight"])
    normalize = params.get("normalize_weights", True)
    return index if index is not None and (normalize or params["weight"][index] == 1) else None


@method(
    Param("weight", "number", 1.0, "share of this input in the mean", per_input=True),
    Param("normalize_weights", "flag", True, "divide the weights by their sum"),
    Param("eps", "number", TINY, "a step up to this length, in radians, is not taken", low=0),
    Param("log_map", "flag", True, "follow arcs; without it the result has the mean direction itself, as in mergekit"),
    base="optional",
    inputs=(1, None),
    reach="measured",
    paper="mergekit, EMNLP 2024, arXiv 2403.13257",
    measure=_measure,
    pick=_pick,
    check=_check,
)
def multislerp(
    xs: Sequence[Tensor],
    weight: Sequence[float],
    normalize_weights: bool,
    eps: float,
    log_map: bool,
    stat: Matrix | None = None,
) -> Tensor:
    """Spherical interpolation between several inputs, or of their changes from a base.

    out = r exp_m(sum_i w_i log_m(u_i)), with u_i = x_i / |x_i|, the mean direction m = sum_i w_i u_i / |sum_i w_i u_i|,
    r = sum_i w_i |x_i|; log_m(u) is the arc from m to u as a vector at m, exp_m the way back. With a base, the x_i are
    the changes from it, and the base is added to the result.

    Takes one or more tensors of one shape, and the base's where there is one, and gives that shape, in the dtype of
    the arithmetic. All factors follow from the inner products of the flattened tensors, formed in double precision. An
    input of zeros has no direction and takes no part but in r. An input that alone has a weight is copied bit for bit,
    and so is a single input, whatever its weight.

    Unlike mergekit: arcs are followed (it projects onto the tangent space instead, where the projections cancel and m
    itself comes out: `log_map: false`), and directions that cancel give the weighted mean instead of an error.

    Source: Goddard et al., Arcee's MergeKit, EMNLP 2024 (industry track), arXiv 2403.13257.
    """
    assert stat is not None
    shares = normalized(weight) if normalize_weights else list(weight)
    return from_base(xs, spherical_mean(stat, shares, int(log_map), eps))


@method(
    Param("weight", "number", 1.0, "share of this input in the mean", low=0, per_input=True),
    Param("max_iter", "integer", 10, "steps towards the mean at most", low=1),
    Param("tol", "number", 1e-5, "a step up to this length, in radians, ends the search", low=0),
    inputs=(1, None),
    reach="measured",
    paper="Karcher, Riemannian center of mass, 1977; mergekit, EMNLP 2024, arXiv 2403.13257",
    measure=_measure,
    pick=_pick,
    check=_check,
)
def karcher(
    xs: Sequence[Tensor], weight: Sequence[float], max_iter: int, tol: float, stat: Matrix | None = None
) -> Tensor:
    """The Karcher mean: the point of the sphere whose squared arcs to all inputs have the smallest sum.

    out = r m, with m = argmin over |m| = 1 of sum_i w_i arccos(<m, u_i>)^2, u_i = x_i / |x_i|, r = sum_i w_i |x_i| and
    weights w that are divided by their sum. It is found by steps m <- exp_m(sum_i w_i log_m(u_i)).

    Takes one or more tensors of one shape and gives that shape, in the dtype of the arithmetic. The points on the way
    are combinations of the inputs, so that the search runs on their inner products alone, in double precision. An input
    of zeros has no direction and takes no part but in r. Directions that cancel give the weighted mean.

    Unlike mergekit: inputs may have weights; r counts zero inputs too.

    Source: Karcher, Riemannian center of mass and mollifier smoothing, Comm. Pure Appl. Math. 30, 1977; Goddard et
    al., Arcee's MergeKit, EMNLP 2024 (industry track), arXiv 2403.13257.
    """
    assert stat is not None
    return from_base(xs, spherical_mean(stat, normalized(weight), max_iter, tol))
