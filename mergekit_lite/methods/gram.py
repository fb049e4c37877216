"""Inner products of the inputs, gathered while they stream by."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Matrix = tuple[tuple[float, ...], ...]

FOLDED = 256  # numbers that are left to an exact sum


def fold(values: Tensor, width: int) -> Tensor:
    """Sums of `values` along the last axis, by halves, until at most `width` entries are left there. Spends `values`.

    Only element-wise additions in a fixed order: the same bits on every machine and for every number of rows.
    """
    while values.shape[-1] > width:
        half = values.shape[-1] // 2
        folded = values[..., :half]
        folded.add_(values[..., half : 2 * half])
        if values.shape[-1] % 2:
            folded[..., :1].add_(values[..., -1:])
        values = folded
    return values


class _GramPart:
    def __init__(self, inputs: int):
        self.sums = [[0.0] * inputs for _ in range(inputs)]

    def add(self, xs: Sequence[Tensor], start: int) -> bool:
        # The product of two float32 numbers is exact in float64.
        wide = [x.to(torch.float64) for x in xs]
        for i, a in enumerate(wide):
            for j, b in enumerate(wide[: i + 1]):
                self.sums[i][j] += math.fsum(fold(a * b, FOLDED).tolist())
        return False


class Gram:
    """A `Measure`: the matrix of inner products <x_i, x_j> of `inputs` inputs, in double precision.

    The sum runs over all tensors that share the measure. The result is a tuple of rows, the same for each tensor.
    """

    def __init__(self, inputs: int):
        self._inputs = inputs
        self._sums = [[0.0] * inputs for _ in range(inputs)]

    def part(self, tensor: int) -> _GramPart:
        return _GramPart(self._inputs)

    def close(self, parts: Sequence[_GramPart | None]) -> bool:
        for i in range(self._inputs):
            for j in range(i + 1):
                self._sums[i][j] = self._sums[j][i] = math.fsum(p.sums[i][j] for p in parts if p is not None)
        return False

    def result(self, tensor: int) -> Matrix:
        return tuple(tuple(row) for row in self._sums)
