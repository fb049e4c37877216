"""For every entry the model that has changed it most."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import Param


@method(
    Param("lambda", "number", 0.5, "factor of the merged delta"),
    takes="delta",
    gives="delta",
    base="required",
    paper="MagMax, ECCV 2024, arXiv 2407.06322",
)
def magmax(xs: Sequence[Tensor], lambda_: float) -> Tensor:
    """Take every entry's change from the model that has changed it most.

    out = base + lambda d_m, with d_t = x_t - base and, entry by entry, m = argmax_t |d_t|.

    Takes one or more models fine-tuned from the base, of one shape, and gives that shape, in the dtype of the
    arithmetic. Of equal magnitudes the first input's counts.

    Source: Marczak et al., MagMax: Leveraging model merging for seamless continual learning, ECCV 2024, arXiv
    2407.06322 (lambda 0.5).
    """
    largest = xs[0]
    for x in xs[1:]:
        largest = torch.where((x.abs() > largest.abs()) | x.isnan(), x, largest)
    return largest * lambda_
