"""Drop at random, the small more often than the large, rescale, merge."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.compat import COMPAT
from mergekit_lite.methods.dare import AGGREGATE, LAMBDA, VOTE, ZERO_SIGN
from mergekit_lite.methods.elect import elect
from mergekit_lite.methods.keys import by_rank, keys_of
from mergekit_lite.methods.linear import linear
from mergekit_lite.methods.mask import masked
from mergekit_lite.methods.match_norm import MATCH, matched
from mergekit_lite.methods.random import uniform_words
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import REQUIRED, Block, Call, Param, Params, Slot
from mergekit_lite.methods.task_arithmetic import NORMALIZE, check_normalize, summed

PAPER = "DELLA, 2024, arXiv 2406.11617"
RESCALE = Param("rescale", "flag", True, "divide what is kept by its probability, so that the mean stays")
DENSITY = Param(
    "density", "number", REQUIRED, "mean share of this model's delta that is kept", 0, 1, open_low=True, per_input=True
)
EPSILON = Param(
    "epsilon",
    "number",
    0.15,
    "the smallest entry of a row is kept with probability density - epsilon, the largest with density + epsilon",
    0,
    1,
    open_high=True,
    per_input=True,
)


def probabilities(length: int, density: float, epsilon: float) -> list[float]:
    """With which probability the entries of a row are kept, from the largest magnitude to the smallest."""
    if length == 1:
        return [density]
    return [density + epsilon - 2 * epsilon * place / (length - 1) for place in range(length)]


@functools.lru_cache(maxsize=64)
def _tables(length: int, density: float, epsilon: float) -> tuple[NDArray[np.float64], NDArray[np.uint64]]:
    """`probabilities` as an array, and in units of 2**-32."""
    chances = np.array(probabilities(length, density, epsilon))
    return chances, np.rint(chances * 2**32).astype(np.uint64)


def _fault(density: float, epsilon: float) -> str | None:
    if density - epsilon > 0 and density + epsilon <= 1:
        return None
    return f"density ± epsilon, here {density:g} ± {epsilon:g}, must be probabilities above 0: lower `epsilon`"


def _check_one(params: Params, inputs: int) -> str | None:
    return _fault(params["density"], params["epsilon"])


def _check(params: Params, inputs: int) -> str | None:
    faults = [_fault(d, e) for d, e in zip(params["density"], params["epsilon"], strict=True)]
    if params["rescale"] and params["match_norm"]:
        faults.append("`rescale` and `match_norm` both scale what is kept: set `rescale: false`")
    if "normalize" in params:
        faults.append(check_normalize(params, inputs))
    return next((fault for fault in faults if fault), None)


def _pick(params: Params, inputs: int) -> int | None:
    return 0 if params["density"] == 1 and params["epsilon"] == 0 else None


@method(
    Param("density", "number", REQUIRED, "mean share of the entries that is kept", 0, 1, open_low=True),
    Param("epsilon", "number", EPSILON.default, EPSILON.help, 0, 1, open_high=True),
    RESCALE,
    takes="delta",
    gives="delta",
    inputs=(1, 1),
    base="optional",
    reach="row",
    paper=PAPER,
    pick=_pick,
    check=_check_one,
    positioned=True,
)
def magprune(xs: Sequence[Tensor], density: float, epsilon: float, rescale: bool, block: Block) -> Tensor:
    """Drop entries of a delta at random, the small ones of a row more often than the large ones.

    out = m x, or m x / p with `rescale`, where every entry of the mask m is 1 with probability p and 0 otherwise; in a
    row of n entries the k-th largest magnitude has p = density + epsilon - 2 epsilon (k - 1) / (n - 1).

    Takes a delta of any shape and gives that shape, in the dtype of the arithmetic. Rows lie along the last axis; a row
    of one entry has p = density. Equal magnitudes rank by index, the first one as the largest. The draw depends on the
    seed, the step, the model, the tensor and the entry's place alone.

    Source: Deep et al., DELLA-Merging: Reducing interference in model merging through magnitude-based sampling, 2024,
    arXiv 2406.11617 (there called MAGPRUNE).
    """
    x = xs[0].contiguous()
    rows, length = x.shape
    chances, bounds = _tables(length, density, epsilon)
    order = by_rank(keys_of(x))
    # In the order of the magnitudes, where a row's chances are the same in every row, and back again.
    mask = uniform_words(block.key, block.start, rows * length).take(order) < bounds
    flat = x.cpu().numpy().reshape(-1)
    ranked = torch.from_numpy(flat.take(order))
    if rescale:
        ranked.div_(torch.from_numpy(chances).to(ranked))
    kept = np.empty_like(flat)
    kept[order] = masked(ranked, torch.from_numpy(mask)).numpy()
    return torch.from_numpy(kept).reshape(rows, length).to(x.device)


def _dropped(
    deltas: Sequence[Call | Slot], density: Sequence[float], epsilon: Sequence[float], rescale: bool, match: bool
) -> list[Call | Slot]:
    kept: list[Call | Slot] = [
        magprune(d, density=share, epsilon=spread, rescale=rescale)
        for d, share, spread in zip(deltas, density, epsilon, strict=True)
    ]
    return matched(kept, deltas, density, match)


@method(
    Param("weight", "number", 1.0, "factor of this model's delta", per_input=True),
    DENSITY,
    EPSILON,
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
)
def della_linear(
    *deltas: Call | Slot,
    weight: Sequence[float],
    density: Sequence[float],
    epsilon: Sequence[float],
    rescale: bool,
    lambda_: float,
    normalize: bool,
    match_norm: bool,
    compat: bool,
) -> Call:
    """Drop small changes more often than large ones, rescale the rest, add their weighted sum to the base.

    out = base + lambda sum_t weight_t magprune(x_t - base). With `normalize` the sum is divided by sum_t weight_t; with
    `match_norm` in place of `rescale`, what is kept is scaled to the L1 norm that the delta had in this tensor.

    Made of `magprune` and `linear`. Takes one or more models fine-tuned from the base, of one shape, and gives that
    shape, in the dtype of the arithmetic.

    Unlike mergekit: what is kept is divided by its own probability, as in the paper; `match_norm` does as mergekit.
    Unlike the paper, whose epsilon is the whole width: probabilities go from density - epsilon to density + epsilon, as
    in mergekit.

    Source: Deep et al., DELLA-Merging: Reducing interference in model merging through magnitude-based sampling, 2024,
    arXiv 2406.11617.
    """
    return summed(_dropped(deltas, density, epsilon, rescale, match_norm), weight, lambda_, normalize, compat)


@method(
    VOTE,
    DENSITY,
    EPSILON,
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
)
def della(
    *deltas: Call | Slot,
    weight: Sequence[float],
    density: Sequence[float],
    epsilon: Sequence[float],
    rescale: bool,
    aggregate: str,
    zero_sign: str,
    lambda_: float,
    match_norm: bool,
    compat: bool,
) -> Call:
    """Drop small changes more often than large ones, rescale the rest, then elect signs as TIES does.

    d_t = magprune(x_t - base) as in `della_linear`; out = base + lambda elect(d_1, d_2, ...). A
    negative weight counts as the opposite delta with a positive one.

    Made of `magprune` and `elect`. Takes one or more models fine-tuned from the base, of one shape, and gives that
    shape, in the dtype of the arithmetic. It differs from mergekit and from the paper as `della_linear` does.

    Source: Deep et al., DELLA-Merging: Reducing interference in model merging through magnitude-based sampling, 2024,
    arXiv 2406.11617.
    """
    dropped = _dropped(deltas, density, epsilon, rescale, match_norm)
    merged = elect(*dropped, weight=weight, aggregate=aggregate, zero_sign=zero_sign, scope="tensor", compat=compat)
    return linear(merged, weight=lambda_, normalize=False)
