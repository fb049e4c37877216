"""Numbers that are worked out as they are read: FP8 with scales, and the types of GGUF."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergekit_lite.checkpoint.dtype import TORCH_DTYPES
from mergekit_lite.checkpoint.meta import Packed, TensorMeta

PIECE = 1 << 16  # numbers that the gguf library works out at once: it takes several times their size meanwhile


class ByteSource(Protocol):
    """Where stored tensors come from."""

    def read_bytes(self, meta: TensorMeta, start_byte: int, stop_byte: int, buffer: memoryview, /) -> None:
        """Stored bytes of a tensor into `buffer`."""
        ...


class Unpacker:
    """Works out the numbers of packed tensors. Scales are read once and kept. For one thread."""

    def __init__(self, source: ByteSource):
        self._source = source
        self._scales: dict[TensorMeta, Tensor] = {}

    def load(self, meta: TensorMeta, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a packed tensor in float32, flat, in memory of their own. Bits depend neither on
        where a part begins nor on where it ends."""
        assert meta.packed is not None
        if start == stop:
            return torch.empty(0)
        if meta.packed.scale is not None:
            return self._scaled(meta, meta.packed, meta.packed.scale, start, stop)
        out = torch.empty(stop - start, dtype=torch.float32)
        if not meta.packed.heads:
            self._groups(meta, meta.packed, start, stop, out.numpy())
            return out
        width = max(1, meta.numel // meta.shape[0])
        first, last = start // width, -(-stop // width)
        rows = out if (first * width, last * width) == (start, stop) else torch.empty((last - first) * width)
        for at, count, stored in _runs(meta.shape[0] // meta.packed.heads, first, last):
            # Every second row is meant; reading the others with them is quicker than reading one by one.
            both = np.empty((2 * count - 1) * width, dtype=np.float32)
            self._groups(meta, meta.packed, stored * width, (stored + 2 * count - 1) * width, both)
            wanted = torch.from_numpy(both).view(-1, width)[::2]
            rows.view(-1, width)[at - first : at - first + count] = wanted
        if rows is not out:
            out.copy_(rows[start - first * width : stop - first * width])
        return out

    def _bytes(self, meta: TensorMeta, start: int, stop: int) -> NDArray[np.uint8]:
        raw = np.empty(stop - start, dtype=np.uint8)
        self._source.read_bytes(meta, start, stop, raw.data)
        return raw

    def _scaled(self, meta: TensorMeta, packed: Packed, scale: TensorMeta, start: int, stop: int) -> Tensor:
        codes = TORCH_DTYPES[packed.kind]
        values = torch.from_numpy(self._bytes(meta, start, stop)).view(codes).to(torch.float32)
        known = self._scales.get(scale)
        if known is None:
            raw = torch.from_numpy(self._bytes(scale, 0, scale.nbytes))
            known = self._scales[scale] = raw.view(TORCH_DTYPES[scale.dtype]).to(torch.float32)
        if known.numel() == 1:
            return values.mul_(known)
        width, height = meta.shape[-1], meta.shape[-2]
        down, across = -(-height // packed.block[0]), -(-width // packed.block[1])
        first, last = start // width, -(-stop // width)
        rows = torch.arange(first, last)
        of_rows = known.view(-1, across)[rows // height * down + rows % height // packed.block[0]]
        spread = of_rows.repeat_interleave(packed.block[1], dim=1)[:, :width].reshape(-1)
        return values.mul_(spread[start - first * width : stop - first * width])

    def _groups(self, meta: TensorMeta, packed: Packed, start: int, stop: int, out: NDArray[np.float32]) -> None:
        """Elements [start, stop) in the order in which they are stored into `out`."""
        numbers, nbytes = packed.group
        piece = max(1, PIECE // numbers) * numbers
        at = start // numbers * numbers
        while at < stop:
            end = min(at + piece, -(-stop // numbers) * numbers)
            raw = self._bytes(meta, at // numbers * nbytes, end // numbers * nbytes)
            found = _decoded(packed.kind, raw)
            low, high = max(at, start), min(end, stop)
            out[low - start : high - start] = found[low - at : high - at]
            at = end


def _decoded(kind: str, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    if kind in TORCH_DTYPES:
        plain: NDArray[np.float32] = torch.from_numpy(raw).view(TORCH_DTYPES[kind]).to(torch.float32).numpy()
        return plain
    import gguf

    with np.errstate(all="ignore"):  # a damaged scale may be infinite: that is counted, not warned of here
        found = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    result: NDArray[np.float32] = found.reshape(-1)
    return result


def _runs(size: int, first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """The rows [first, last) of heads of `size` rows as runs `(row, count, where the first of them is stored)`; each
    next one is stored two rows further. Row j * size / 2 + i of a head is stored as its row 2 i + j."""
    half = size // 2
    while first < last:
        head, within = divmod(first, size)
        part, place = divmod(within, half)
        count = min(last - first, half - place)
        yield first, count, head * size + 2 * place + part
        first += count
