"""Both tails of every delta cut off."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lite.methods.compat import COMPAT
from mergekit_lite.methods.elect import elect
from mergekit_lite.methods.linear import linear
from mergekit_lite.methods.match_norm import MATCH, matched
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.sparsify import sparsify
from mergekit_lite.methods.spec import REQUIRED, Call, Param, Params, Slot
from mergekit_lite.methods.task_arithmetic import NORMALIZE, check_normalize, summed

DENSITY = Param(
    "density", "number", REQUIRED, "share of this model's delta that is kept", 0, 1, open_low=True, per_input=True
)
GAMMA = Param(
    "gamma", "number", 0.01, "share of the largest entries that is removed", 0, 1, open_high=True, per_input=True
)
LAMBDA = Param("lambda", "number", 0.3, "factor of the merged delta")
SCOPE = Param("scope", "choice", "tensor", "where magnitudes are ranked", choices=("tensor", "row", "global"))
FIRST = Param("remove_first", "flag", True, "remove outliers before, not after, the share kept is counted")
PAPER = "Model Breadcrumbs, ECCV 2024, arXiv 2312.06795"


def _check(params: Params, inputs: int) -> str | None:
    pairs = zip(params["gamma"], params["density"], strict=True)
    if not params["remove_first"] and any(gamma >= density for gamma, density in pairs):
        return "without `remove_first` the share kept is density - gamma, here nothing: lower `gamma`"
    if params["match_norm"] and params["scope"] == "global":
        return "`match_norm` compares the norms of single tensors, so it does not go with `scope: global`"
    return check_normalize(params, inputs) if "normalize" in params else None


def _remark(params: Params, inputs: int) -> str | None:
    pairs = zip(params["gamma"], params["density"], strict=True)
    if params["remove_first"] and any(gamma + density > 1 for gamma, density in pairs):
        return "density + gamma is above 1: fewer outliers are removed, so that the share kept is `density`"
    return None


def _middle(
    deltas: Sequence[Call | Slot],
    density: Sequence[float],
    gamma: Sequence[float],
    scope: str,
    remove_first: bool,
    match: bool,
    compat: bool,
) -> list[Call | Slot]:
    kept: list[Call | Slot] = [
        sparsify(d, density=share, keep="middle", gamma=cut, scope=scope, remove_first=remove_first, compat=compat)
        for d, share, cut in zip(deltas, density, gamma, strict=True)
    ]
    # Without `remove_first` outliers go even where the density is 1.
    return matched(kept, deltas, density if remove_first else [0.0] * len(kept), match)


@method(
    Param("weight", "number", 1.0, "factor of this model's delta", per_input=True),
    DENSITY,
    GAMMA,
    LAMBDA,
    SCOPE,
    FIRST,
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
def breadcrumbs(
    *deltas: Call | Slot,
    weight: Sequence[float],
    density: Sequence[float],
    gamma: Sequence[float],
    lambda_: float,
    scope: str,
    remove_first: bool,
    normalize: bool,
    match_norm: bool,
    compat: bool,
) -> Call:
    """Remove the largest and the smallest changes of every model, add the sum of the rest to the base.

    out = base + lambda sum_t weight_t m_t (x_t - base). Of n entries by descending magnitude the mask m_t skips
    floor(gamma_t n) and keeps the next floor(density_t n), at least one; where both cannot be had, fewer are skipped.
    With `match_norm` what is kept is scaled to the L1 norm that the delta had in this tensor, with `normalize` the sum
    is divided by sum_t weight_t.

    Made of `sparsify` with `keep: middle`, and `linear`. Takes one or more models fine-tuned from the base, of one
    shape, and gives that shape, in the dtype of the arithmetic. `scope` ranks within one tensor (the default, the
    paper's layer), within rows of the last axis (the published code), or over the whole model (then the settings must
    be the same for all tensors).

    `compat` counts as `sparsify` explains, and does not normalise weights that add up to 0; else these are an error.

    Two habits are in circulation: the paper keeps about a tenth (density 0.1, gamma 0.01), public tools nine tenths.

    Source: Davari and Belilovsky, Model Breadcrumbs, ECCV 2024, arXiv 2312.06795.
    """
    kept = _middle(deltas, density, gamma, scope, remove_first, match_norm, compat)
    return summed(kept, weight, lambda_, normalize, compat)


@method(
    Param("weight", "number", 1.0, "share of this model in the vote and in the mean or sum", per_input=True),
    DENSITY,
    GAMMA,
    LAMBDA,
    SCOPE,
    FIRST,
    Param("aggregate", "choice", "sum", "how agreeing entries are put together", choices=("mean", "sum", "max")),
    Param(
        "zero_sign",
        "choice",
        "auto",
        "the sign where the vote is a draw; auto: majority for global scope, positive otherwise",
        choices=("auto", "majority", "positive", "drop"),
    ),
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
def breadcrumbs_ties(
    *deltas: Call | Slot,
    weight: Sequence[float],
    density: Sequence[float],
    gamma: Sequence[float],
    lambda_: float,
    scope: str,
    remove_first: bool,
    aggregate: str,
    zero_sign: str,
    match_norm: bool,
    compat: bool,
) -> Call:
    """Remove the largest and the smallest changes of every model, then elect signs as TIES does.

    d_t = m_t (x_t - base) as in `breadcrumbs`; out = base + lambda elect(d_1, d_2, ...). A negative weight counts
    as the opposite delta with a positive one.

    Made of `sparsify` with `keep: middle`, and `elect`. Takes one or more models fine-tuned from the base, of one
    shape, and gives that shape, in the dtype of the arithmetic. `compat` counts as `sparsify` and divides as `elect`
    explain.

    Source: Davari and Belilovsky, Model Breadcrumbs, ECCV 2024, arXiv 2312.06795; Yadav et al., TIES-Merging,
    NeurIPS 2023, arXiv 2306.01708.
    """
    if zero_sign == "auto":
        zero_sign = "majority" if scope == "global" else "positive"
    kept = _middle(deltas, density, gamma, scope, remove_first, match_norm, compat)
    over = "global" if scope == "global" else "tensor"
    merged = elect(*kept, weight=weight, aggregate=aggregate, zero_sign=zero_sign, scope=over, compat=compat)
    return linear(merged, weight=lambda_, normalize=False)
