"""A task's model from the unified vector of all tasks: elect, mask, rescale."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lite.lazy import Tensor
from mergekit_lite.methods.derived import Sums
from mergekit_lite.methods.mask import masked
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import Param, Params, Reach


def agreeing(task: Tensor, unified: Tensor) -> Tensor:
    """The entries of the unified vector that have the sign of the task's own change."""
    return masked(unified, task.sign() * unified.sign() > 0)


def _reach(params: Params) -> Reach:
    return "pooled" if params["scope"] == "global" else "measured"


def _measure(params: Params, inputs: int, numels: Sequence[int]) -> Sums:
    return Sums(2, lambda _, xs, start: [xs[0].abs(), agreeing(xs[0], xs[1]).abs()])


@method(
    Param("scope", "choice", "global", "one factor for the whole model, or one a tensor", choices=("tensor", "global")),
    takes="delta",
    gives="delta",
    base="optional",
    inputs=(2, 2),
    reach=_reach,
    paper="EMR-Merging, NeurIPS 2024, arXiv 2405.17461",
    measure=_measure,
)
def emr(xs: Sequence[Tensor], scope: str, stat: tuple[float, float] | None = None) -> Tensor:
    """Mask and rescale a unified vector for one task: the second half of EMR-Merging.

    out = base + s m d, with m = 1 where d_t d > 0, else 0, and s = sum |d_t| / sum |m d|; d_t is the change of the
    task's model (first input), d the unified change (second input).

    The first half is `elect` with `aggregate: max`, which gives d: for every entry the largest of the changes that have
    the elected sign. Takes two deltas, or whole models and their base, of one shape, and gives that shape, in the dtype
    of the arithmetic. The sums run over the whole model (`scope: global`, the default) or one tensor, in double
    precision; where m d is 0 everywhere the base comes out. One step and one save for each task give a model for each:
    all of them need the base, d, and one bit an entry and a number for each task.

    Unlike the published code, which averages within tensors before it adds them up, every entry counts the same.

    Source: Huang et al., EMR-Merging: Tuning-free high-performance model merging, NeurIPS 2024, arXiv 2405.17461.
    """
    assert stat is not None
    own, kept = stat
    return agreeing(xs[0], xs[1]).mul_(own / kept if kept else 0.0)
