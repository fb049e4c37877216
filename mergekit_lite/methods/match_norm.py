"""One tensor scaled to the size of another."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.gram import total
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import Call, Param, Params, Slot

Norms = tuple[float, float]


class _NormPart:
    def __init__(self) -> None:
        self.sums = [0.0, 0.0]

    def add(self, xs: Sequence[Tensor], start: int) -> bool:
        for i, x in enumerate(xs):
            self.sums[i] += total(x.abs().to(torch.float64))
        return False


class L1Norms:
    """A `Measure`: the L1 norms of two inputs, in double precision."""

    def __init__(self) -> None:
        self._sums = [0.0, 0.0]

    def part(self, tensor: int) -> _NormPart:
        return _NormPart()

    def close(self, parts: Sequence[_NormPart | None]) -> bool:
        for i in range(2):
            self._sums[i] = math.fsum(part.sums[i] for part in parts if part is not None)
        return False

    def result(self, tensor: int) -> Norms:
        return self._sums[0], self._sums[1]


def _measure(params: Params, inputs: int, numels: Sequence[int]) -> L1Norms:
    return L1Norms()


@method(
    inputs=(2, 2),
    takes="delta",
    gives="delta",
    base="optional",
    reach="measured",
    paper="mergekit, EMNLP 2024, arXiv 2403.13257",
    measure=_measure,
)
def match_norm(xs: Sequence[Tensor], stat: Norms | None = None) -> Tensor:
    """Scale one delta to the L1 norm of another: what a sparsified delta has lost is given back.

    out = x |y|_1 / |x|_1 over the whole tensor; x is the first input, y the second.

    Takes two deltas of one shape and gives that shape, in the dtype of the arithmetic; norms are summed in double
    precision. Where a norm is 0 or not finite the first delta is left as it is.

    Source: Goddard et al., Arcee's MergeKit, EMNLP 2024 (industry track), arXiv 2403.13257 (its `rescale`).
    """
    assert stat is not None
    ratio = stat[1] / stat[0] if stat[0] else 1.0
    return xs[0] * (ratio if ratio and math.isfinite(ratio) else 1.0)


MATCH = Param(
    "match_norm", "flag", False, "scale what is kept of a delta to the L1 norm that the delta had, per tensor"
)


def matched(
    kept: Sequence[Call | Slot], deltas: Sequence[Call | Slot], density: Sequence[float], match: bool
) -> list[Call | Slot]:
    """What is kept of the deltas, with `match` scaled to their norms; a density of 1 has kept all."""
    return [match_norm(k, d) if match and share < 1 else k for k, d, share in zip(kept, deltas, density, strict=True)]
