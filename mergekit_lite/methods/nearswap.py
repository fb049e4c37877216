"""Small differences taken over, large ones cut short."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lite.lazy import Tensor
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import REQUIRED, Param


@method(
    Param("t", "number", REQUIRED, "the most that an entry of the base may change, in units of the weights", low=0),
    takes="delta",
    gives="delta",
    base="required",
    inputs=(1, 1),
    paper="mergekit, EMNLP 2024, arXiv 2403.13257",
)
def nearswap(xs: Sequence[Tensor], t: float) -> Tensor:
    """Swap another model in where it is near the base, and go no further than `t` elsewhere.

    out = base + sgn(d) min(|d|, t), with d = x - base: entries that differ by at most t are taken over, the others move
    by t. It is the same as (1 - s) base + s x with s = min(t / |d|, 1).

    Takes one model and its base, of one shape, and gives that shape, in the dtype of the arithmetic.

    Source: nearswap by alchemonaut, in Goddard et al., Arcee's MergeKit, EMNLP 2024 (industry track), arXiv 2403.13257.
    """
    return xs[0].clamp(-t, t)
