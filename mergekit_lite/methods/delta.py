"""The two ways between whole models and deltas."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lite.lazy import Tensor
from mergekit_lite.methods.linear import weighted_sum
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import Param, Params


@method(
    inputs=(1, 1),
    takes="weight",
    gives="delta",
    base="required",
    paper="Task arithmetic, ICLR 2023, arXiv 2212.04089",
    plain=True,
)
def delta(xs: Sequence[Tensor]) -> Tensor:
    """What fine-tuning has changed: the model minus its base, a task vector.

    out = x - base.

    Takes a tensor and the base's tensor of the same shape and gives that shape, in the dtype of the arithmetic. The
    difference of two bfloat16 or float16 tensors is rounded once, in float32, never in their own dtype.

    Source: Ilharco et al., Editing models with task arithmetic, ICLR 2023, arXiv 2212.04089.
    """
    return xs[0] - xs[1]


def _pick(params: Params, inputs: int) -> int | None:
    return inputs - 1 if all(weight == 0 for weight in params["weight"]) else None


@method(
    Param("weight", "number", 1.0, "factor of this delta; negative ones take a skill away", per_input=True),
    takes="delta",
    gives="weight",
    base="required",
    paper="Task arithmetic, ICLR 2023, arXiv 2212.04089",
    pick=_pick,
    plain=True,
)
def add(xs: Sequence[Tensor], weight: Sequence[float]) -> Tensor:
    """Deltas added to a base: a whole model again.

    out = base + sum_i w_i d_i.

    Takes one or more deltas and the base's tensor, all of one shape, and gives that shape, in the dtype of the
    arithmetic. Where the sum of the deltas is zero the base's bits are returned, a negative zero included.

    Source: Ilharco et al., Editing models with task arithmetic, ICLR 2023, arXiv 2212.04089.
    """
    # base - (-sum): unlike an addition, subtracting +0.0 changes no number, and adding 0.0 turns -0.0 into +0.0.
    return xs[-1] - weighted_sum(xs[:-1], [-w for w in weight]).add_(0.0)
