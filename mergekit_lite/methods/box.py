"""Boxes around models: for every entry an interval, and its ends or its middle as a model."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import Param, Params


def hull(xs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The smallest and the largest of the tensors `xs`, of one shape, entry by entry; NaN where one is NaN."""
    lo, hi = xs[0], xs[0]
    for x in xs[1:]:
        lo, hi = torch.minimum(lo, x), torch.maximum(hi, x)
    return lo, hi


def intersection(xs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What the boxes lo_1, hi_1, lo_2, hi_2, ... of one shape have in common: its ends, and where it is empty (bool).
    There both ends are the middle of the gap."""
    lo, hi = hull(xs[::2])[1], hull(xs[1::2])[0]
    empty = lo > hi
    middle = centre(lo, hi)
    return torch.where(empty, middle, lo), torch.where(empty, middle, hi), empty


def centre(lo: Tensor, hi: Tensor) -> Tensor:
    """The middle of [lo, hi]; of ends that are one number that number."""
    return lo + (hi - lo) * 0.5


def _check(params: Params, inputs: int) -> str | None:
    if params["box"] == "intersection" and inputs % 2:
        return f"`box: intersection` takes the lower and the upper end of each box in turn, here are {inputs} inputs."
    if params["box"] == "hull" and params["give"] == "empty":
        return "the hull of models is never empty: `give: empty` goes with `box: intersection`."
    return None


@method(
    Param("box", "choice", "hull", "the box around models, or what boxes share", choices=("hull", "intersection")),
    Param("give", "choice", "centre", "what of it is given", choices=("centre", "lo", "hi", "empty")),
    check=_check,
    paper="HyperInterval, 2024, arXiv 2405.15444",
)
def box(xs: Sequence[Tensor], box: str, give: str) -> Tensor:
    """The box around models, or what several boxes have in common: its lower or upper end, or its middle.

    out = lo, hi or, with `give: centre`, lo + (hi - lo) / 2.

    - `box: hull`: lo = min_i x_i and hi = max_i x_i, entry by entry. Every convex combination of the models (a soup of
      any weights) lies in it.
    - `box: intersection`: the inputs are boxes, the ends lo_1, hi_1, lo_2, hi_2, ... in turn; lo = max_i lo_i and
      hi = min_i hi_i. Where that is empty, lo > hi, all of lo, hi and centre are the middle of the gap, and
      `give: empty` is 1 (elsewhere 0): `merge inspect --stats` of it counts them.

    Takes one or more tensors of one shape and gives that shape, in the dtype of the arithmetic. Saved in a narrower
    dtype the ends are rounded like any number; only with `dtype: float32` or wider does the box surely hold the models.
    `mergekit_lite.evaluate.interval` bounds what small networks in a box can give.

    Source: Krukowski et al., HyperInterval: Hypernetwork approach to training weight interval regions in continual
    learning, 2024, arXiv 2405.15444.
    """
    if box == "hull":
        lo, hi = hull(xs)
    else:
        lo, hi, empty = intersection(xs)
        if give == "empty":
            return empty.to(lo.dtype)
    if give == "centre":
        return centre(lo, hi)
    return (lo if give == "lo" else hi).clone()
