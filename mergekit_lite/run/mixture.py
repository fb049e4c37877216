"""Weighted means of tensors, or of parts of one, each read with its rows and columns in an order of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mergekit_lite.align.apply import Order
from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.run.gather import SMALL, read_rows

Read = Callable[[int, int], Tensor]


@dataclass(frozen=True, slots=True)
class Member:
    """What counts with `share` in a mean: the `rows` of the input number `source`, seen as a matrix, with their columns
    in the order of `columns`."""

    source: int
    rows: Order
    share: float
    columns: Order | None = None


@dataclass(frozen=True, slots=True)
class Mixed:
    """How a tensor is made: matrices of `rows` rows of `width` elements, one after the other, each the mean of members
    whose shares add up to 1."""

    rows: int
    width: int
    slots: tuple[tuple[Member, ...], ...]


class Mixture:
    """Blocks of whole rows of the tensor that `mixed` describes. `reads` give the elements [start, stop) of the inputs,
    flat; where `sizes` has a number of elements for one, it can be read whole only. Members are read one after the
    other. For one thread."""

    def __init__(self, mixed: Mixed, reads: Sequence[Read], sizes: Sequence[int | None], device: torch.device):
        self._mixed, self._reads, self._sizes, self._device = mixed, reads, sizes, device

    def block(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop), whole rows, flat, in memory of their own."""
        one = self._mixed.rows * self._mixed.width
        parts = []
        while start < stop:
            slot = start // one
            end = min(stop, (slot + 1) * one)
            parts.append(self._mean(self._mixed.slots[slot], start - slot * one, end - slot * one))
            start = end
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _mean(self, slot: Sequence[Member], start: int, stop: int) -> Tensor:
        # As a distance from the first member, so that the mean of equals is each of them, bit for bit.
        first = self._taken(slot[0], start, stop)
        mean = first.clone() if len(slot) > 1 else first
        for member in slot[1:]:
            mean.add_(self._taken(member, start, stop).sub_(first), alpha=member.share)
        return mean

    def _taken(self, member: Member, start: int, stop: int) -> Tensor:
        width, read, size = self._mixed.width, self._reads[member.source], self._sizes[member.source]
        wanted = member.rows[start // width : stop // width]
        if size is None and len(member.rows) * width > SMALL:
            found = read_rows(read, wanted, width).view(-1, width)
        else:
            # Rows in another order are rather picked out of a small tensor than read one by one.
            low, high = (0, size // width) if size is not None else (int(member.rows.min()), int(member.rows.max()) + 1)
            window = read(low * width, high * width).view(-1, width)
            found = window.index_select(0, torch.from_numpy(wanted - low).to(self._device))
        if member.columns is not None:
            found = found.index_select(1, torch.from_numpy(member.columns).to(self._device))
        return found.reshape(-1)
