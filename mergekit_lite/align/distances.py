"""How far the units of a space lie from each other, summed tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mergekit_lite.lazy import Tensor, torch

Metric = Literal["l1", "l2"]
ROWS = 64  # rows of the matrix that one thread works out at a time
PIECE = 1 << 20  # elements of differences held at once by each


class UnitDistances:
    """An n × n matrix to which one tensor after the other adds. It is float32 until a tensor is float64."""

    def __init__(
        self, count: int, metric: Metric, threads: Executor | None = None, check: Callable[[], None] = lambda: None
    ):
        self._sum = torch.zeros(count, count)
        self._metric, self._threads, self._check = metric, threads, check

    def add(self, units: Tensor) -> None:
        """`units`: (n, numbers per unit). Equal units stay at a distance of exactly 0: nothing is expanded into
        products."""
        if units.dtype == torch.float64:
            self._sum = self._sum.double()
        units = units.to(self._sum).contiguous()
        starts = range(0, len(units), ROWS)
        if self._threads is None or len(starts) == 1:
            for start in starts:
                self._rows(units, start)
        else:
            for done in [self._threads.submit(self._rows, units, start) for start in starts]:
                done.result()

    def _rows(self, units: Tensor, start: int) -> None:
        """Above the diagonal only. Row by row, since torch.cdist took three times as long on the CPU."""
        self._check()
        width = max(1, PIECE // max(1, units[0].numel()))
        buffer = torch.empty((min(width, len(units)), units[0].numel()), dtype=units.dtype)
        for first in range(start, len(units), width):
            others = units[first : first + width]
            for row in range(start, min(start + ROWS, first + len(others))):
                skip = max(0, row + 1 - first)
                difference = torch.sub(others[skip:], units[row], out=buffer[skip : len(others)])
                size = difference.abs_() if self._metric == "l1" else difference.square_()
                self._sum[row, first + skip : first + len(others)] += size.sum(dim=1)

    def matrix(self) -> NDArray[np.floating]:
        """The distances: symmetric, zeros on the diagonal. To be called once, after the last tensor."""
        full = self._sum if self._metric == "l1" else self._sum.sqrt_()
        for row in range(len(full)):
            full[row + 1 :, row] = full[row, row + 1 :]
        found: NDArray[np.floating] = full.numpy()
        return found


def variation(units: Tensor) -> float:
    """The sum of absolute differences between neighbouring units, (n, numbers per unit)."""
    total = 0.0
    step = max(1, PIECE // max(1, units[0].numel()))
    for first in range(0, len(units) - 1, step):
        piece = units[first : first + step + 1]
        total += float((piece[1:] - piece[:-1]).abs().sum(dtype=torch.float64))
    return total
