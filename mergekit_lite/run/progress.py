"""What a run is asked for and what it tells: options, progress, findings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mergekit_lite.checkpoint.meta import STORED_BITS
from mergekit_lite.plan.model import Unit

if TYPE_CHECKING:
    from mergekit_lite.run.alignment import Solved

COUNTS = ("nonfinite", "output_nonfinite", "overflow")  # what is counted in a unit, by tensor


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. `phase` is `align` (orders of units), `measure` (statistics over all tensors) or `merge`.
    `done` and `total` count bytes written, in `measure` tensors looked at, in `align` spaces; `read` counts bytes read
    so far; `label` names the tensor last finished, in `align` the space. A tensor in the middle of a long iteration
    tells its steps, done and all, in `within`, and counts in `done` by its share."""

    phase: str
    label: str
    step: str
    done: int
    total: int
    tensors: int
    all_tensors: int
    shard: int
    shards: int
    read: int
    within: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """How a run goes about it; none of these changes a byte of the result."""

    threads: int = 1
    block: int = 1 << 16
    strict: bool = False
    device: str = "cpu"
    progress: Callable[[Progress], None] = field(default=lambda progress: None)
    check: Callable[[], None] = field(default=lambda: None)  # called between blocks; raises to stop the run
    abort: Callable[[], None] = field(default=lambda: None)  # called when the run stops early: nobody is to wait then
    found: Callable[[str, Sequence[Any]], None] = field(default=lambda name, stats: None)  # called with new statistics


@dataclass
class Findings:
    """What a run saw: non-finite numbers by `file:tensor` in the inputs and by tensor in the outputs, numbers out of
    the range of the output's dtype by tensor, bytes read, units taken over from an earlier run, the orders of units
    that were found by step, and figures of tensors by the number of the output; `squares` are those of the parts of
    weights in FP8."""

    nonfinite: dict[str, int] = field(default_factory=dict)
    output_nonfinite: dict[str, int] = field(default_factory=dict)
    overflow: dict[str, int] = field(default_factory=dict)
    bytes_read: int = 0
    bytes_fetched: int = 0
    resumed: int = 0
    alignments: dict[str, Solved] = field(default_factory=dict)
    figures: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    squares: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)

    def add(self, entry: Mapping[str, Any]) -> None:
        for key in COUNTS:
            mine = getattr(self, key)
            # Journals of earlier versions do not count in outputs.
            for name, count in entry.get(key, {}).items():
                mine[name] = mine.get(name, 0) + count
        for output, told in entry.get("figures", {}).items():
            self.figures.setdefault(output, {}).update(told)
        for output, parts in entry.get("squares", {}).items():
            mine = self.squares.setdefault(output, {})
            for name, found in parts.items():
                mine.setdefault(name, []).extend(found)

    def as_json(self) -> dict[str, Any]:
        """All but the orders of units, which every rank finds for itself."""
        return {
            **{key: getattr(self, key) for key in (*COUNTS, "figures", "squares")},
            "bytes_read": self.bytes_read,
            "bytes_fetched": self.bytes_fetched,
            "resumed": self.resumed,
        }

    @classmethod
    def sum(cls, parts: Iterable[Mapping[str, Any]]) -> Findings:
        """What several ranks saw, each of them given as a dictionary."""
        total = cls()
        for part in parts:
            total.add(part)
            total.bytes_read += part["bytes_read"]
            total.bytes_fetched += part["bytes_fetched"]
            total.resumed += part["resumed"]
        return total


def written(unit: Unit) -> int:
    """Bytes that a unit writes."""
    return sum((unit.stop - unit.start) * STORED_BITS[t.dtype] // 8 for _, t in unit.targets)
