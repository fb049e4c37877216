"""Magnitudes as whole numbers, and windows of them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mergekit_lite.lazy import Tensor, torch

Keys = NDArray[np.signedinteger]

# By item size: the mask that clears the sign's bit, and the key that stands for every NaN, the first above infinity.
_BITS = {4: (0x7FFF_FFFF, 0x7F80_0001), 8: (0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0001)}
_FLOATS = {4: np.float32, 8: np.float64}


def keys_of(x: Tensor) -> Keys:
    """The keys of a float32 or float64 tensor: the bits of |x| as int32 or int64, ordered as |x|, NaN at the top."""
    integer = torch.int32 if x.itemsize == 4 else torch.int64
    keys: Keys = x.view(integer).bitwise_and(_BITS[x.itemsize][0]).cpu().numpy()
    return keys


def by_rank(keys: Keys) -> NDArray[np.int64]:
    """Where the keys of every row of a (rows, length) array stand, as flat indices: those of a row from the largest key
    to the smallest, of equal ones the first first."""
    rows, length = keys.shape
    if keys.itemsize == 4:
        # Numbers that carry their index along sort faster than indices. The complement puts the largest first.
        carried = (~keys.astype(np.int64) << 32) | np.arange(length)
        carried.sort(axis=1)
        order = carried & 0xFFFFFFFF
    else:
        order = np.argsort(-keys, axis=1, kind="stable")
    order += (np.arange(rows) * length)[:, None]
    return order


def key_value(key: int, dtype: np.dtype[np.signedinteger]) -> float:
    """The magnitude that `key` stands for."""
    return float(np.array(key, dtype=dtype).view(_FLOATS[dtype.itemsize]))


def matching(keys: Keys, key: int) -> NDArray[np.bool_]:
    """Where `keys` are `key`; any NaN is the key of NaN."""
    found: NDArray[np.bool_] = keys == key if key < _top(keys.dtype) else keys >= key
    return found


def _top(dtype: np.dtype[np.signedinteger]) -> int:
    return _BITS[dtype.itemsize][1]


class Tally(NamedTuple):
    """How many keys are above a window, inside it but above its guess, and the guess itself."""

    above: int = 0
    higher: int = 0
    equal: int = 0

    def plus(self, other: Tally) -> Tally:
        return Tally(self.above + other.above, self.higher + other.higher, self.equal + other.equal)


class Window:
    """The keys from `low` to `high`, both included (None: no end, every NaN counted as one key).

    Gathers the keys that fall inside, and only counts them where they are more than `limit`. `guess` is a key inside
    that may well be the one that is sought. Safe to use from several threads.
    """

    def __init__(self, low: int, high: int | None, limit: int, guess: int | None = None):
        self.low = low
        self.high = high
        self.guess = guess
        self.count = 0
        self.dtype: np.dtype[np.signedinteger] = np.dtype(np.int32)
        self._limit = limit
        self._lock = threading.Lock()
        # One array from the start: many small ones that stay would keep the allocator from using what large blocks
        # between them have left.
        self._gathered: Keys | None = None
        self._waiting = 0
        self._distinct: tuple[Keys, NDArray[np.int64]] | None = None
        self._bins: NDArray[np.int64] | None = None
        self._shift = 0

    def take(self, keys: Keys) -> Tally:
        """Take in `keys`; gives what they add to the tally."""
        above = higher = equal = 0
        if self.low == self.high:
            above = int(np.count_nonzero(keys > self.low))
            equal = int(np.count_nonzero(keys >= self.low)) - above
            with self._lock:
                self.dtype = keys.dtype
                self.count += equal
            return Tally(above, 0, equal)
        if self.high is None:
            inside = np.minimum(keys[keys >= self.low] if self.low else keys, _top(keys.dtype))
        else:
            over = keys > self.high
            above = int(np.count_nonzero(over))
            inside = keys[(keys >= self.low) ^ over]
        if self.guess is not None:
            higher = int(np.count_nonzero(inside > self.guess))
            equal = int(np.count_nonzero(inside == self.guess))
        with self._lock:
            self.dtype = keys.dtype
            self.count += len(inside)
            if self._gathered is None:
                self._gathered = np.empty(self._limit, dtype=keys.dtype)
            while len(inside):
                if self._waiting == self._limit:
                    self._spill()
                part = inside[: self._limit - self._waiting]
                self._gathered[self._waiting : self._waiting + len(part)] = part
                self._waiting += len(part)
                inside = inside[len(part) :]
        return Tally(above, higher, equal)

    def find(self, rank: int) -> tuple[int, int | None, int, int]:
        """Where the `rank`-th largest key of the window lies: (low, high, keys of the window above high, keys between).

        low equals high where the key is known.
        """
        if self.low == self.high:
            return self.low, self.low, 0, self.count
        if self._bins is None and self._distinct is None:
            keys = self._keys()
            key = int(np.partition(keys, len(keys) - rank)[len(keys) - rank])
            return key, key, int(np.count_nonzero(keys > key)), int(np.count_nonzero(keys == key))
        self._spill()
        if self._distinct is not None:
            keys, counts = self._distinct
            at_least = np.cumsum(counts[::-1])
            place = int(np.searchsorted(at_least, rank))
            key, inside = int(keys[::-1][place]), int(counts[::-1][place])
            return key, key, int(at_least[place]) - inside, inside
        assert self._bins is not None
        at_least = np.cumsum(self._bins[::-1])
        place = int(np.searchsorted(at_least, rank))
        number = len(self._bins) - 1 - place
        low = self.low + (number << self._shift)
        high = min(low + (1 << self._shift) - 1, self._end())
        inside = int(self._bins[number])
        open_end = self.high is None and low < high == self._end()
        return low, None if open_end else high, int(at_least[place]) - inside, inside

    def _end(self) -> int:
        return _top(self.dtype) if self.high is None else self.high

    def _keys(self) -> Keys:
        """The keys that wait."""
        return np.empty(0, self.dtype) if self._gathered is None else self._gathered[: self._waiting]

    def _spill(self) -> None:
        """Put the gathered keys away: as distinct keys with their counts while these are few (differences of numbers of
        low precision), else in bins of 2**shift keys each."""
        keys, counts = np.unique(self._keys(), return_counts=True)
        self._waiting = 0
        if self._bins is None:
            if self._distinct is not None:
                keys, places = np.unique(np.concatenate([self._distinct[0], keys]), return_inverse=True)
                counts = _totals(places, np.concatenate([self._distinct[1], counts]), len(keys))
            if len(keys) <= self._limit // 2:
                self._distinct = keys, counts
                return
            self._distinct = None
            span = self._end() - self.low + 1
            while -(-span >> self._shift) > self._limit:
                self._shift += 1
            self._bins = np.zeros(((span - 1) >> self._shift) + 1, dtype=np.int64)
        self._bins += _totals((keys - self.low) >> self._shift, counts, len(self._bins))


def _totals(places: NDArray[np.signedinteger], counts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """How much of `counts` falls on each place; the sums are whole numbers far below 2**53."""
    return np.bincount(places, weights=counts, minlength=length).astype(np.int64)


class Estimate:
    """What a sample tells of the keys of all tensors: `samples` are (number of entries, some of their keys)."""

    def __init__(self, samples: Sequence[tuple[int, Keys]]):
        keys = np.concatenate([keys for _, keys in samples])
        weights = np.repeat([numel / len(keys) for numel, keys in samples], [len(keys) for _, keys in samples])
        order = np.argsort(keys)[::-1]
        self._keys = keys[order]
        self._above = np.cumsum(weights[order])

    def around(self, rank: int, bias: float) -> tuple[int, int, int | None]:
        """(low, guess, high): the key at `rank` as the sample has it, and a window that holds the true one in all
        likelihood: 4.5 standard errors and a share `bias` of all entries to both sides."""
        total, sampled = float(self._above[-1]), len(self._keys)
        share = min(1.0, rank / total)
        margin = total * (bias + 4.5 * (share * (1 - share) / sampled) ** 0.5 + 2 / sampled)
        low = self._at(rank + margin) if rank + margin < total else 0
        high = self._at(rank - margin) if rank - margin > 0 else None
        top = _top(self._keys.dtype)
        return min(low, top), min(self._at(rank), top), None if high is None or high >= top else high

    def _at(self, rank: float) -> int:
        return int(self._keys[min(int(np.searchsorted(self._above, rank)), len(self._keys) - 1)])
