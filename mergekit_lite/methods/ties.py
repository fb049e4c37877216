"""Trim, elect, merge."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lite.methods.compat import COMPAT
from mergekit_lite.methods.elect import elect
from mergekit_lite.methods.linear import linear
from mergekit_lite.methods.match_norm import MATCH, matched
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.sparsify import sparsify
from mergekit_lite.methods.spec import Call, Param, Params, Slot


def _check(params: Params, inputs: int) -> str | None:
    if params["match_norm"] and params["scope"] == "global":
        return "`match_norm` compares the norms of single tensors, so it does not go with `scope: global`"
    return None


@method(
    Param("weight", "number", 1.0, "share of this model in the vote and in the mean or sum", per_input=True),
    Param("density", "number", 0.2, "share of this model's delta that is kept", 0, 1, open_low=True, per_input=True),
    Param("lambda", "number", 1.0, "factor of the merged delta"),
    Param("scope", "choice", "global", "where magnitudes are ranked", choices=("tensor", "global")),
    Param("aggregate", "choice", "mean", "how agreeing entries are put together", choices=("mean", "sum", "max")),
    Param(
        "zero_sign",
        "choice",
        "auto",
        "the sign where the vote is a draw; auto: majority for global scope, positive for tensor scope",
        choices=("auto", "majority", "positive", "drop"),
    ),
    Param("select", "choice", "exact", "`threshold` keeps equal magnitudes together", choices=("exact", "threshold")),
    MATCH,
    COMPAT,
    takes="delta",
    gives="delta",
    base="required",
    composite=True,
    paper="TIES, NeurIPS 2023, arXiv 2306.01708",
    check=_check,
)
def ties(
    *deltas: Call | Slot,
    weight: Sequence[float],
    density: Sequence[float],
    lambda_: float,
    scope: str,
    aggregate: str,
    zero_sign: str,
    select: str,
    match_norm: bool,
    compat: bool,
) -> Call:
    """Keep the largest changes of every model, elect a sign for each entry, merge the models that agree.

    1. Trim: of each delta the largest magnitudes, a share of `density` of the whole model (`scope: global`, the
       default, as in the paper) or of each tensor: `sparsify` with `keep: largest`.
       With `match_norm` what is left is scaled to the L1 norm that the delta had in this tensor.
    2. Elect and merge: `elect`, with the sign s = sgn(sum_t weight_t d_t) and the mean, sum or maximum of the d_t that
       have this sign. A negative weight counts as the opposite delta with a positive one.
    3. out = base + lambda merged.

    Takes one or more models fine-tuned from the base, of one shape, and gives that shape, in the dtype of the
    arithmetic. With global scope the settings must be the same for all tensors; the magnitudes of all tensors are
    ranked together, exactly, in a pass of its own over the inputs. `compat` counts as `sparsify` and divides as `elect`
    explain.

    Source: Yadav et al., TIES-Merging, NeurIPS 2023, arXiv 2306.01708 (density 0.2, lambda 1).
    """
    if zero_sign == "auto":
        zero_sign = "majority" if scope == "global" else "positive"
    trimmed: list[Call | Slot] = [
        sparsify(d, density=share, keep="largest", scope=scope, select=select, compat=compat)
        for d, share in zip(deltas, density, strict=True)
    ]
    kept = matched(trimmed, deltas, density, match_norm)
    merged = elect(*kept, weight=weight, aggregate=aggregate, zero_sign=zero_sign, scope=scope, compat=compat)
    return linear(merged, weight=lambda_, normalize=False)
