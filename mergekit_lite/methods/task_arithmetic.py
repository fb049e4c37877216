"""The weighted sum of task vectors."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lite.methods.linear import linear
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import REQUIRED, Call, Param, Slot


@method(
    Param("weight", "number", 1.0, "factor of this model's delta; a negative one takes a skill away", per_input=True),
    Param("lambda", "number", REQUIRED, "factor of the sum of all deltas; 0.3 to 0.4 is usual"),
    takes="delta",
    gives="delta",
    base="required",
    composite=True,
    paper="Task arithmetic, ICLR 2023, arXiv 2212.04089",
)
def task_arithmetic(*deltas: Call | Slot, weight: Sequence[float], lambda_: float) -> Call:
    """Add the weighted sum of the models' changes to the base.

    out = base + lambda sum_t weight_t (x_t - base).

    Made of `delta`, `linear` and `add`. Takes one or more models fine-tuned from the base, of one shape, and gives that
    shape, in the dtype of the arithmetic. Entries that no model has changed are the base's bits. Negative weights take
    a skill away; 1, -1 and 1 make an analogy.

    Source: Ilharco et al., Editing models with task arithmetic, ICLR 2023, arXiv 2212.04089.
    """
    return linear(*deltas, weight=[w * lambda_ for w in weight], normalize=False)
