"""The important changes of a model, and another model elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.derived import Derived
from mergekit_lite.methods.gram import fold
from mergekit_lite.methods.measure import Part
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.select import OrderStatistics
from mergekit_lite.methods.spec import Call, Params, Slot

PAPER = "mergekit, EMNLP 2024, arXiv 2403.13257"


@method(inputs=(2, 2), reach="row", paper=PAPER)
def importance(xs: Sequence[Tensor]) -> Tensor:
    """How much every entry's change matters: its size times how far it moves the distribution of its row.

    out = |b - a| KL(softmax(b) || softmax(a)), the divergence being that of the row, along the last axis.

    Takes two tensors of one shape and gives that shape, in the dtype of the arithmetic, every entry at least 0; the
    divergence is formed in double precision. A row of one entry has importance 0.

    Source: Goddard et al., Arcee's MergeKit, EMNLP 2024 (industry track), arXiv 2403.13257 (arcee_fusion).
    """
    a, b = (x.to(torch.float64) for x in xs)
    p, q = b.log_softmax(dim=1), a.log_softmax(dim=1)
    divergence = fold(b.softmax(dim=1).mul_(p - q), 1).clamp_(min=0)
    return (xs[1] - xs[0]).abs_().mul_(divergence.to(xs[0]))


class Fence:
    """A `Measure`: the median plus one and a half interquartile ranges of the third input, which is at least 0.

    A quartile is the entry of index floor(q (n - 1)) in ascending order: the lower one where it lies between two.
    """

    def __init__(self, numels: Sequence[int]):
        last = max(sum(numels) - 1, 0)
        # Ranks count from the largest entry.
        ranks = [last - last * quarter // 4 + 1 for quarter in (1, 2, 3)]
        self._statistics = Derived([OrderStatistics(ranks, numels, ties=False)], lambda _, xs, start: xs[2:3])

    def part(self, tensor: int) -> Part | None:
        return self._statistics.part(tensor)

    def close(self, parts: Sequence[Any]) -> bool:
        return self._statistics.close(parts)

    def result(self, tensor: int) -> float:
        ((first, _), (median, _), (third, _)) = self._statistics.result(tensor)[0]
        fence: float = median + 1.5 * (third - first)
        return fence


def _measure(params: Params, inputs: int, numels: Sequence[int]) -> Fence:
    return Fence(numels)


@method(inputs=(3, 3), reach="measured", paper=PAPER, measure=_measure)
def take_important(xs: Sequence[Tensor], stat: float | None = None) -> Tensor:
    """Take the second input where the third is large, the first elsewhere: the second half of `arcee_fusion`.

    out = b where s >= median(s) + 1.5 (Q3(s) - Q1(s)), else a; a, b and s are the inputs.

    Takes three tensors of one shape, s not negative (`importance`), and gives that shape, each entry's bits being those
    of a or b. The quartiles Q1 and Q3 and the median are exact, over one tensor: the entry of index floor(q (n - 1)) in
    ascending order, for q = 1/4, 1/2, 3/4.

    Source: Goddard et al., Arcee's MergeKit, EMNLP 2024 (industry track), arXiv 2403.13257 (arcee_fusion).
    """
    assert stat is not None
    return torch.where(xs[2] >= stat, xs[1], xs[0])


@method(inputs=(2, 2), composite=True, paper=PAPER)
def arcee_fusion(a: Call | Slot, b: Call | Slot) -> Call:
    """Take from the second model the entries whose change is important, from the first all others.

    out = b where s >= median(s) + 1.5 (Q3(s) - Q1(s)), else a, with s = |b - a| KL(softmax(b) || softmax(a)), the
    divergence being that of the entry's row (the last axis), median and quartiles those of the tensor.

    Made of `importance` and `take_important`. Takes the model to keep and the model to take from, in this order, of one
    shape, and gives that shape, each entry's bits being those of one of them. A quartile between two entries is the
    lower one.

    Unlike mergekit: quartiles are exact for tensors of any size (there those of a random sample above a million
    entries), and the divergence is formed in double precision. There it is a sum in float32 that cancels where changes
    are small: of weights near 0.02, changed by 1e-3, 3 in 100 entries come from the other model, and none where that
    sum is formed in double precision too. Its `base_model` is the first input here.

    Source: Goddard et al., Arcee's MergeKit, EMNLP 2024 (industry track), arXiv 2403.13257.
    """
    return take_important(a, b, importance(a, b))
