"""The arc between two models."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.compat import COMPAT
from mergekit_lite.methods.gram import Gram, Matrix, fold
from mergekit_lite.methods.interpolate import pick_end, remark_outside
from mergekit_lite.methods.linear import weighted_sum
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import REQUIRED, Param, Params, Reach

TINY = 1e-8  # a norm up to this has no direction
PARALLEL = 0.9995  # |cos| above this: the arc is a line, or not defined


def shares(t: float, cosine: float) -> tuple[float, float]:
    """The factors of the two inputs at place `t` of the arc whose ends have this cosine."""
    if abs(cosine) > PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _reach(params: Params) -> Reach:
    return "row" if params["mode"] == "row" else "measured"


def _measure(params: Params, inputs: int, numels: Sequence[int]) -> Gram:
    return Gram(inputs)


@method(
    Param("t", "number", REQUIRED, "place on the arc from the first input (0) to the second (1)"),
    Param("mode", "choice", "tensor", "one angle a tensor, or one for each row (axis 0)", choices=("tensor", "row")),
    COMPAT,
    inputs=(2, 2),
    reach=_reach,
    row_axis="first",
    paper="Shoemake, SIGGRAPH 1985",
    measure=_measure,
    pick=pick_end,
    remark=remark_outside,
)
def slerp(xs: Sequence[Tensor], t: float, mode: str, compat: bool, stat: Matrix | None = None) -> Tensor:
    """Spherical interpolation between two inputs, along the arc instead of the straight line.

    out = sin((1 - t) W) / sin(W) a + sin(t W) / sin(W) b, with cos(W) = <a, b> / (|a| |b|) of the flattened tensors
    (`mode: tensor`) or of each index of axis 0 (`mode: row`).

    Takes two tensors of one shape and gives that shape, in the dtype of the arithmetic; inner products are formed in
    double precision. The inputs are not normalised, so the norm of the result need not lie between theirs. Where a norm
    is at most 1e-8, or |cos(W)| is above 0.9995 (opposite directions too), it is the straight line (1 - t) a + t b; so
    it always is with one element. With `compat` an input of such a norm counts as orthogonal to the other, as in
    mergekit: a and b get the factors cos(t pi/2) and sin(t pi/2). t = 0 and t = 1 copy an input bit for bit; t outside
    [0, 1] goes on along the arc, with a warning.

    Source: Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985.
    """
    if mode == "row":
        return _rows(xs[0], xs[1], t, compat)
    assert stat is not None
    norm_a, norm_b = math.sqrt(stat[0][0]), math.sqrt(stat[1][1])
    if not (norm_a > TINY and norm_b > TINY):
        return weighted_sum(xs, shares(t, 0.0) if compat else (1 - t, t))
    # Like the norms, the cosine is not defined where an input holds inf or nan, and the straight line is left.
    cosine = stat[0][1] / norm_a / norm_b
    return weighted_sum(xs, shares(t, cosine) if cosine == cosine else (1 - t, t))


def _rows(a: Tensor, b: Tensor, t: float, compat: bool) -> Tensor:
    wide_a, wide_b = a.to(torch.float64), b.to(torch.float64)
    norm_a, norm_b = (fold(x * x, 1).squeeze(1).sqrt() for x in (wide_a, wide_b))
    cosine = fold(wide_a * wide_b, 1).squeeze(1) / norm_a / norm_b
    small = (norm_a <= TINY) | (norm_b <= TINY)
    if compat:
        cosine[small] = 0.0
    curved = (cosine.abs() <= PARALLEL) & (~small | compat)
    factors = torch.tensor([[1 - t], [t]], dtype=torch.float64).repeat(1, len(a))
    rows = curved.nonzero().squeeze(1).cpu()
    if len(rows):
        # One row at a time in Python: a vectorised sine may differ in the last bit with the place of the row.
        factors[:, rows] = torch.tensor([shares(t, c) for c in cosine[curved].tolist()], dtype=torch.float64).T
    first, second = factors.to(a).unsqueeze(2)
    result: Tensor = (a * first).add_(b * second)
    return result
