"""Random masks that depend on a key and an element's place alone: any block of a tensor can be drawn by itself."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def derive_key(*parts: str | int) -> int:
    """64 bits that stand for `parts`: the first 8 bytes, little-endian, of the SHA-256 of their canonical JSON."""
    text = json.dumps(parts, ensure_ascii=True, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def uniform_words(key: int, start: int, n: int) -> NDArray[np.uint32]:
    """Words `start` to `start` + `n` - 1 of the stream of `key`: uniform 32-bit numbers, NumPy's since torch hardly
    computes with unsigned ones.

    Word i is half i % 2 (0: the low one) of number i // 2 of the generator Philox4x64-10 with this key, whose every
    counter value gives four 64-bit numbers. NumPy promises that this stream stays as it is.
    """
    first, last = start // 2, (start + n + 1) // 2
    counter, skip = divmod(first, 4)
    # Only `key` and `counter` define the stream; the generator is used for this block alone.
    wide = np.random.Philox(key=key, counter=counter).random_raw(skip + last - first)[skip:]
    words: NDArray[np.uint32] = wide.astype("<u8", copy=False).view("<u4")
    return words[start % 2 : start % 2 + n]


def keep_mask(key: int, start: int, n: int, density: float) -> Tensor:
    """Which of the elements `start` to `start` + `n` - 1 are kept, each by itself with probability `density`.

    A bool tensor of `n` entries on the CPU. The probability is rounded to a multiple of 2**-32.
    """
    bound = round(density * 2**32)
    if bound >= 2**32:
        return torch.ones(n, dtype=torch.bool)
    return torch.from_numpy(uniform_words(key, start, n) < np.uint32(bound))
