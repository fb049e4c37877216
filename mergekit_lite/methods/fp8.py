"""Numbers become FP8 with a scale for each block. No recipe names these methods: the plan uses them for `quantize`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.gram import total
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import Method

BLOCK = 128  # rows and columns that share a scale, as in DeepSeek-V3
LARGEST, REACH = 448.0, 464.0  # of float8_e4m3fn, and the largest number that is rounded to it
_TILE = 512  # columns that are worked on at once, so that what is made on the way stays in the cache
_LEAST, _MOST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # normal numbers of float32


@dataclass(slots=True)
class Quantized:
    """Rows of a weight as FP8: the codes, a scale for each block, how many numbers lay out of reach, and the squared
    norms of the numbers and of what the codes leave of them, by parts of the same size in every run."""

    codes: Tensor
    scales: Tensor
    overflow: int
    squares: list[float]
    left: list[float]


def quantized(rows: Tensor) -> Quantized:
    """`rows` (n x width, from a multiple of `BLOCK` on) as float8_e4m3fn.

    Each block of `BLOCK` rows and columns has the scale max |w| / 448 in float32, over its finite numbers, or 1 where
    all are 0; the code of a number is w / scale, rounded to nearest, ties to even. Infinities become the largest number
    of the block and are counted, NaN stays. Each block is worked out by itself: bits do not depend on the rows beside.
    """
    count, width = rows.shape
    across = -(-width // BLOCK)
    codes = torch.empty(count, width, dtype=torch.float8_e4m3fn, device=rows.device)
    scales = torch.empty(-(-count // BLOCK), across, dtype=torch.float32, device=rows.device)
    made = Quantized(codes, scales, 0, [], [])
    for top in range(0, count, BLOCK):
        for left in range(0, width, _TILE):
            tile = rows[top : top + BLOCK, left : left + _TILE].contiguous()
            sizes = tile.abs()
            sizes = torch.where(sizes.isfinite(), sizes, 0.0).amax(dim=0)
            padded = torch.zeros(-(-len(sizes) // BLOCK) * BLOCK, dtype=sizes.dtype, device=sizes.device)
            padded[: len(sizes)] = sizes
            largest = padded.view(-1, BLOCK).amax(dim=1)
            # In double precision, so that the scale is rounded once whatever the dtype of the arithmetic.
            scale = (largest.double() / LARGEST).clamp(_LEAST, _MOST).float()
            scale = torch.where(largest > 0, scale, 1.0)
            scales[top // BLOCK, left // BLOCK : left // BLOCK + len(scale)] = scale
            spread = scale.repeat_interleave(BLOCK)[: tile.shape[1]].to(tile.dtype)
            parts = tile / spread
            made.overflow += int(torch.count_nonzero(parts.abs() > REACH))
            stored = parts.clamp_(-LARGEST, LARGEST).to(codes.dtype)
            codes[top : top + BLOCK, left : left + _TILE] = stored
            apart = (tile - stored.to(tile.dtype).mul_(spread)).double().reshape(-1)
            wide = tile.double().reshape(-1)
            made.squares.append(total(wide * wide))
            made.left.append(total(apart * apart))
    return made


@functools.cache
def in_bands() -> Method:
    """A method of the plan that changes nothing, and has rows come in bands of `BLOCK`."""
    return method(reach="row", row_axis="first", rows=BLOCK, inputs=(1, 1), public=False)(same)


def same(xs: Sequence[Tensor]) -> Tensor:
    """The rows as they are; they are stored in FP8."""
    return xs[0]
