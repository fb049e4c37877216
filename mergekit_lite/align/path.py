"""The shortest path through all points of a distance matrix: nearest neighbour from several starts, then 2-opt and
Or-opt until neither finds a gain (Bentley, ORSA Journal on Computing 1992). Nine points or fewer: every order is tried.

Libraries were measured on 128 and 1024 points in 64 dimensions. fast-tsp stops by the clock, so its answer is not
repeatable; LKH (elkai) may be used for research only and took 43 s for 1024 points; both want the distances of a closed
tour in whole numbers. The paths found here, in 2 s for 1024 points, are 2 to 3% longer than theirs.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Distances = NDArray[np.floating]  # n x n, symmetric, zeros on the diagonal
Path = NDArray[np.int64]

ALL_ORDERS = 9  # up to here every order is tried
NEAR = 32  # candidates for a new edge of each point
ALL_NEAR = 64  # up to so many points all others are candidates, so that no move that gains is overlooked
SEGMENT = 3  # points that Or-opt moves together at most


def shortest_path(
    distances: Distances, *, starts: int = 4, seed: int = 0, check: Callable[[], None] = lambda: None
) -> Path:
    """An order of the points in which the sum of distances between neighbours is small, and the least up to nine
    points. It is never longer than the order they have. Of an order and its reverse the lexicographically smaller one
    is given; points at distance 0 of each other follow one another in the order of their indices.

    `starts` nearest-neighbour paths, their first points drawn with `seed`, and the given order are improved and the
    best is taken: the same answer every time. `check` is called now and then and may raise.
    """
    if len(distances) <= 2:
        return np.arange(len(distances), dtype=np.int64)
    twins = (distances == 0).argmax(axis=1)  # of each point the first at distance 0, which may be itself
    single = np.flatnonzero(twins == np.arange(len(twins)))
    between = distances if len(single) == len(twins) else distances[np.ix_(single, single)]
    path = single[_shortest(between, starts, seed, check)]
    ways = [np.concatenate([np.flatnonzero(twins == one) for one in way]) for way in (path, path[::-1])]
    return min(ways, key=lambda way: way.tolist())


def path_length(distances: Distances, path: Path) -> float:
    """The sum of distances between neighbours."""
    return float(distances[path[:-1], path[1:]].sum(dtype=np.float64))


def _shortest(distances: Distances, starts: int, seed: int, check: Callable[[], None]) -> Path:
    count = len(distances)
    if count <= 2:
        return np.arange(count, dtype=np.int64)
    if count <= ALL_ORDERS:
        return _of_all(distances)
    near = _near(distances)
    first = np.random.default_rng(seed).permutation(count)[:starts]
    paths = [np.arange(count, dtype=np.int64), *(_nearest_neighbour(distances, int(start)) for start in first)]
    found = [_Tour(distances, near, path).improved(check) for path in paths]
    return min(found, key=lambda path: path_length(distances, path))


def _of_all(distances: Distances) -> Path:
    count = len(distances)
    orders = np.array(list(itertools.permutations(range(count))), dtype=np.int64)
    orders = orders[orders[:, 0] < orders[:, -1]]
    lengths = distances[orders[:, :-1], orders[:, 1:]].sum(axis=1, dtype=np.float64)
    # Sums of the same numbers in another order differ in their last bits; the first of the least is taken.
    order: Path = orders[np.argmax(lengths <= lengths.min() * (1 + 1e-12))]
    return order


def _near(distances: Distances) -> Path:
    """For each point the nearest others, and the point that closes the tour."""
    count = len(distances)
    width = count - 1 if count <= ALL_NEAR else NEAR
    found = np.full((count, width + 1), count, dtype=np.int64)
    for point in range(count):
        row = distances[point].copy()
        row[point] = np.inf
        nearest = np.argpartition(row, width - 1)[:width]
        found[point, :width] = nearest[np.lexsort((nearest, row[nearest]))]
    return found


def _nearest_neighbour(distances: Distances, start: int) -> Path:
    path = np.empty(len(distances), dtype=np.int64)
    taken = np.zeros(len(distances), dtype=distances.dtype)
    for place in range(len(path)):
        path[place] = start
        taken[start] = np.inf
        start = int((distances[start] + taken).argmin())
    return path


class _Tour:
    """A path under 2-opt and Or-opt. One more point, at distance 0 of all others, closes it to a tour, which is cut
    there again in the end. `near` holds for every other point those that it may be joined to."""

    def __init__(self, distances: Distances, near: Path, path: Path):
        self._d, self._near = distances, near
        self._tour = np.append(path, len(path))
        self._n = len(self._tour)
        self._place = np.argsort(self._tour)
        self._least = 1e-9 * float(distances.max(initial=0.0))

    def improved(self, check: Callable[[], None]) -> Path:
        """The open path, once no point has a move that shortens it. Points whose neighbours changed are looked at
        again at once, and all of them until none has moved: a stretch that was turned round gives moves to points that
        kept their neighbours."""
        while self._swept(check):
            pass
        cut = int(self._place[-1])
        return np.concatenate((self._tour[cut + 1 :], self._tour[:cut]))

    def _swept(self, check: Callable[[], None]) -> bool:
        """Looks at every point, and at those that a move touches again; whether there was a move."""
        waiting = deque(int(point) for point in self._tour if point != self._n - 1)
        queued = np.ones(self._n, dtype=bool)
        queued[-1] = False
        turn, moved = 0, False
        while waiting:
            if turn % 1024 == 0:
                check()
            turn += 1
            point = waiting.popleft()
            queued[point] = False
            for other in self._move(point):
                moved = True
                if not queued[other] and other != self._n - 1:
                    queued[other] = True
                    waiting.append(other)
        return moved

    def _at(self, place: Path) -> Path:
        return self._tour.take(place, mode="wrap")

    def _between(self, a: Path | int, b: Path | int) -> NDArray[np.float64]:
        """Distances, 0 from the closing point. In float64: in less, rounding makes moves that undo each other gains."""
        last = self._n - 2
        found: NDArray[np.float64] = self._d[np.minimum(a, last), np.minimum(b, last)].astype(np.float64)
        return found * (np.maximum(a, b) <= last)

    def _move(self, a: int) -> list[int]:
        """Makes the best move that joins `a` to a near point; the points whose neighbours changed, none if no move
        shortens the tour."""
        d, i, c = self._between, int(self._place[a]), self._near[a]
        j = self._place[c]
        joined = d(a, c)
        ends = np.stack((self._at(j + 1), self._at(j - 1)))  # the points after and before each near point
        opened = d(c, ends)

        # 2-opt: with the two points after (or the two before) joined in turn.
        own = self._at(np.array((i + 1, i - 1)))
        turned = d(a, own)[:, None] + opened - joined - d(own[:, None], ends)

        # Or-opt: a segment with `a` at one end goes between a near point and the one after or before it.
        steps = np.array([(side, size) for size in range(SEGMENT) for side in ((1, -1) if size else (1,))])
        side, size = steps.T
        z, outer_a, outer_z = (self._at(i + side * step) for step in (size, -1, size + 1))
        removed = d(outer_a, a) + d(z, outer_z) - d(outer_a, outer_z)
        first = np.where(side > 0, i, i - size)
        moved = removed[:, None, None] - joined + opened - d(z[:, None, None], ends)
        inside = ((np.concatenate((j[None], self._place[ends])) - first[:, None, None]) % self._n) <= size[
            :, None, None
        ]
        moved[inside[:, :1] | inside[:, 1:]] = -np.inf

        gains = np.concatenate((turned.ravel(), moved.ravel()))
        best = int(gains.argmax())
        if not gains[best] > self._least:
            return []
        if best < turned.size:
            way, k = divmod(best, len(c))
            if way == 0:
                self._reverse(i + 1, int(j[k]))
            else:
                self._reverse(i, int(j[k]) - 1)
            return [a, int(own[way]), int(c[k]), int(ends[way, k])]
        segment, way, k = (int(index) for index in np.unravel_index(best - turned.size, moved.shape))
        self._insert(int(first[segment]), int(size[segment]) + 1, int(side[segment]), int(j[k]), before=bool(way))
        return [a, *(int(p) for p in (z[segment], outer_a[segment], outer_z[segment], c[k], ends[way, k]))]

    def _reverse(self, first: int, last: int) -> None:
        """Turns round the stretch from one place to another, or, which is the same tour, all the rest."""
        size = (last - first) % self._n + 1
        if 2 * size > self._n:
            first, size = last + 1, self._n - size
        places = np.arange(first, first + size) % self._n
        self._tour[places] = self._tour[places[::-1]]
        self._place[self._tour[places]] = places

    def _insert(self, first: int, size: int, side: int, target: int, before: bool) -> None:
        """Takes `size` points from `first` on and puts them after or before the point at `target`, the end that `side`
        says next to it."""
        around = self._at(np.arange(first, first + self._n))
        segment, rest = around[:size], around[size:]
        place = (target - first) % self._n - size + (not before)
        if (side > 0) == before:
            segment = segment[::-1]
        self._tour = np.concatenate((rest[:place], segment, rest[place:]))
        self._place[self._tour] = np.arange(self._n)
