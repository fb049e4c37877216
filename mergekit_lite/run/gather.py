"""Rows in another order: a tensor whose units were permuted is read where its rows lie, block by block."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from mergekit_lite.align.apply import Order
from mergekit_lite.lazy import Tensor, torch

SMALL = 1 << 18  # elements of a tensor that is rather read whole and kept than row by row


@dataclass(frozen=True, slots=True)
class Taken:
    """Which of a gathering node's inputs is read, and by axis the old index of each new one."""

    source: int
    orders: Mapping[int, Order]


class Gather:
    """Blocks of whole rows of a tensor of `shape` in the order of `taken`. `read` gives the elements [start, stop) of
    the tensor in its old order, flat; with `whole` it can give all of them only. For one thread."""

    def __init__(
        self,
        shape: tuple[int, ...],
        taken: Taken,
        read: Callable[[int, int], Tensor],
        whole: bool,
        device: torch.device,
    ):
        self._shape, self._read = shape, read
        self._numel = math.prod(shape)
        self._width = math.prod(shape[1:])
        self._keep = whole or len(shape) < 2 or self._numel <= SMALL
        self._rows = taken.orders.get(0)
        self._others = {axis: torch.from_numpy(order).to(device) for axis, order in taken.orders.items() if axis}
        self._kept: Tensor | None = None

    def block(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the tensor in its new order, flat, in memory of their own."""
        if self._keep:
            if self._kept is None:
                self._kept = self._order(self._picked(self._read(0, self._numel).view(self._shape))).reshape(-1)
            return self._kept[start:stop].clone()
        top, bottom = start // self._width, stop // self._width
        if self._rows is None:
            rows = self._read(start, stop)
        else:
            rows = self._gathered(self._rows[top:bottom])
        return self._order(rows.view(bottom - top, *self._shape[1:])).reshape(-1)

    def _picked(self, tensor: Tensor) -> Tensor:
        if self._rows is None:
            return tensor
        return tensor.index_select(0, torch.from_numpy(self._rows).to(tensor.device))

    def _gathered(self, rows: Order) -> Tensor:
        # Neighbours that stay neighbours, such as the rows of a head, are read at once.
        cuts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
        width = self._width
        out: Tensor | None = None
        for i, j in itertools.pairwise(cuts):
            if i < j:
                part = self._read(int(rows[i]) * width, (int(rows[i]) + j - i) * width)
                if out is None:
                    out = part.new_empty(len(rows) * width)
                out[i * width : j * width] = part
        return out if out is not None else torch.empty(0)

    def _order(self, tensor: Tensor) -> Tensor:
        for axis, order in self._others.items():
            tensor = tensor.index_select(axis, order)
        return tensor
