"""Models balanced entry by entry: against themselves and against one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.derived import AnyMeasure, Derived, Staged
from mergekit_lite.methods.linear import weighted_sum
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.select import OrderStatistics
from mergekit_lite.methods.spec import Param, Params, Reach

TAIL = 1e-4  # share of the entries at either end whose magnitudes are drawn in to those next to them

Range = tuple[float, float]


def scores(xs: Sequence[Tensor], ranges: Sequence[Range]) -> list[Tensor]:
    """How much every entry of every delta counts before the lowest are dropped; `ranges` are the smallest and the
    largest magnitude of each delta, tails drawn in. Entries that pull against the sum of all deltas have 0."""
    together = weighted_sum(xs, [1.0] * len(xs))
    found = []
    for x, (low, high) in zip(xs, ranges, strict=True):
        salience = x.abs().clamp_(low, high).sub_(low)
        if high > low:
            salience.div_(high - low)
        agreement = (x * together).tanh_().relu_()
        found.append(salience.square_().mul_(len(xs)).exp_().mul_(agreement))
    return found


def _reach(params: Params) -> Reach:
    return "pooled" if params["scope"] == "global" else "measured"


def ranges_of(stat: tuple[Any, ...]) -> list[Range]:
    """The ranges of the deltas' magnitudes that the first stage of the measure has found."""
    return [(low, high) for (high, _), (low, _) in stat[0]]


def _measure(params: Params, inputs: int, numels: Sequence[int]) -> Staged:
    """The magnitudes that the tails are drawn in to, then the scores that are the last dropped and the largest."""
    numel = max(sum(numels), 1)
    tail = max(1, numel - int(numel * (1 - TAIL)) + 1)
    dropped = int(numel * (1 - params["ratio"]))

    def ranks(*wanted: int) -> list[OrderStatistics]:
        return [OrderStatistics([min(rank, numel) for rank in wanted], numels, ties=False) for _ in range(inputs)]

    def after(stages: Sequence[AnyMeasure]) -> AnyMeasure | None:
        if len(stages) == 2:
            return None
        ranges = ranges_of((stages[0].result(0),))
        return Derived(ranks(1, numel - dropped), lambda _, xs, start: scores(xs, ranges))

    return Staged(Derived(ranks(tail, numel - int(numel * TAIL)), lambda _, xs, start: xs), after)


@method(
    Param("ratio", "number", 0.1, "share of the entries of each model that counts", 0, 1, open_low=True),
    Param("lambda", "number", 1.0, "factor of the merged delta"),
    Param("scope", "choice", "global", "where entries are ranked", choices=("tensor", "global")),
    takes="delta",
    gives="delta",
    base="required",
    reach=_reach,
    paper="PCB-Merging, NeurIPS 2024, arXiv 2410.02396",
    measure=_measure,
    rounds=2,
)
def pcb(xs: Sequence[Tensor], ratio: float, lambda_: float, scope: str, stat: tuple[Any, ...] | None = None) -> Tensor:
    """Weigh every entry by its size in its model and its agreement with the others, drop the least: PCB-Merging.

    out = base + lambda sum_t s_t d_t / sum_t s_t, with d_t = x_t - base and, of T models,

        b_t = exp(T norm(|d_t|)^2) tanh(d_t sum_u d_u),    s_t = norm(max(b_t, c_t)),

    where norm(v) = (v - min v) / (max v - min v) and c_t is the floor((1 - ratio) n)-th of the b_t in rising order, so
    that a share of `ratio` of each model's entries counts. The ten-thousandth part of the magnitudes at either end is
    drawn in to the next one.

    Takes one or more models fine-tuned from the base, of one shape, and gives that shape, in the dtype of the
    arithmetic. All ranks and extremes are exact, over the whole model (`scope: global`, the default, as in the paper;
    the settings must be the same for all tensors then) or over one tensor. Where all scores are equal, all count the
    same.

    Unlike the published code: an entry that pulls against the sum of all models never counts.

    Source: Du et al., Parameter competition balancing for model merging, NeurIPS 2024, arXiv 2410.02396.
    """
    assert stat is not None
    total = torch.zeros_like(xs[0])
    share = torch.zeros_like(xs[0])
    ranges = ranges_of(stat)
    for x, score, bounds, (low, high) in zip(xs, scores(xs, ranges), stat[1], ranges, strict=True):
        (top, _), (floor, _) = bounds
        scale = score.clamp_(min=floor).sub_(floor).div_(top - floor) if top > floor else (score > 0).to(score)
        total.add_(x.sign().mul_(x.abs().clamp_(low, high)).mul_(scale))
        share.add_(scale)
    return total.div_(share.clamp_(min=torch.finfo(share.dtype).tiny)).mul_(lambda_)
