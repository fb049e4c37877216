"""Deltas thinned out: the largest entries, a random share, or the middle of the magnitudes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.compat import COMPAT
from mergekit_lite.methods.keys import keys_of
from mergekit_lite.methods.mask import masked
from mergekit_lite.methods.random import keep_mask
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.select import Bound, OrderStatistics, drop_count, keep_count
from mergekit_lite.methods.spec import REQUIRED, Block, Param, Params, Reach


def kept_ranks(
    n: int, keep: str, density: float, gamma: float, *, remove_first: bool, by_row: bool, threshold: bool, compat: bool
) -> tuple[int, int]:
    """(top, last): of `n` entries by descending magnitude, those after the first `top` and up to `last` are kept."""
    if threshold:
        return 0, min(n, int(n * density) + 1)
    # The published row-wise code rounds down without a guard; unlike it, this keeps at least one entry of a row.
    plain = compat or (keep == "middle" and by_row)
    kept = max(1, min(n, int(n * density))) if plain else keep_count(n, density)
    if compat and keep == "middle" and int(n * density) == 0:
        return n, n
    if keep == "largest":
        return 0, kept
    top = int(n * gamma) if plain else drop_count(n, gamma)
    if remove_first:
        top = min(top, n - kept)
        return top, top + kept
    return min(top, kept - 1), kept


def _reach(params: Params) -> Reach:
    if params["keep"] == "random":
        return "element"
    reaches: dict[str, Reach] = {"tensor": "measured", "global": "pooled", "row": "row"}
    return reaches[params["scope"]]


def _measure(params: Params, inputs: int, numels: Sequence[int]) -> OrderStatistics:
    threshold = params["select"] == "threshold"
    top, last = kept_ranks(
        sum(numels),
        params["keep"],
        params["density"],
        params["gamma"],
        remove_first=params["remove_first"],
        by_row=False,
        threshold=threshold,
        compat=params["compat"],
    )
    return OrderStatistics([last, top] if top else [last], numels, ties=not threshold)


def _pick(params: Params, inputs: int) -> int | None:
    cut = params["keep"] == "middle" and not params["remove_first"] and params["gamma"] > 0
    return 0 if params["density"] >= 1 and not cut else None


def _check(params: Params, inputs: int) -> str | None:
    keep, scope = params["keep"], params["scope"]
    if keep == "random" and scope != "tensor":
        return f"`keep: random` draws every entry by itself, so `scope: {scope}` has no meaning: leave it out"
    if params["select"] == "threshold" and (keep != "largest" or scope == "row"):
        return "`select: threshold` goes with `keep: largest` and `scope: tensor` or `global` only"
    if keep == "middle" and not params["remove_first"] and params["gamma"] >= params["density"]:
        return "without `remove_first` the share kept is density - gamma, here nothing: lower `gamma`"
    return None


def _remark(params: Params, inputs: int) -> str | None:
    if params["keep"] == "middle" and params["remove_first"] and params["density"] + params["gamma"] > 1:
        return "density + gamma is above 1: fewer outliers are removed, so that the share kept is `density`"
    return None


def largest(x: Tensor, bound: Bound, start: int) -> Tensor:
    """The entries of the 1-D block `x` that are at or above `bound`, zeros elsewhere; `start` is the flat index of the
    block. NaN is above every number."""
    value, cut = bound
    split = len(x) if cut is None else min(max(cut - start, 0), len(x))
    pieces = []
    if split:
        pieces.append(_at_least(x[:split], value))
    if split < len(x):
        pieces.append(_above(x[split:], value))
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0] if pieces else x.clone()


def _above(x: Tensor, value: float) -> Tensor:
    # `hardshrink` gives x where |x| > value and 0 elsewhere; it keeps NaN.
    return torch.zeros_like(x) if math.isnan(value) else torch.nn.functional.hardshrink(x, value)


def _at_least(x: Tensor, value: float) -> Tensor:
    if value == 0:
        return x.clone()
    if math.isnan(value):
        return torch.nn.functional.hardshrink(x, math.inf)
    kind: Any = np.float64 if x.dtype == torch.float64 else np.float32
    return torch.nn.functional.hardshrink(x, float(np.nextafter(kind(value), kind(0))))


def _rows(x: Tensor, top: int, last: int) -> Tensor:
    """The entries of every row of a (rows, row length) block that rank after `top` and up to `last`; equal magnitudes
    rank by index."""
    keys = torch.from_numpy(keys_of(x.contiguous()))
    mask = _row_top(keys, last)
    if top:
        mask &= ~_row_top(keys, top)
    return masked(x, mask.to(x.device))


def _row_top(keys: Tensor, k: int) -> Tensor:
    """The mask of the `k` largest keys of every row."""
    length = keys.shape[1]
    place = length - k
    bounds = torch.from_numpy(np.partition(keys.numpy(), place, axis=1)[:, place : place + 1])
    mask = keys >= bounds
    if bool((mask.sum(dim=1) > k).any()):
        above = keys > bounds
        equal = keys == bounds
        mask = above | (equal & (equal.cumsum(dim=1) <= k - above.sum(dim=1, keepdim=True)))
    return mask


@method(
    Param("density", "number", REQUIRED, "share of the entries that is kept", 0, 1, open_low=True),
    Param("keep", "choice", "largest", "which entries are kept", choices=("largest", "random", "middle")),
    Param("scope", "choice", "tensor", "where magnitudes are ranked", choices=("tensor", "row", "global")),
    Param("rescale", "flag", False, "divide what is kept by `density`, so that the mean stays (for `keep: random`)"),
    Param("gamma", "number", 0.01, "share of the largest entries that `keep: middle` removes", 0, 1, open_high=True),
    Param("remove_first", "flag", True, "`keep: middle`: remove outliers before, not after, the share is counted"),
    Param("select", "choice", "exact", "`threshold` keeps equal magnitudes together", choices=("exact", "threshold")),
    COMPAT,
    takes="delta",
    gives="delta",
    inputs=(1, 1),
    base="optional",
    reach=_reach,
    paper="TIES, NeurIPS 2023, arXiv 2306.01708; DARE, ICML 2024, arXiv 2311.03099; Breadcrumbs, arXiv 2312.06795",
    measure=_measure,
    rounds=2,
    pick=_pick,
    check=_check,
    remark=_remark,
    positioned=True,
)
def sparsify(
    xs: Sequence[Tensor],
    density: float,
    keep: str,
    scope: str,
    rescale: bool,
    gamma: float,
    remove_first: bool,
    select: str,
    compat: bool,
    block: Block,
    stat: tuple[Bound, ...] | None = None,
) -> Tensor:
    """Keep a share of a delta's entries and set the others to zero.

    out = m x, or m x / density with `rescale` (the nominal share, whatever `keep` is), with a mask m of zeros and ones:

    - `keep: largest`: the max(1, floor(density n)) largest |x|. `select: threshold` instead keeps all entries of at
      least the (n - int(density n))-th smallest magnitude, as the published code of TIES does.
    - `keep: random`: each entry by itself with probability `density`, drawn from the seed, the step, the model, the
      tensor and the entry's place alone.
    - `keep: middle`: the floor(gamma n) largest |x| are removed, and of the rest the floor(density n) largest kept.
      Where both cannot be had, fewer are removed. Without `remove_first` the floor(density n) largest are taken first
      and the floor(gamma n) largest of them removed, so that density - gamma is kept.

    n counts one tensor, one row along the last axis, or all tensors of the step (`scope`). Equal magnitudes rank by
    tensor, then by flat index, the first one as the largest. `keep: middle` by row rounds plainly, as the published
    code of Breadcrumbs does, but keeps at least one entry.

    A share that is a whole number but for rounding counts as that number: 0.29 of 100 is 29. `compat` rounds plainly,
    to 28, and `keep: middle` may keep nothing, as in mergekit.

    Takes a delta of any shape and gives that shape, in the dtype of the arithmetic. A density of 1 changes nothing. To
    spare small tensors give `density` by name: `{"*.bias": 1, else: 0.1}`.

    Sources: Yadav et al., TIES, NeurIPS 2023, arXiv 2306.01708; Yu et al., DARE, ICML 2024, arXiv 2311.03099; Davari
    and Belilovsky, Model Breadcrumbs, ECCV 2024, arXiv 2312.06795.
    """
    x = xs[0]
    if keep == "random":
        mask = keep_mask(block.key, block.start, len(x), density).to(x.device)
        result = masked(x, mask)
    elif scope == "row":
        top, last = kept_ranks(
            x.shape[1], keep, density, gamma, remove_first=remove_first, by_row=True, threshold=False, compat=compat
        )
        result = _rows(x, top, last)
    else:
        assert stat is not None
        result = largest(x, stat[0], block.start)
        if len(stat) > 1:
            result = masked(result, largest(x, stat[1], block.start) == 0)
    return result * (1 / density) if rescale and density < 1 else result
