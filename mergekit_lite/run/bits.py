"""Masks as they are stored: eight entries in a byte, the first in its lowest bit; or several tasks' coded together."""

from __future__ import annotations

import numpy as np

from mergekit_lite.checkpoint.frames import Frames
from mergekit_lite.checkpoint.meta import TensorMeta
from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.run.copy import ByteSource


class Masks:
    """Loads stored masks. For one thread."""

    def __init__(self, source: ByteSource):
        self._source = source
        self._frames = Frames(source)

    def load(self, meta: TensorMeta, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a mask, flat, as bytes that are 0 or 1."""
        if meta.coded is not None:
            return torch.from_numpy(self._frames.bits(meta, start, stop))
        first, last = start // 8, (stop + 7) // 8
        raw = np.empty(last - first, dtype=np.uint8)
        self._source.read_bytes(meta, first, last, raw.data)
        bits = np.unpackbits(raw, bitorder="little")
        return torch.from_numpy(bits[start - 8 * first : stop - 8 * first])


def pack_bits(values: Tensor) -> Tensor:
    """Which of `values` (flat) are not 0, eight to a byte; the bits behind the last one are 0."""
    return torch.from_numpy(np.packbits((values != 0).cpu().numpy(), bitorder="little"))
