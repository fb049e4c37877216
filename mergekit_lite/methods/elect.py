"""Signs elected entry by entry, and the inputs that agree put together."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.compat import COMPAT
from mergekit_lite.methods.linear import sole, weighted_sum
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import Param, Params, Reach


class _SignPart:
    def __init__(self, weight: Sequence[float]):
        self.count = 0
        self._weight = weight

    def add(self, xs: Sequence[Tensor], start: int) -> bool:
        # A sum of ones is exact, in any order.
        self.count += int(weighted_sum(xs, self._weight).sign_().sum(dtype=torch.float64))
        return False


class SignMajority:
    """A `Measure`: the sign (-1, 0, 1) that more entries of sum_i w_i x_i have, over all tensors that share it."""

    def __init__(self, weight: Sequence[float]):
        self._weight = weight
        self._count = 0

    def part(self, tensor: int) -> _SignPart:
        return _SignPart(self._weight)

    def close(self, parts: Sequence[_SignPart | None]) -> bool:
        self._count = sum(part.count for part in parts if part is not None)
        return False

    def result(self, tensor: int) -> int:
        return (self._count > 0) - (self._count < 0)


def _reach(params: Params) -> Reach:
    if params["zero_sign"] != "majority":
        return "element"
    return "pooled" if params["scope"] == "global" else "measured"


def _measure(params: Params, inputs: int, numels: Sequence[int]) -> SignMajority:
    return SignMajority(params["weight"])


def _pick(params: Params, inputs: int) -> int | None:
    index = sole(params["weight"])
    if index is None:
        return None
    weight = params["weight"][index]
    if params["aggregate"] == "sum":
        return index if weight == 1 else None
    return index if weight > 0 or (params["compat"] and params["aggregate"] == "mean") else None


@method(
    Param("weight", "number", 1.0, "share of this input in the vote and in the mean or sum", per_input=True),
    Param("aggregate", "choice", "mean", "how agreeing entries are put together", choices=("mean", "sum", "max")),
    Param(
        "zero_sign",
        "choice",
        "positive",
        "the sign where the vote is a draw: that of most entries, plus, or none (result 0)",
        choices=("majority", "positive", "drop"),
    ),
    Param("scope", "choice", "tensor", "where `zero_sign: majority` counts", choices=("tensor", "global")),
    COMPAT,
    takes="delta",
    gives="delta",
    base="optional",
    reach=_reach,
    paper="TIES, NeurIPS 2023, arXiv 2306.01708",
    measure=_measure,
    pick=_pick,
)
def elect(
    xs: Sequence[Tensor],
    weight: Sequence[float],
    aggregate: str,
    zero_sign: str,
    scope: str,
    compat: bool,
    stat: int | None = None,
) -> Tensor:
    """Elect a sign for every entry and merge the deltas that agree with it: steps 2 and 3 of TIES.

    s = sgn(sum_i w_i x_i); over A = {i : w_i x_i is not 0 and has sign s}:

    - `aggregate: mean`: sum_A w_i x_i / sum_A |w_i|, 0 where A is empty,
    - `aggregate: sum`: sum_A w_i x_i,
    - `aggregate: max`: s max_A |x_i|.

    Where s is 0, `zero_sign` decides: `majority` takes the sign that more entries of this tensor (`scope: tensor`) or
    of all tensors of the step (`scope: global`) have been given, or none if that is a draw too; `positive` takes plus;
    `drop` leaves 0.

    Takes one or more deltas of one shape and gives that shape, in the dtype of the arithmetic. An input with weight 0
    takes no part; an input that is zero at an entry neither votes there nor dilutes the mean. A negative weight makes
    an input its opposite, with a positive one. `compat` divides by sum_A w_i, and not where that is 0, as mergekit
    does: negative weights may turn the mean round.

    Source: Yadav et al., TIES-Merging, NeurIPS 2023, arXiv 2306.01708.
    """
    sign = weighted_sum(xs, weight).sign_()
    fill = 1 if zero_sign == "positive" else stat or 0
    if fill:
        # -1, fill and 1 from -1, 0 and 1.
        sign.mul_(2).add_(fill).sign_()
    total: Tensor | None = None
    share: Tensor | None = None
    for x, w in zip(xs, weight, strict=True):
        if w == 0:
            continue
        # |x| where the sign is the elected one, 0 elsewhere; NaN stays.
        agreed = (x * sign).relu_() if w > 0 else (x * sign).neg_().relu_()
        size = abs(w)
        if aggregate == "max":
            total = agreed if total is None else torch.maximum(total, agreed)
            continue
        if aggregate == "mean":
            part = agreed.sign() if w == 1 else agreed.sign().mul_(w if compat else size)
            share = part if share is None else share.add_(part)
        part = agreed if size == 1 else agreed.mul_(size)
        total = part if total is None else total.add_(part)
    if total is None:
        return torch.zeros_like(sign)
    # Which of two zeros is the maximum is left open, so the sign of a zero is cleared.
    total.abs_()
    if share is not None:
        tiny = torch.finfo(share.dtype).tiny
        total.div_(share.masked_fill_(share == 0, 1) if compat else share.clamp_(min=tiny))
    return total.mul_(sign)
