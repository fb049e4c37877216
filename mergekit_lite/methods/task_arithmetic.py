"""The weighted sum of task vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergekit_lite.methods.compat import COMPAT, NO_SUM
from mergekit_lite.methods.linear import linear
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import REQUIRED, Call, Param, Params, Slot

NORMALIZE = Param("normalize", "flag", False, "divide the weights by their sum")


def check_normalize(params: Params, inputs: int) -> str | None:
    """What is wrong where weights are normalised that add up to 0."""
    if params["normalize"] and not params["compat"] and math.fsum(params["weight"]) == 0:
        return "the weights add up to 0, so they cannot be normalised: change them, or set `normalize: false`"
    return None


def summed(
    deltas: Sequence[Call | Slot], weight: Sequence[float], factor: float, normalize: bool, compat: bool
) -> Call:
    """The weighted sum, or mean, of deltas times `factor`; with `compat` the sum where the weights add up to 0."""
    total = math.fsum(weight) if normalize else 1.0
    if compat and abs(total) < NO_SUM:
        total = 1.0
    return linear(*deltas, weight=[w * factor / total for w in weight], normalize=False)


@method(
    Param("weight", "number", 1.0, "factor of this model's delta; a negative one takes a skill away", per_input=True),
    Param("lambda", "number", REQUIRED, "factor of the sum of all deltas; 0.3 to 0.4 is usual"),
    NORMALIZE,
    COMPAT,
    takes="delta",
    gives="delta",
    base="required",
    composite=True,
    paper="Task arithmetic, ICLR 2023, arXiv 2212.04089",
    check=check_normalize,
)
def task_arithmetic(
    *deltas: Call | Slot, weight: Sequence[float], lambda_: float, normalize: bool, compat: bool
) -> Call:
    """Add the weighted sum of the models' changes to the base.

    out = base + lambda sum_t weight_t (x_t - base), with `normalize` divided by sum_t weight_t.

    Made of `delta`, `linear` and `add`. Takes one or more models fine-tuned from the base, of one shape, and gives that
    shape, in the dtype of the arithmetic. Entries that no model has changed are the base's bits. Negative weights take
    a skill away; 1, -1 and 1 make an analogy. With `compat`, weights that add up to 0 are not normalised; else that is
    an error.

    Source: Ilharco et al., Editing models with task arithmetic, ICLR 2023, arXiv 2212.04089.
    """
    return summed(deltas, weight, lambda_, normalize, compat)
