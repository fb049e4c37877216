"""Select the entries that differ, calculate the models' shares, erase minority signs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.compat import COMPAT, NO_ENERGY, NO_SHARE
from mergekit_lite.methods.derived import AnyMeasure, Derived, Staged, Sums
from mergekit_lite.methods.linear import weighted_sum
from mergekit_lite.methods.mask import masked
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.select import Bound, OrderStatistics, keep_count
from mergekit_lite.methods.sparsify import largest
from mergekit_lite.methods.spec import Block, Param, Params


def variance(xs: Sequence[Tensor]) -> Tensor:
    """The variance of every entry over the inputs, in double precision; exactly 0 where they are equal."""
    first = xs[0].to(torch.float64)
    apart = [x.to(torch.float64) - first for x in xs]
    shares = [1 / len(xs)] * len(xs)
    mean = weighted_sum(apart, shares)
    return weighted_sum([(x - mean).square_() for x in apart], shares)


def select(xs: Sequence[Tensor], bound: Bound | None, start: int) -> list[Tensor]:
    """The inputs, zero where their variance is below `bound` or 0; `start` is the flat index of the block."""
    if bound is None:
        return list(xs)
    mask = largest(variance(xs), bound, start) != 0
    return [masked(x, mask) for x in xs]


def _measure(params: Params, inputs: int, numels: Sequence[int]) -> Staged:
    """How many entries differ; then the variance of the last one selected; then the energies of what is selected. Of
    these only the last where everything is selected, only the first where `compat` selects nothing. With `compat` the
    energies are mean squares."""
    share: float = params["select_topk"]
    compat: bool = params["compat"]

    scale = 1 / max(1, sum(numels)) if compat else 1.0

    def energies(bound: Bound | None) -> Sums:
        def squares(tensor: int, xs: Sequence[Tensor], start: int) -> list[Tensor]:
            return [x.to(torch.float64).square().mul_(scale) for x in select(xs, bound, start)]

        return Sums(inputs, squares)

    def after(stages: Sequence[AnyMeasure]) -> AnyMeasure | None:
        found = stages[-1].result(0)
        if share >= 1 or len(stages) == 3:
            return None
        if len(stages) == 1:
            count = int(found[0])
            # There the count is a tensor, so that the product is one of float32.
            rank = int(torch.tensor(count) * share) if compat else max(1, keep_count(count, share))
            if not rank:
                return None
            return Derived([OrderStatistics([rank], numels)], lambda _, xs, start: [variance(xs)])
        return energies(found[0][0])

    return Staged(energies(None) if share >= 1 else Sums(1, lambda _, xs, start: [variance(xs) != 0]), after)


@method(
    Param(
        "select_topk",
        "number",
        1.0,
        "share of the entries that differ, those of largest variance, that is kept",
        0,
        1,
        open_low=True,
    ),
    COMPAT,
    takes="delta",
    gives="delta",
    base="required",
    reach="measured",
    paper="FuseChat, 2024, arXiv 2408.07990",
    measure=_measure,
    rounds=4,
    positioned=True,
)
def sce(
    xs: Sequence[Tensor], select_topk: float, compat: bool, block: Block, stat: tuple[Any, ...] | None = None
) -> Tensor:
    """Select the entries that differ most, weigh the models by their energy, erase minority signs.

    1. Select: of the entries whose variance over the d_t = x_t - base is not 0, the max(1, floor(select_topk n)) of
       largest variance; all other changes are dropped. A `select_topk` of 1 keeps everything.
    2. Calculate: w_t = |d_t|^2 / sum_s |d_s|^2, over the tensor.
    3. Erase: A is the set of t with d_t not 0 and of the sign of sum_t d_t, plus where that is 0.

    out = base + sum over A of w_t d_t / sum over A of w_t, entry by entry, and the base where A is empty.

    Takes one or more models fine-tuned from the base, of one shape, and gives that shape, in the dtype of the
    arithmetic; variances and energies are formed in double precision. Equal variances rank by index.

    Unlike mergekit: small changes keep their weights (there all are equal where the mean squares of the changes add up
    to less than 1e-6), the weights of A may add up to anything (there to 1e-6 at least), and at least one entry is
    selected. `compat` does as mergekit, whose count is rounded down from a product in float32.

    Source: Wan et al., FuseChat: Knowledge fusion of chat models, 2024, arXiv 2408.07990.
    """
    assert stat is not None
    if select_topk < 1 and len(stat) == 1:
        return torch.zeros_like(xs[0])
    deltas = select(xs, stat[1][0][0] if len(stat) > 1 else None, block.start)
    energy = math.fsum(stat[-1])
    alike = energy < NO_ENERGY if compat else not energy
    weights = [1 / len(xs) if alike else e / energy for e in stat[-1]]
    sign = weighted_sum(deltas, [1.0] * len(deltas)).sign_()
    sign.add_(1 - sign.abs())
    total, share = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta, weight in zip(deltas, weights, strict=True):
        agreed = (delta * sign).relu_()
        share.add_(agreed.sign().mul_(weight))
        total.add_(agreed.mul_(weight))
    return total.div_(share.clamp_(min=NO_SHARE if compat else torch.finfo(share.dtype).tiny)).mul_(sign)
