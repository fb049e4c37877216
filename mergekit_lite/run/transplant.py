"""Rows of another vocabulary as sums of rows: found block by block, in batches that do not depend on the blocks."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mergekit_lite.errors import InputError
from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.pursuit import batch_size, pursue
from mergekit_lite.vocabulary.graft import Graft

PART = 1 << 20  # elements that are read at once

Rows = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor that rows are read from: `read` gives the elements [start, stop), flat; rows have `width` of them."""

    name: str
    read: Callable[[int, int], Tensor]
    width: int

    def rows(self, numbers: Rows) -> Tensor:
        """These rows, a matrix; they ascend. What lies together is read together, in parts."""
        cuts = [0, *(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
        out: Tensor | None = None
        step = max(1, PART // self.width)
        for i, j in itertools.pairwise(cuts):
            for k in range(i, j, step):
                top, count = int(numbers[k]), min(step, j - k)
                part = self.read(top * self.width, (top + count) * self.width).view(count, self.width)
                if out is None:
                    out = part.new_empty(len(numbers), self.width)
                out[k : k + count] = part
        if out is None:
            return self.read(0, 0).view(0, self.width)
        return out


@dataclass(slots=True)
class Shared:
    """What all threads of a run hold together, by what it is: the latest only, the others as long as one uses them."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _latest: tuple[object, Tensor] | None = None

    def get(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """What is held as `key`; the first that asks makes it, others wait."""
        with self._lock:
            if self._latest is None or self._latest[0] != key:
                self._latest = None  # before the next one is made
                self._latest = (key, make())
            return self._latest[1]


class Transplant:
    """Blocks of a tensor of another vocabulary: its own rows, and sums of them, as `graft` tells. `mine` is the tensor,
    `theirs` that of the other model in which the sums are found. For one thread."""

    def __init__(self, graft: Graft, terms: int, mine: Source, theirs: Source, shared: Shared, key: object):
        self._graft, self._terms, self._mine, self._theirs = graft, terms, mine, theirs
        self._shared, self._key = shared, key
        self._atoms: Tensor | None = None
        self._batch: tuple[int, Tensor] | None = None
        self._size = batch_size(terms, theirs.width, len(graft.atoms))

    def block(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop), whole rows, flat, in memory of their own. Raises InputError where the other model's
        rows are not finite."""
        width = self._mine.width
        top, bottom = start // width, stop // width
        own = self._graft.own[top:bottom]
        places = np.flatnonzero(own >= 0)
        places = places[np.argsort(own[places], kind="stable")]
        rows, back = np.unique(own[places], return_inverse=True)
        found = self._mine.rows(rows)
        out = found.new_zeros(bottom - top, width)
        out[torch.from_numpy(places).to(out.device)] = found[torch.from_numpy(back).to(out.device)]
        sums = self._graft.sums
        first, last = np.searchsorted(sums, [top, bottom]).tolist()
        while first < last:
            number = first // self._size
            end = min(last, (number + 1) * self._size)
            batch = self._made(number)[first - number * self._size : end - number * self._size]
            out[torch.from_numpy(sums[first:end] - top).long().to(out.device)] = batch
            first = end
        return out.reshape(-1)

    def _made(self, number: int) -> Tensor:
        """The rows of batch `number` of all sums."""
        if self._batch is None or self._batch[0] != number:
            self._batch = (number, self._sums(self._graft.sums[number * self._size : (number + 1) * self._size]))
        return self._batch[1]

    def _sums(self, sums: Rows) -> Tensor:
        if self._atoms is None:
            self._atoms = self._shared.get(self._key, self._read_atoms)
        wanted = self._finite(self._theirs.rows(sums))
        taken, parts = pursue(wanted, self._atoms, self._terms)
        rows, back = np.unique(self._graft.own[self._graft.atoms[taken.cpu().numpy()]], return_inverse=True)
        mine = self._mine.rows(rows)
        at = torch.from_numpy(back.reshape(taken.shape)).to(mine.device)
        # Row by row: a number that is not finite stays where it is, and so does the rounding.
        made = mine.new_empty(len(sums), self._mine.width)
        for i, part in enumerate(parts):
            used = part != 0
            made[i] = part[used] @ mine[at[i][used]].double()
        return made

    def _read_atoms(self) -> Tensor:
        return self._finite(self._theirs.rows(self._graft.atoms))

    def _finite(self, rows: Tensor) -> Tensor:
        # A sum looks at every number and takes no memory; it is wrong only towards looking closer.
        if not math.isfinite(float(rows.sum())) and not bool(torch.isfinite(rows).all()):
            hint = "sums of its rows cannot be found: repair the checkpoint, or take another one for `vocabulary`"
            raise InputError(f"`{self._theirs.name}` holds NaN or infinite numbers", hint=hint)
        return rows
