"""Fine-tunes averaged and drawn back towards their base, as far as the angle between them says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.gram import Gram, Matrix, fold
from mergekit_lite.methods.linear import weighted_sum
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import Param, Params, Reach


def share(cosine: float, count: int, clamp: bool) -> float:
    """How far to go from the base to the mean of `count` deltas whose pairwise cosines have this mean."""
    if clamp:
        cosine = min(max(cosine, 0.0), 1.0)
    below = 1 + (count - 1) * cosine
    return count * cosine / below if below != 0 else 0.0


def _reach(params: Params) -> Reach:
    return "row" if params["granularity"] == "row" else "measured"


def _measure(params: Params, inputs: int, numels: Sequence[int]) -> Gram:
    return Gram(inputs)


@method(
    Param(
        "granularity", "choice", "tensor", "one share a tensor, or one for each row (axis 0)", choices=("tensor", "row")
    ),
    Param("clamp", "flag", True, "take a negative mean cosine for 0, so that the result stays between base and mean"),
    takes="delta",
    gives="delta",
    base="required",
    inputs=(2, None),
    reach=_reach,
    row_axis="first",
    paper="Model Stock, ECCV 2024, arXiv 2403.19522",
    measure=_measure,
)
def model_stock(xs: Sequence[Tensor], granularity: str, clamp: bool, stat: Matrix | None = None) -> Tensor:
    """Average fine-tunes and draw the mean back towards the base: the less their changes agree, the further.

    out = base + t mean_i d_i, with d_i = x_i - base, N of them, and

        t = N c / (1 + (N - 1) c),    c = mean over pairs i < j of <d_i, d_j> / (|d_i| |d_j|),

    of the flattened tensors (`granularity: tensor`) or of each index of axis 0 (`granularity: row`).

    Takes two or more models fine-tuned from the base, of one shape, and gives that shape, in the dtype of the
    arithmetic; inner products are formed in double precision. A delta of zeros has cosine 0 with every other. With
    `clamp` c is held in [0, 1]; without it a negative c leads beyond the base, and c = -1 / (N - 1) gives the base.
    By row, a vector is one row.

    Unlike mergekit: c is clamped (there it is not, as with `clamp: false`), and small changes keep their angles (there
    norms have a floor).

    Source: Jang et al., Model Stock: All we need is just a few fine-tuned models, ECCV 2024, arXiv 2403.19522.
    """
    count = len(xs)
    if granularity == "row":
        return _rows(xs, clamp)
    assert stat is not None
    norms = [math.sqrt(stat[i][i]) for i in range(count)]
    pairs = list(itertools.combinations(range(count), 2))
    cosines = [stat[i][j] / norms[i] / norms[j] for i, j in pairs if norms[i] > 0 and norms[j] > 0]
    t = share(math.fsum(cosines) / len(pairs), count, clamp)
    return weighted_sum(xs, [t / count] * count)


def _rows(xs: Sequence[Tensor], clamp: bool) -> Tensor:
    count = len(xs)
    wide = [x.to(torch.float64) for x in xs]
    norms = [fold(x * x, 1).sqrt() for x in wide]
    pairs = list(itertools.combinations(range(count), 2))
    cosine = torch.zeros_like(norms[0])
    for i, j in pairs:
        # A norm of 0 divides by infinity: it has no direction.
        below = (norms[i] * norms[j]).masked_fill_((norms[i] == 0) | (norms[j] == 0), math.inf)
        cosine.add_(fold(wide[i] * wide[j], 1).div_(below))
    cosine.div_(len(pairs))
    if clamp:
        cosine.clamp_(0, 1)
    below = 1 + (count - 1) * cosine
    t = torch.where(below == 0, 0.0, count * cosine / below)
    result: Tensor = weighted_sum(xs, [1.0] * count).mul_((t / count).to(xs[0]))
    return result
