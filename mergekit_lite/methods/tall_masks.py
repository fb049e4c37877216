"""Which entries of a multi-task vector a task uses, and what several tasks use."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.linear import linear
from mergekit_lite.methods.mask import masked
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import REQUIRED, Call, Param, Params, Slot
from mergekit_lite.methods.ties import ties

PAPER = "TALL-masks, ICML 2024, arXiv 2405.07813"
THRESHOLD = "how large the task's own change must be beside what the other tasks add; lambda in the paper, 0.2 to 0.6"


@method(
    Param("threshold", "number", 0.4, THRESHOLD, low=0),
    Param("output", "choice", "task", "the task's entries of the multi-task vector, or ones", choices=("task", "mask")),
    takes="delta",
    gives="delta",
    base="optional",
    inputs=(2, 2),
    paper=PAPER,
)
def tall_masks(xs: Sequence[Tensor], threshold: float, output: str) -> Tensor:
    """Take from a multi-task vector the entries that one task uses: a model for this task.

    out = base + m d, with m = 1 where |d_t| > threshold |d - d_t|, else 0; d_t is the change of the task's model (first
    input), d that of the multi-task model (second input), such as the sum of all tasks' changes.

    Takes two deltas, or whole models and their base, of one shape, and gives that shape, in the dtype of the
    arithmetic. `output: mask` gives m itself, as numbers. An entry that no task has changed is outside every mask. One
    step and one save for each task give a model for each: all of them need the base, d, and one bit an entry and task.

    Source: Wang et al., Localizing task information for improved model merging and compression, ICML 2024, arXiv
    2405.07813.
    """
    task, multi = xs
    used = task.abs() > (multi - task).abs_().mul_(threshold)
    return used.to(task) if output == "mask" else masked(multi, used)


@method(
    Param("k", "integer", 2, "how many tasks must use an entry", low=0),
    takes="delta",
    gives="delta",
    base="optional",
    paper=PAPER,
)
def keep_shared(xs: Sequence[Tensor], k: int) -> Tensor:
    """Keep the entries of a delta that enough masks have: the last part of `consensus`.

    out = M x, with M = 1 where at least `k` of the masks are not 0, else 0; x is the first input, the masks are the
    others.

    Takes a delta and any number of masks, as `tall_masks` with `output: mask` gives them, of one shape, and gives that
    shape, in the dtype of the arithmetic. `k: 0` keeps everything.

    Source: Wang et al., Localizing task information for improved model merging and compression, ICML 2024, arXiv
    2405.07813.
    """
    count = torch.zeros_like(xs[0])
    for mask in xs[1:]:
        count.add_(mask != 0)
    return masked(xs[0], count >= k)


@method(takes="delta", gives="delta", inputs=(1, 1), grain=8, public=False)
def mask_bits(xs: Sequence[Tensor]) -> Tensor:
    """A mask whose blocks begin where a byte of eight entries does: what a mask store keeps."""
    return xs[0].clone()


def _remark(params: Params, inputs: int) -> str | None:
    if params["k"] > inputs:
        return f"no entry is used by {params['k']} of {inputs} tasks: the result is the base"
    if params["k"] == inputs > 1:
        return f"`k: {inputs}` keeps only what all {inputs} tasks use, which is usually too little"
    return None


@method(
    Param("k", "integer", 2, "how many tasks must use an entry: 1 drops what none uses, 2 also what only one does", 0),
    Param("threshold", "number", 0.4, THRESHOLD, low=0, per_input=True),
    Param("lambda", "number", REQUIRED, "factor of the merged delta; 0.1 to 1 is usual"),
    Param("multi_task", "choice", "sum", "how the multi-task vector is made", choices=("sum", "ties")),
    Param("density", "number", 0.2, "for `multi_task: ties`: share of each delta kept", 0, 1, open_low=True),
    Param("scope", "choice", "global", "for `multi_task: ties`: where it ranks", choices=("tensor", "global")),
    takes="delta",
    gives="delta",
    base="required",
    composite=True,
    paper=PAPER,
    remark=_remark,
)
def consensus(
    *deltas: Call | Slot,
    k: int,
    threshold: Sequence[float],
    lambda_: float,
    multi_task: str,
    density: float,
    scope: str,
) -> Call:
    """Keep of the multi-task vector what at least `k` tasks use: Consensus merging.

    out = base + lambda M d, with M = 1 where at least `k` of the masks m_t are 1, else 0, and m_t = 1 where
    |d_t| > threshold_t |d - d_t|, else 0; d_t = x_t - base and d = sum_t d_t, or what `ties` with `aggregate: sum`
    makes of them, by default with `scope: global`.

    Made of `linear` or `ties`, `tall_masks` and `keep_shared`. Takes one or more models fine-tuned from the base, of
    one shape, and gives that shape, in the dtype of the arithmetic. With `k: 0` it is task arithmetic (or TIES); with
    as many as there are tasks only what all of them use is left, which is usually too little, for two tasks as well.

    Source: Wang et al., Localizing task information for improved model merging and compression, ICML 2024, arXiv
    2405.07813.
    """
    if multi_task == "ties":
        multi = ties(*deltas, density=density, scope=scope, aggregate="sum")
        scaled = linear(multi, weight=lambda_, normalize=False)
    else:
        multi = linear(*deltas, normalize=False)
        # The factor goes to each delta, as in task arithmetic, so that what is kept has the same bits.
        scaled = linear(*deltas, weight=[lambda_] * len(deltas), normalize=False)
    masks = [tall_masks(d, multi, threshold=t, output="mask") for d, t in zip(deltas, threshold, strict=True)]
    return keep_shared(scaled, *masks, k=k)
