"""The k-th largest magnitudes of one tensor or of many, exact, in bounded memory, while the tensors stream by.

Magnitudes are compared as integers: the bits of |x|, read as a whole number (a *key*), have the order of |x|. The first
round looks at a sample and guesses a narrow window of keys for each rank; the second counts the keys above the window
and gathers those inside, or counts them in bins where they are many. Further rounds narrow a window, or replace one
that missed, until the key is known. Where entries of this very magnitude stand on both sides of the rank, last rounds
find the place among them. Only whole numbers are added up, so the outcome depends on no order of work.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mergekit_lite.lazy import Tensor
from mergekit_lite.methods.keys import Estimate, Keys, Tally, Window, key_value, keys_of, matching

LIMIT = 1 << 19  # keys gathered in a window, and its bins, at most
SAMPLED = 8  # the part of this limit that a sample is
SAMPLED_GRAINS = 16  # grains that the first round looks at in all; at least two of every tensor
PREFIX_BIAS = 0.0025  # how far, as a share of all entries, the start of a tensor may mislead about the rest of it
STRIDE_BIAS = 0.001  # the same for entries at equal distances in the whole tensor

# The magnitude at a rank, and where entries of this very magnitude stop to count: those before this flat index are
# among the `rank` largest, the others are not. None: all of them are.
Bound = tuple[float, int | None]


def keep_count(n: int, density: float) -> int:
    """How many of `n` entries are a share of `density`: rounded down, at least one."""
    if n == 0 or density <= 0:
        return 0
    return max(1, min(n, math.floor(density * n + 1e-9)))


def drop_count(n: int, gamma: float) -> int:
    """How many of `n` entries are a share of `gamma`: rounded down."""
    return max(0, min(n, math.floor(gamma * n + 1e-9)))


@dataclass(eq=False)
class _Target:
    """One rank on its way: the window it is sought in, then its key, then the entries of this key that count."""

    rank: int
    window: Window
    key: int | None = None
    need: int = 0
    equal: int = 0
    equals: list[int] | None = None
    cuts: list[int | None] = field(default_factory=list)


class _Sample:
    """At most `most` keys of a tensor, in memory that is there from the start: a few bytes kept of each block would
    break up what the allocator has left of the blocks, so that no later block fits in."""

    def __init__(self, most: int):
        self._room = np.empty(most, dtype=np.int64)
        self.keys: Keys = self._room[:0]

    def add(self, keys: Keys) -> None:
        count = len(self.keys)
        room = self._room.view(keys.dtype)
        room[count : count + len(keys)] = keys
        self.keys = room[: count + len(keys)]


class _SamplePart:
    """Keys at equal distances in the first grains of a tensor."""

    def __init__(self, numel: int, budget: int, grains: int):
        self.numel = numel
        self.sample = _Sample(3 * budget + grains)
        self._budget = budget
        self._grains = grains
        self._seen = 0

    def add(self, xs: Sequence[Tensor], start: int) -> bool:
        stride = max(1, min(self.numel, self._grains * len(xs[0])) // self._budget)
        self.sample.add(keys_of(xs[0][-start % stride :: stride].contiguous()))
        self._seen += 1
        return self._seen >= self._grains


class _WindowPart:
    """How many keys of a tensor lie above and inside each window; those inside go to the window."""

    def __init__(self, numel: int, targets: Sequence[_Target], stride: int | None):
        self.numel = numel
        self.sample = _Sample(-(-numel // stride) if stride is not None else 0)
        self.tallies = dict.fromkeys((t.window for t in targets), Tally())
        self._stride = stride

    def add(self, xs: Sequence[Tensor], start: int) -> bool:
        keys = keys_of(xs[0])
        if self._stride is not None:
            self.sample.add(keys[-start % self._stride :: self._stride])
        for window, tally in self.tallies.items():
            self.tallies[window] = tally.plus(window.take(keys))
        return False


class _CountPart:
    """How many entries of a tensor have each of some keys."""

    def __init__(self, keys: Sequence[int]):
        self.counts = dict.fromkeys(keys, 0)

    def add(self, xs: Sequence[Tensor], start: int) -> bool:
        keys = keys_of(xs[0])
        for key in self.counts:
            self.counts[key] += int(np.count_nonzero(matching(keys, key)))
        return False


class _CutPart:
    """Where the `need`-th entry of a key stands in a tensor, for several (key, need)."""

    def __init__(self, wanted: Sequence[tuple[int, int]]):
        self.cuts: dict[tuple[int, int], int] = {}
        self._seen = dict.fromkeys(wanted, 0)

    def add(self, xs: Sequence[Tensor], start: int) -> bool:
        keys = keys_of(xs[0])
        for key, need in [w for w in self._seen if w not in self.cuts]:
            places = np.flatnonzero(matching(keys, key))
            left = need - self._seen[key, need]
            if len(places) >= left:
                self.cuts[key, need] = start + int(places[left - 1]) + 1
            self._seen[key, need] += len(places)
        return len(self.cuts) == len(self._seen)


AnyPart = _SamplePart | _WindowPart | _CountPart | _CutPart


class OrderStatistics:
    """A `Measure`: for each rank k, the magnitude of the k-th largest |x| of all tensors together, exactly.

    Equal magnitudes rank by tensor, then by flat index; NaN is the largest of all. `numels` are the tensors' sizes. The
    result for a tensor is one `Bound` per rank. With `ties=False` all entries of the magnitude at the rank count, and
    no round is spent on the place among them. Zeros are not told apart either: it does not matter which of them count.

    Needs about 12 bytes times `limit` for each rank, whatever the sizes. Raises ValueError where a rank is not one of 1
    to the number of entries.
    """

    def __init__(self, ranks: Sequence[int], numels: Sequence[int], *, ties: bool = True, limit: int = LIMIT):
        self._numels = list(numels)
        self._total = sum(numels)
        self._ties = ties
        self._limit = limit
        self._sample = max(1, limit // SAMPLED)
        if self._total and not all(1 <= rank <= self._total for rank in ranks):
            raise ValueError(f"ranks {list(ranks)} of {self._total} entries")
        everything = Window(0, None, limit)
        self._targets = [_Target(rank, everything) for rank in ranks]
        self._phase = "window" if self._total <= limit else "sample"
        self._first = True

    def part(self, tensor: int) -> AnyPart | None:
        numel = self._numels[tensor]
        if not numel:
            return None
        if self._phase == "sample":
            budget = max(1, self._sample * numel // self._total)
            return _SamplePart(numel, budget, max(2, SAMPLED_GRAINS // len(self._numels)))
        if self._phase == "window":
            stride = max(1, self._total // self._sample) if self._first and self._total > self._limit else None
            return _WindowPart(numel, [t for t in self._targets if t.key is None], stride)
        if self._phase == "count":
            return _CountPart([_key(t) for t in self._targets if self._straddles(t) and t.equals is None])
        wanted = [(_key(t), place[1]) for t in self._targets if (place := self._place(t)) and place[0] == tensor]
        return _CutPart(wanted) if wanted else None

    def close(self, parts: Sequence[AnyPart | None]) -> bool:
        if not self._total:
            return False
        if self._phase == "sample":
            self._estimate(parts, self._targets, PREFIX_BIAS)
            self._phase = "window"
            return True
        if self._phase == "window":
            self._settle(parts)
            if any(t.key is None for t in self._targets):
                return True
            self._phase = "count"
            if any(self._straddles(t) and t.equals is None for t in self._targets):
                return True
        elif self._phase == "count":
            for target in self._targets:
                if self._straddles(target) and target.equals is None:
                    key = _key(target)
                    target.equals = [p.counts[key] if isinstance(p, _CountPart) else 0 for p in parts]
        if self._phase == "count":
            self._phase = "cut"
            if any(self._place(t) for t in self._targets):
                return True
        self._cut(parts)
        return False

    def result(self, tensor: int) -> tuple[Bound, ...]:
        if not self._total:
            return tuple((0.0, None) for _ in self._targets)
        return tuple((key_value(_key(t), t.window.dtype), t.cuts[tensor]) for t in self._targets)

    def _estimate(self, parts: Sequence[AnyPart | None], targets: Sequence[_Target], bias: float) -> None:
        """Give the targets windows by what the parts have sampled."""
        samples = [(p.numel, p.sample.keys) for p in parts if isinstance(p, (_SamplePart, _WindowPart))]
        estimate = Estimate(samples)
        for target in targets:
            low, guess, high = estimate.around(target.rank, bias)
            target.window = Window(low, high, self._limit, guess)

    def _settle(self, parts: Sequence[AnyPart | None]) -> None:
        """Look where each rank lies: its key is known now, or it gets a narrower or another window."""
        live = [p for p in parts if isinstance(p, _WindowPart)]
        missed = []
        for target in [t for t in self._targets if t.key is None]:
            window = target.window
            tally = functools.reduce(Tally.plus, (p.tallies[window] for p in live))
            left = target.rank - tally.above
            if not 0 < left <= window.count:
                missed.append(target)
            elif window.guess is not None and 0 < left - tally.higher <= tally.equal:
                target.key, target.need, target.equal = window.guess, left - tally.higher, tally.equal
                target.equals = [p.tallies[window].equal if isinstance(p, _WindowPart) else 0 for p in parts]
            else:
                low, high, higher, inside = window.find(left)
                if low != high:
                    target.window = Window(low, high, self._limit)
                    continue
                target.key, target.need, target.equal = low, left - higher, inside
                target.equals = [inside] if len(self._numels) == 1 else None
        if missed and self._first:
            self._estimate(parts, missed, STRIDE_BIAS)
        else:
            for target in missed:
                target.window = Window(0, None, self._limit)
        self._first = False

    def _straddles(self, target: _Target) -> bool:
        return self._ties and target.need < target.equal and target.key != 0

    def _place(self, target: _Target) -> tuple[int, int] | None:
        """The tensor in which the entries that count come to an end, and how many of its own count; None where they
        end with a tensor's last such entry."""
        if not self._straddles(target) or target.equals is None:
            return None
        left = target.need
        for tensor, equal in enumerate(target.equals):
            if left < equal:
                return (tensor, left) if left else None
            left -= equal
        return None

    def _cut(self, parts: Sequence[AnyPart | None]) -> None:
        for target in self._targets:
            target.cuts = [None] * len(self._numels)
            if not self._straddles(target) or target.equals is None:
                continue
            left = target.need
            for tensor, equal in enumerate(target.equals):
                part = parts[tensor]
                if left >= equal:
                    left -= equal
                elif left and isinstance(part, _CutPart):
                    target.cuts[tensor] = part.cuts[_key(target), left]
                    left = 0
                else:
                    target.cuts[tensor] = 0


def _key(target: _Target) -> int:
    assert target.key is not None
    return target.key
