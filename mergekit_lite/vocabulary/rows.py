"""Which row of which model's tensor becomes the row of each token of the output."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Numbers = np.ndarray[Any, np.dtype[np.int32]]

ZERO, MEAN, PAD = -1, -2, -3  # in place of an input: zeros, the mean of those that have the token, of all tokens' rows


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Where the rows of one remapped tensor come from. `source` holds for each row the number of an input or `ZERO`,
    `MEAN`, `PAD`; `row` the row in that input. `mean`, where there is a `MEAN`, holds for each input and row the row
    in it, -1 where the input lacks the token. The text of it is the digest of all that."""

    source: Numbers
    row: Numbers
    mean: Numbers | None
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        for array in (self.source, self.row, self.mean):
            digest.update(b"-" if array is None else array.astype("<i4").tobytes() + b"+")
        object.__setattr__(self, "digest", digest.hexdigest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Rows({self.digest})"

    def __str__(self) -> str:
        return self.digest[:12]

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a token's row comes from by the recipe: a model by its number and one of its rows, or zeros (`model` None);
    `given` False leaves the usual fallback. `force` holds also for models that have the token."""

    given: bool
    model: int | None
    row: int
    force: bool


class Table:
    """The rows of one kind of tensor for all models that have it.

    `ids` are the output's, `size` its rows, `models` every model's own ids and the rows of its tensor; the first
    `owners` of them are merged, `base` is the number of the base, if any.
    """

    def __init__(
        self,
        ids: Mapping[str, int],
        size: int,
        models: Sequence[tuple[Mapping[str, int], int]],
        owners: int,
        base: int | None,
        choices: Mapping[str, Choice],
    ):
        import numpy as np

        self.size = size
        filled = np.zeros(size, dtype=bool)
        filled[list(ids.values())] = True
        self.own = np.stack([_own(ids, size, *model) for model in models])
        has = self.own[:owners] >= 0
        count = has.sum(axis=0)
        owner = has.argmax(axis=0).astype(np.int32)
        self.source = np.where(count == 1, owner, np.where(count == 0, ZERO, MEAN)).astype(np.int32)
        if base is not None and base < owners:
            self.source[has[base]] = base
        self.source[~filled] = PAD
        taken = np.maximum(self.source, 0)
        self.row = np.where(self.source >= 0, self.own[taken, np.arange(size)], 0).astype(np.int32)
        self.force = np.zeros(size, dtype=bool)
        for token, choice in choices.items():
            number = ids[token]
            self.force[number] = choice.force
            if choice.given:
                self.source[number] = ZERO if choice.model is None else choice.model
                self.row[number] = choice.row
        self._owners = owners

    def of(self, model: int) -> tuple[list[int], Rows]:
        """The rows of this model's tensor: the models that they are taken from, in order, and where."""
        import numpy as np

        own = self.own[model]
        mine = (own >= 0) & ~self.force
        source = np.where(mine, model, self.source)
        row = np.where(mine, own, self.row)
        mean = self.own[: self._owners] if (source == MEAN).any() else None
        used = sorted({*source[source >= 0].tolist(), *(range(self._owners) if mean is not None else ())})
        if not used:
            used = [model]
        place = np.full(len(self.own), -1, dtype=np.int32)
        place[used] = np.arange(len(used), dtype=np.int32)
        source = np.where(source >= 0, place[np.maximum(source, 0)], source).astype(np.int32)
        rows = Rows(source, row.astype(np.int32), None if mean is None else mean[[u for u in used if u < len(mean)]])
        return used, rows

    def is_own(self, model: int, rows: int) -> bool:
        """Whether the model's tensor, of so many rows, stays as it is."""
        import numpy as np

        same = rows == self.size and not self.force.any()
        return same and bool((self.own[model] == np.arange(self.size)).all())

    def counts(self, model: int) -> dict[str, int]:
        """How many rows of the model are its own, come from another model (by number), are zero, a mean or padding."""
        import numpy as np

        mine = (self.own[model] >= 0) & ~self.force
        source = np.where(mine, model, self.source)
        found: dict[str, int] = {}
        for number, count in zip(*np.unique(source, return_counts=True), strict=True):
            name = {ZERO: "zero", MEAN: "mean", PAD: "padding"}.get(int(number), str(int(number)))
            found[name] = int(count)
        return found


def _own(ids: Mapping[str, int], size: int, own: Mapping[str, int], rows: int) -> Numbers:
    """For each id of the output the row that the model itself has for the token, or -1."""
    import numpy as np

    found = np.full(size, -1, dtype=np.int32)
    if own is ids:
        numbers = np.fromiter(ids.values(), dtype=np.int32, count=len(ids))
        found[numbers] = numbers
    else:
        for token, number in ids.items():
            found[number] = own.get(token, -1)
    found[found >= rows] = -1
    return found


def padded(tokens: int, multiple: int | None) -> int:
    """`tokens`, made up to a multiple."""
    return tokens if not multiple else -(-tokens // multiple) * multiple


def lost(table: Table, ids: Mapping[str, int]) -> Iterable[str]:
    """Tokens of which no model has a row, and none is chosen."""
    return (token for token, number in ids.items() if table.source[number] == ZERO)
