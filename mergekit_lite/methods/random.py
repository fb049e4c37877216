"""Random masks that depend on a key and an element's place alone: any block of a tensor can be drawn by itself."""

from __future__ import annotations

import hashlib
import json
from json.encoder import encode_basestring_ascii

import numpy as np
from numpy.typing import NDArray

from mergekit_lite.lazy import Tensor, torch

_CANONICAL = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"))


def derive_key(*parts: str | int) -> int:
    """64 bits that stand for `parts`: the first 8 bytes, little-endian, of the SHA-256 of their canonical JSON."""
    return int.from_bytes(hashlib.sha256(_CANONICAL.encode(parts).encode()).digest()[:8], "little")


class Keys:
    """`derive_key` for parts that differ in the last alone, a text: `Keys(*parts).of(Keys.ending(last))` is
    `derive_key(*parts, last)`, several times as fast."""

    def __init__(self, *parts: str | int):
        self._begun = hashlib.sha256(f"{_CANONICAL.encode(parts)[:-1]},".encode())

    @staticmethod
    def ending(last: str) -> bytes:
        """How the canonical JSON ends with the last part."""
        return f"{encode_basestring_ascii(last)}]".encode()

    def of(self, ending: bytes) -> int:
        """The key of these parts and the last one."""
        hashed = self._begun.copy()
        hashed.update(ending)
        return int.from_bytes(hashed.digest()[:8], "little")


def uniform_words(key: int, start: int, n: int) -> NDArray[np.uint32]:
    """Words `start` to `start` + `n` - 1 of the stream of `key`: uniform 32-bit numbers, NumPy's since torch hardly
    computes with unsigned ones.

    Word i is half i % 2 (0: the low one) of number i // 2 of the generator Philox4x64-10 with this key, whose every
    counter value gives four 64-bit numbers. NumPy promises that this stream stays as it is.
    """
    words: NDArray[np.uint32] = _stream(key, start // 2, (start + n + 1) // 2).view("<u4")
    return words[start % 2 : start % 2 + n]


def keep_mask(key: int, start: int, n: int, density: float) -> Tensor:
    """Which of the elements `start` to `start` + `n` - 1 are kept, each by itself with probability `density`.

    A bool tensor of `n` entries on the CPU. The probability is rounded to a multiple of 2**-32. An element's number has
    its upper 16 bits from the stream of `key` (quarter i % 4 of number i // 4, the lowest first); the lower ones decide
    once in 65536 times, and are word i of the stream of `key` + 1.
    """
    bound = round(density * 2**32)
    if bound >= 2**32:
        return torch.ones(n, dtype=torch.bool)
    upper, lower = divmod(bound, 2**16)
    halves = _stream(key, start // 4, (start + n + 3) // 4).view("<u2")[start % 4 :][:n]
    kept = halves < np.uint16(upper)
    if lower:
        for place in np.flatnonzero(halves == np.uint16(upper)).tolist():
            kept[place] = int(uniform_words((key + 1) % 2**64, start + place, 1)[0]) >> 16 < lower
    return torch.from_numpy(kept)


def normal_numbers(key: int, start: int, n: int) -> NDArray[np.float64]:
    """Entries `start` to `start` + `n` - 1 of the stream of `key`, standard normal: the quantiles at (w + 1/2) / 2**32
    of its words w, so that none is beyond 6.4."""
    from scipy.special import ndtri

    # Number by number, not in vectors of the processor: an entry does not depend on the block that it is drawn in.
    drawn: NDArray[np.float64] = ndtri((uniform_words(key, start, n).astype(np.float64) + 0.5) / 2**32)
    return drawn


def _stream(key: int, first: int, last: int) -> NDArray[np.uint64]:
    """The 64-bit numbers `first` to `last` - 1 that the generator makes from `key`."""
    counter, skip = divmod(first, 4)
    # Only `key` and `counter` define the stream; the generator is used for this block alone.
    wide = np.random.Philox(key=key, counter=counter).random_raw(skip + last - first)[skip:]
    return wide.astype("<u8", copy=False)
