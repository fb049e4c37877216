"""Entries cleared by a mask."""

from __future__ import annotations

from mergekit_lite.lazy import Tensor, torch


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where the bool tensor `mask` is true, bit for bit, and +0.0 elsewhere, whatever `x` holds there. The shapes
    are the same.

    By whole numbers: `torch.where` takes one element at a time on a CPU, ten times as long.
    """
    integer = torch.int32 if x.itemsize == 4 else torch.int64
    bits = mask.to(integer).neg_()
    return bits.bitwise_and_(x.view(integer)).view(x.dtype)
