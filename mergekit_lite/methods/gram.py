"""Inner products of the inputs, gathered while they stream by."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.delta import add
from mergekit_lite.methods.linear import weighted_sum

Matrix = tuple[tuple[float, ...], ...]

COLUMNS = 256  # running sums that are formed side by side, and then added up exactly


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


def exact_sum(values: Sequence[float]) -> float:
    """The correctly rounded sum; what plain addition gives where that is inf or nan."""
    try:
        return math.fsum(values)
    except (ValueError, OverflowError):  # inf - inf, or a sum beyond the range
        return sum(values)


def total(values: Tensor) -> float:
    """The sum of a float64 block: `COLUMNS` running sums side by side, in the order of the elements, then their exact
    sum. The same bits on every machine."""
    flat = values.reshape(-1).cpu().numpy()
    whole = len(flat) - len(flat) % COLUMNS
    columns = np.add.reduce(flat[:whole].reshape(-1, COLUMNS), axis=0)
    columns[: len(flat) - whole] += flat[whole:]
    return exact_sum(columns.tolist())


def inner(a: Tensor, b: Tensor) -> float:
    """The inner product of two float64 blocks of one size, summed as `total` does. Products of numbers that came from
    float32 are exact."""
    x, y = a.reshape(-1).cpu().numpy(), b.reshape(-1).cpu().numpy()
    whole = len(x) - len(x) % COLUMNS
    # One pass without a block of products in between.
    columns = np.einsum("ij,ij->j", x[:whole].reshape(-1, COLUMNS), y[:whole].reshape(-1, COLUMNS))
    columns[: len(x) - whole] += x[whole:] * y[whole:]
    return exact_sum(columns.tolist())


class _GramPart:
    def __init__(self, inputs: int, origin: int | None):
        self.sums = [[0.0] * inputs for _ in range(inputs)]
        self._origin = origin

    def add(self, xs: Sequence[Tensor], start: int) -> bool:
        wide = [x.to(torch.float64) for x in xs]
        if self._origin is not None:
            origin = wide[self._origin]
            wide = [x - origin for x in wide]
        for i, a in enumerate(wide):
            for j, b in enumerate(wide[: i + 1]):
                if self._origin not in (i, j):
                    self.sums[i][j] += inner(a, b)
        return False


class Gram:
    """A `Measure`: the matrix of inner products <x_i, x_j> of `inputs` inputs, in double precision.

    With `origin`, the index of an input, it is <x_i - x_origin, x_j - x_origin>: the inner products of small
    differences, which those of the inputs themselves would lose in rounding. The sum runs over all tensors that share
    the measure. The result is a tuple of rows, the same for each tensor.
    """

    def __init__(self, inputs: int, origin: int | None = None):
        self._inputs = inputs
        self._origin = origin
        self._sums = [[0.0] * inputs for _ in range(inputs)]

    def part(self, tensor: int) -> _GramPart:
        return _GramPart(self._inputs, self._origin)

    def close(self, parts: Sequence[_GramPart | None]) -> bool:
        for i in range(self._inputs):
            for j in range(i + 1):
                self._sums[i][j] = self._sums[j][i] = exact_sum([p.sums[i][j] for p in parts if p is not None])
        return False

    def result(self, tensor: int) -> Matrix:
        return tuple(tuple(row) for row in self._sums)


def product(gram: Matrix, a: Sequence[float], b: Sequence[float]) -> float:
    """<sum_i a_i x_i, sum_j b_j x_j> from the matrix of inner products."""
    return exact_sum([p * q * gram[i][j] for i, p in enumerate(a) for j, q in enumerate(b) if p and q])


def from_base(xs: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """sum_i c_i x_i where there is a coefficient for each of `xs`; base + sum_i c_i (x_i - base) where `xs` have the
    base as one more at the end."""
    if len(xs) == len(coefficients):
        return weighted_sum(xs, coefficients)
    result: Tensor = add.fn([*(x - xs[-1] for x in xs[:-1]), xs[-1]], coefficients)
    return result
