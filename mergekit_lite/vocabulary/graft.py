"""Which rows of a tensor that is brought to another vocabulary are its own, and which are sums of others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Numbers = np.ndarray[Any, np.dtype[np.int32]]

SUM, EMPTY = -1, -2  # in place of a row: a sum of rows, zeros


@dataclass(frozen=True, slots=True, eq=False)
class Graft:
    """Where the rows of one tensor come from. `own` holds for each row of the result the model's own row of that token,
    or `SUM`, `EMPTY`; `given` is how many rows the other model's tensor has, in which sums are found. `atoms` are the
    rows there of tokens that both share, `sums` those that are approximated by them. The text of it is its digest."""

    own: Numbers
    given: int
    atoms: Numbers = field(init=False)
    sums: Numbers = field(init=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        import numpy as np

        place = np.arange(len(self.own), dtype=np.int32)
        object.__setattr__(self, "atoms", place[(self.own >= 0) & (place < self.given)])
        object.__setattr__(self, "sums", place[self.own == SUM])
        digest = hashlib.sha256(self.own.astype("<i4").tobytes() + b"%d" % self.given)
        object.__setattr__(self, "digest", digest.hexdigest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graft) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Graft({self.digest})"

    def __str__(self) -> str:
        return self.digest[:12]

    def __len__(self) -> int:
        return len(self.own)

    def keeps(self, rows: int) -> bool:
        """Whether a tensor of so many rows stays as it is."""
        import numpy as np

        return rows == len(self.own) and bool((self.own == np.arange(rows)).all())

    def counts(self) -> dict[str, int]:
        """How many rows are the model's own, sums, and zeros."""
        return {
            "shared": int((self.own >= 0).sum()),
            "approximated": len(self.sums),
            "zero": int((self.own == EMPTY).sum()),
        }


def graft(rows: int, shared: Mapping[int, int] | None, mine: int, given: int) -> Graft:
    """The rows of a tensor of `mine` rows when it gets `rows`, of which another model's tensor has the first `given`.
    `shared` are the model's ids by the other's, None where both have the same tokens under the same ids: then rows
    without a token are the model's own too."""
    import numpy as np

    own = np.full(rows, SUM, dtype=np.int32)
    if shared is None:
        own[: min(rows, mine)] = np.arange(min(rows, mine))
    else:
        for number, other in shared.items():
            if number < rows and other < mine:
                own[number] = other
    own[(own == SUM) & (np.arange(rows) >= given)] = EMPTY
    return Graft(own, given)
