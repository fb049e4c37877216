"""Drop at random, rescale, merge."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lite.methods.compat import COMPAT
from mergekit_lite.methods.elect import elect
from mergekit_lite.methods.linear import linear
from mergekit_lite.methods.match_norm import MATCH, matched
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.sparsify import sparsify
from mergekit_lite.methods.spec import Call, Param, Params, Slot
from mergekit_lite.methods.task_arithmetic import NORMALIZE, check_normalize, summed

DROP = Param(
    "drop_rate", "number", 0.9, "share of this model's delta that is dropped", 0, 1, open_high=True, per_input=True
)
RESCALE = Param("rescale", "flag", True, "divide what is kept by 1 - drop_rate, so that the mean stays")
LAMBDA = Param("lambda", "number", 1.0, "factor of the merged delta")
VOTE = Param("weight", "number", 1.0, "share of this model in the vote and in the mean or sum", per_input=True)
AGGREGATE = Param(
    "aggregate", "choice", "mean", "how agreeing entries are put together", choices=("mean", "sum", "max")
)
ZERO_SIGN = Param(
    "zero_sign",
    "choice",
    "positive",
    "the sign where the vote is a draw: that of most entries of the tensor, plus, or none (result 0)",
    choices=("majority", "positive", "drop"),
)
PAPER = "DARE, ICML 2024, arXiv 2311.03099"


def _remark(params: Params, inputs: int) -> str | None:
    if max(params["drop_rate"]) > 0.99:
        return "a drop rate above 0.99 is safe only where fine-tuning has changed the weights very little (about 0.002)"
    return None


def _check(params: Params, inputs: int) -> str | None:
    if params["rescale"] and params["match_norm"]:
        return "`rescale` and `match_norm` both scale what is kept: set `rescale: false`"
    return check_normalize(params, inputs) if "normalize" in params else None


def _dropped(
    deltas: Sequence[Call | Slot], drop_rate: Sequence[float], rescale: bool, match: bool
) -> list[Call | Slot]:
    density = [1 - rate for rate in drop_rate]
    kept: list[Call | Slot] = [
        sparsify(d, density=share, keep="random", rescale=rescale) for d, share in zip(deltas, density, strict=True)
    ]
    return matched(kept, deltas, density, match)


@method(
    Param("weight", "number", 1.0, "factor of this model's delta", per_input=True),
    DROP,
    RESCALE,
    LAMBDA,
    NORMALIZE,
    MATCH,
    COMPAT,
    takes="delta",
    gives="delta",
    base="required",
    composite=True,
    paper=PAPER,
    check=_check,
    remark=_remark,
)
def dare_linear(
    *deltas: Call | Slot,
    weight: Sequence[float],
    drop_rate: Sequence[float],
    rescale: bool,
    lambda_: float,
    normalize: bool,
    match_norm: bool,
    compat: bool,
) -> Call:
    """Drop most of every model's changes at random, rescale the rest, add their weighted sum to the base.

    out = base + lambda sum_t weight_t m_t (x_t - base) / (1 - drop_rate_t), where every entry of the mask m_t is 1 with
    probability 1 - drop_rate_t and 0 otherwise. Without `rescale` the division is left out; with `match_norm` in its
    place, what is kept is scaled to the L1 norm that the delta had in this tensor, as public tools do. With `normalize`
    the sum is divided by sum_t weight_t.

    Made of `sparsify` with `keep: random`, and `linear`. Takes one or more models fine-tuned from the base, of one
    shape, and gives that shape, in the dtype of the arithmetic. A drop rate of 0 changes nothing. One-element tensors
    are dropped like any entry; to spare small tensors give `drop_rate` by name: `{"*.bias": 0, else: 0.9}`.

    High rates need small deltas: about 0.002 and less after fine-tuning, not those of further pre-training.

    Source: Yu et al., Language models are Super Mario (DARE), ICML 2024, arXiv 2311.03099.
    """
    return summed(_dropped(deltas, drop_rate, rescale, match_norm), weight, lambda_, normalize, compat)


@method(
    VOTE,
    DROP,
    RESCALE,
    AGGREGATE,
    ZERO_SIGN,
    LAMBDA,
    MATCH,
    COMPAT,
    takes="delta",
    gives="delta",
    base="required",
    composite=True,
    paper=PAPER,
    check=_check,
    remark=_remark,
)
def dare_ties(
    *deltas: Call | Slot,
    weight: Sequence[float],
    drop_rate: Sequence[float],
    rescale: bool,
    aggregate: str,
    zero_sign: str,
    lambda_: float,
    match_norm: bool,
    compat: bool,
) -> Call:
    """Drop most of every model's changes at random, rescale the rest, then elect signs as TIES does.

    d_t = m_t (x_t - base) / (1 - drop_rate_t) as in `dare_linear`; out = base + lambda elect(d_1, d_2, ...). A negative
    weight counts as the opposite delta with a positive one.

    Made of `sparsify` with `keep: random`, and `elect`. Takes one or more models fine-tuned from the base, of one
    shape, and gives that shape, in the dtype of the arithmetic. A drop rate of 0 leaves sign election without trimming.

    Source: Yu et al., Language models are Super Mario (DARE), ICML 2024, arXiv 2311.03099; Yadav et al., TIES-Merging,
    NeurIPS 2023, arXiv 2306.01708.
    """
    dropped = _dropped(deltas, drop_rate, rescale, match_norm)
    merged = elect(*dropped, weight=weight, aggregate=aggregate, zero_sign=zero_sign, scope="tensor", compat=compat)
    return linear(merged, weight=lambda_, normalize=False)
