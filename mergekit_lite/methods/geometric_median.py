"""The point with the smallest sum of distances to the inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergekit_lite.lazy import Tensor
from mergekit_lite.methods.gram import Gram, Matrix, product
from mergekit_lite.methods.linear import sole, weighted_sum
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import Param, Params, Reach


def weiszfeld(gram: Matrix, weight: Sequence[float], max_iter: int, tol: float) -> list[float]:
    """Factors c_i, sum 1, so that sum_i c_i x_i is the weighted geometric median, from the inner products of the
    inputs (taken from any origin).

    Weiszfeld's steps c_i <- w_i / |x_i - y| / sum_j w_j / |x_j - y|, as Vardi and Zhang correct them where y meets an
    input. The search ends when a step moves y by at most `tol` of the mean distance.
    """
    count = len(weight)
    total = math.fsum(weight)
    point = [w / total for w in weight]

    def distance(a: Sequence[float], b: Sequence[float]) -> float:
        way = [p - q for p, q in zip(a, b, strict=True)]
        return math.sqrt(max(product(gram, way, way), 0.0))

    inputs = [[float(i == j) for j in range(count)] for i in range(count)]
    for _ in range(max_iter):
        distances = [distance(point, x) for x in inputs]
        scale = math.fsum(w * d for w, d in zip(weight, distances, strict=True)) / total
        if not 0 < scale < math.inf:
            break
        near = [d <= 1e-12 * scale for d in distances]
        pulls = [0.0 if close else w / d for w, d, close in zip(weight, distances, near, strict=True)]
        pull = math.fsum(pulls)
        if pull == 0:
            break
        step = [p / pull for p in pulls]
        held = math.fsum(w for w, close in zip(weight, near, strict=True) if close)
        if held:
            # The input under y holds it back, and keeps it where the others do not pull harder.
            force = pull * distance(step, point)
            stay = min(1.0, held / force) if force > 0 else 1.0
            step = [(1 - stay) * s + stay * p for s, p in zip(step, point, strict=True)]
        moved = distance(step, point)
        point = step
        if moved <= tol * scale:
            break
    return point


def _reach(params: Params) -> Reach:
    return "pooled" if params["scope"] == "global" else "measured"


def _measure(params: Params, inputs: int, numels: Sequence[int]) -> Gram:
    return Gram(inputs, origin=0)


def _pick(params: Params, inputs: int) -> int | None:
    return sole(params["weight"])


def _check(params: Params, inputs: int) -> str | None:
    return "all weights are 0: give one input a weight" if not any(params["weight"]) else None


@method(
    Param("weight", "number", 1.0, "factor of the distance to this input", low=0, per_input=True),
    Param("scope", "choice", "tensor", "distances of one tensor, or of all together", choices=("tensor", "global")),
    Param("max_iter", "integer", 100, "steps at most", low=1),
    Param("tol", "number", 1e-9, "a step up to this share of the mean distance ends the search", low=0),
    reach=_reach,
    paper="Robust aggregation, IEEE TSP 2022, arXiv 1912.13445",
    measure=_measure,
    pick=_pick,
    check=_check,
)
def geometric_median(
    xs: Sequence[Tensor],
    weight: Sequence[float],
    scope: str,
    max_iter: int,
    tol: float,
    stat: Matrix | None = None,
) -> Tensor:
    """The geometric median: a mean that a few far-off inputs cannot carry away.

    out = argmin over y of sum_i w_i |y - x_i|, found by Weiszfeld's steps from the weighted mean.

    Takes one or more tensors of one shape and gives that shape, in the dtype of the arithmetic. The median is a
    combination of the inputs, with factors from the inner products of their differences, formed in double precision:
    one median for each tensor (`scope: tensor`, the default), or one set of factors for the whole model (`scope:
    global`, where the settings must be the same for all tensors). Of two inputs it is the one of larger weight, or
    their mean. An input that alone has a weight is copied bit for bit.

    Source: Pillutla, Kakade and Harchaoui, Robust aggregation for federated learning, IEEE Transactions on Signal
    Processing 2022, arXiv 1912.13445; Vardi and Zhang, The multivariate L1-median, PNAS 97, 2000.
    """
    assert stat is not None
    return weighted_sum(xs, weiszfeld(stat, weight, max_iter, tol))
