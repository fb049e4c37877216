"""Rows in another order: a tensor whose units were permuted, or whose vocabulary is another, is read where its rows
lie, block by block."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergekit_lite.align.apply import Order
from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.vocabulary.rows import MEAN, PAD, Rows

PART = 1 << 16  # elements whose rows are added up at once for the mean of all
SMALL = 1 << 18  # elements of a tensor that is rather read whole and kept than row by row


@dataclass(frozen=True, slots=True)
class Taken:
    """Which of a gathering node's inputs is read, and by axis the old index of each new one."""

    source: int
    orders: Mapping[int, Order]


def read_rows(read: Callable[[int, int], Tensor], rows: Order, width: int) -> Tensor:
    """The rows of `width` elements of these numbers, flat, in memory of their own. `read` gives the elements
    [start, stop) of the tensor that they lie in."""
    # Neighbours that stay neighbours, such as the rows of a head, are read at once.
    cuts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    out: Tensor | None = None
    for i, j in itertools.pairwise(cuts):
        if i < j:
            part = read(int(rows[i]) * width, (int(rows[i]) + j - i) * width)
            if out is None:
                out = part.new_empty(len(rows) * width)
            out[i * width : j * width] = part
    return out if out is not None else torch.empty(0)


class Gather:
    """Blocks of whole rows of what `taken` takes of a tensor of `shape`: all its elements in another order, or fewer.
    `read` gives the elements [start, stop) of the tensor in its old order, flat; with `whole` it can give all of them
    only. For one thread."""

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
        self._taken = math.prod(len(taken.orders.get(axis, range(n))) for axis, n in enumerate(shape) if axis)
        self._keep = whole or len(shape) < 2 or self._numel <= SMALL
        self._rows = taken.orders.get(0)
        self._others = {axis: torch.from_numpy(order).to(device) for axis, order in taken.orders.items() if axis}
        self._kept: Tensor | None = None

    def block(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of what is taken, flat, in memory of their own."""
        if self._keep:
            if self._kept is None:
                self._kept = self._order(self._picked(self._read(0, self._numel).view(self._shape))).reshape(-1)
            return self._kept[start:stop].clone()
        top, bottom = start // self._taken, stop // self._taken
        if self._rows is None:
            rows = self._read(top * self._width, bottom * self._width)
        else:
            rows = read_rows(self._read, self._rows[top:bottom], self._width)
        return self._order(rows.view(bottom - top, *self._shape[1:])).reshape(-1)

    def _picked(self, tensor: Tensor) -> Tensor:
        if self._rows is None:
            return tensor
        return tensor.index_select(0, torch.from_numpy(self._rows).to(tensor.device))

    def _order(self, tensor: Tensor) -> Tensor:
        for axis, order in self._others.items():
            tensor = tensor.index_select(axis, order)
        return tensor


class Remap:
    """Blocks of a tensor of another vocabulary: rows of several tensors of `width` elements each, as `rows` tells.

    `reads` give the elements [start, stop) of these tensors, flat; where `sizes` has a number of elements for one, it
    can be read whole only. Padding is the mean of all other rows, added up in double precision in their order. For one
    thread.
    """

    def __init__(
        self,
        width: int,
        rows: Rows,
        reads: Sequence[Callable[[int, int], Tensor]],
        sizes: Sequence[int | None],
    ):
        self._width, self._rows, self._reads, self._sizes = width, rows, reads, sizes
        self._kept: dict[int, Tensor] = {}
        self._padding: Tensor | None = None

    def block(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop), whole rows, flat, in memory of their own."""
        top, bottom = start // self._width, stop // self._width
        out = self._filled(top, bottom)
        padding = np.flatnonzero(self._rows.source[top:bottom] == PAD)
        if len(padding):
            out[torch.from_numpy(padding).to(out.device)] = self._mean().to(out.dtype)
        return out.reshape(-1)

    def _filled(self, top: int, bottom: int) -> Tensor:
        """The rows from `top` to `bottom`, zeros where there is padding."""
        source, row = self._rows.source[top:bottom], self._rows.row[top:bottom]
        out: Tensor | None = None
        for number in range(len(self._reads)):
            out = self._put(out, bottom - top, number, np.flatnonzero(source == number), row, add=False)
        means = self._rows.mean
        places = np.flatnonzero(source == MEAN)
        if means is not None and len(places):
            for number, rows in enumerate(means):
                there = rows[top:bottom]
                out = self._put(out, bottom - top, number, places[there[places] >= 0], there, add=True)
            assert out is not None
            at = torch.from_numpy(places).to(out.device)
            counts = torch.from_numpy((means[:, top:bottom][:, places] >= 0).sum(axis=0)).to(out.device, out.dtype)
            out[at] /= counts.unsqueeze(1)
        if out is None:  # of no row is it known where and how it is computed
            out = self._reads[0](0, 0 if self._sizes[0] is None else self._sizes[0])
            out = out.new_zeros(bottom - top, self._width)
        return out

    def _put(
        self, out: Tensor | None, count: int, number: int, places: NDArray[Any], rows: NDArray[Any], add: bool
    ) -> Tensor | None:
        """Rows of tensor `number` at `places`, from where `rows` says; what lies together is read together."""
        if not len(places):
            return out
        places = places[np.argsort(rows[places], kind="stable")]
        wanted = rows[places].astype(np.int64)
        cuts = [0, *(np.flatnonzero(np.diff(wanted) != 1) + 1).tolist(), len(wanted)]
        for i, j in itertools.pairwise(cuts):
            part = self._read(number, int(wanted[i]), int(wanted[i]) + j - i)
            if out is None:
                out = part.new_zeros(count, self._width)
            at = torch.from_numpy(places[i:j]).to(out.device)
            out[at] = out[at] + part if add else part
        return out

    def _read(self, number: int, top: int, bottom: int) -> Tensor:
        size = self._sizes[number]
        if size is None:
            return self._reads[number](top * self._width, bottom * self._width).view(-1, self._width)
        if number not in self._kept:
            self._kept[number] = self._reads[number](0, size).view(-1, self._width)
        return self._kept[number][top:bottom]

    def _mean(self) -> Tensor:
        if self._padding is None:
            total: Tensor | None = None
            step = max(1, PART // self._width)  # the same in every run, since the sum depends on it
            for top in range(0, len(self._rows), step):
                part = self._filled(top, min(top + step, len(self._rows))).double().sum(dim=0)
                total = part if total is None else total + part
            assert total is not None
            self._padding = total / max(1, int((self._rows.source != PAD).sum()))
        return self._padding
