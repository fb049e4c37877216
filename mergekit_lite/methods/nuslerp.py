"""The arc between two models by weights, of whole models or of their changes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.compat import COMPAT, NO_PLACE
from mergekit_lite.methods.delta import add
from mergekit_lite.methods.gram import Gram, Matrix, fold, from_base
from mergekit_lite.methods.linear import sole
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import Param, Params, Reach

TINY = 1e-8  # a norm, or the sine of the angle, up to this gives no arc


def arc(t: float, norm_a: float, norm_b: float, inner: float, compat: bool) -> tuple[float, float]:
    """The factors of the two inputs at place `t` of their arc, from their norms and inner product."""
    if not (norm_a > TINY and norm_b > TINY):
        return (math.sin((1 - t) * math.pi / 2), math.sin(t * math.pi / 2)) if compat else (1 - t, t)
    cosine = inner / norm_a / norm_b
    # Not a number where an input holds inf or nan: the straight line is left.
    angle = math.acos(min(max(cosine, -1.0), 1.0)) if cosine == cosine else 0.0
    sine = math.sin(angle)
    if sine <= TINY:
        return 1 - t, t
    return math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine


def _reach(params: Params) -> Reach:
    reaches: dict[str, Reach] = {"tensor": "measured", "row": "row", "column": "matrix"}
    return reaches[params["mode"]]


def _measure(params: Params, inputs: int, numels: Sequence[int]) -> Gram:
    return Gram(inputs, origin=2 if inputs > 2 else None)


def _pick(params: Params, inputs: int) -> int | None:
    return sole(params["weight"])


def _check(params: Params, inputs: int) -> str | None:
    if sum(params["weight"]) == 0 and not params["compat"]:
        return "the weights add up to 0: there is no place between the inputs"
    return None


@method(
    Param("weight", "number", 1.0, "share of this input", per_input=True),
    Param(
        "mode",
        "choice",
        "tensor",
        "one angle a tensor, or one for each vector along the last axis (row) or the first (column)",
        choices=("tensor", "row", "column"),
    ),
    COMPAT,
    inputs=(2, 2),
    base="optional",
    reach=_reach,
    paper="Shoemake, SIGGRAPH 1985; mergekit, EMNLP 2024, arXiv 2403.13257",
    measure=_measure,
    pick=_pick,
    check=_check,
)
def nuslerp(
    xs: Sequence[Tensor], weight: Sequence[float], mode: str, compat: bool, stat: Matrix | None = None
) -> Tensor:
    """Spherical interpolation between two inputs by their weights, or of their changes from a base.

    out = sin((1 - t) W) / sin(W) a + sin(t W) / sin(W) b, with t = w_b / (w_a + w_b) and cos(W) = <a, b> / (|a| |b|).
    With a base, a and b are the changes from it, and the base is added to the result.

    Takes two tensors of one shape, and the base's where there is one, and gives that shape, in the dtype of the
    arithmetic; inner products are formed in double precision. The angle is that of the flattened tensors (`mode:
    tensor`), or each vector along the last axis (`row`) or along the first (`column`, which holds whole tensors in
    memory) has its own; a tensor of one axis is one vector. Where a norm or sin(W) is at most 1e-8 it is the straight
    line (1 - t) a + t b. An input that alone has a weight is copied bit for bit.

    Unlike mergekit: weights that add up to 0 are an error (there t is 0.5 then), and a zero vector is joined by the
    straight line, not as if it were orthogonal; `compat` does as mergekit. Its `nuslerp_flatten: false` is `mode: row`,
    and with `nuslerp_row_wise: true` it is `mode: column`.

    Source: Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985; Goddard et al., Arcee's MergeKit, EMNLP
    2024 (industry track), arXiv 2403.13257.
    """
    total = weight[0] + weight[1]
    t = 0.5 if compat and abs(total) < NO_PLACE else weight[1] / total
    if mode == "tensor":
        assert stat is not None
        factors = arc(t, math.sqrt(stat[0][0]), math.sqrt(stat[1][1]), stat[0][1], compat)
        return from_base(xs, factors)
    base = xs[2] if len(xs) > 2 else None
    a, b = (x if base is None else x - base for x in xs[:2])
    axis = 0 if mode == "column" else -1
    shape = a.shape
    if not shape:
        a, b = a.reshape(1), b.reshape(1)
    result = vectors(a.movedim(axis, -1), b.movedim(axis, -1), t, compat).movedim(-1, axis).reshape(shape)
    if base is not None:
        result = add.fn([result, base], [1.0])
    return result


def vectors(a: Tensor, b: Tensor, t: float, compat: bool) -> Tensor:
    """The place `t` on the arc of each pair of vectors along the last axis."""
    if not a.numel():
        return a.clone()
    wide_a, wide_b = a.to(torch.float64), b.to(torch.float64)
    norm_a, norm_b = (fold(x * x, 1).sqrt().flatten() for x in (wide_a, wide_b))
    inner = fold(wide_a * wide_b, 1).flatten()
    # One vector at a time in Python: a vectorised sine may differ in the last bit with the place of the vector.
    found = [arc(t, *row, compat) for row in zip(norm_a.tolist(), norm_b.tolist(), inner.tolist(), strict=True)]
    factors = torch.tensor(found, dtype=torch.float64).reshape(-1, 2).T.to(a)
    first, second = (f.reshape(*a.shape[:-1], 1) for f in factors)
    result: Tensor = (a * first).add_(b * second)
    return result
