"""What is to be reproduced, and whether it is: claims with their figures and bars, held against measurements.

A measurement is a name and a number for each thing that an experiment measures with one seed. Every figure and every
verdict is computed from measurements; none is written down.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

Measurement = dict[str, float]
Relation = Literal["at least", "at most", "above", "below"]
MET, MISSED, OPEN = "met", "missed", "not claimed"
SEEDS = 3  # the fewest that a claim is judged by, unless its experiment draws nothing at random


@dataclass(frozen=True)
class Found:
    """The measurements of one experiment by seed."""

    seeds: Mapping[int, Measurement]

    def __getitem__(self, name: str) -> list[float]:
        """One number by seed."""
        return [measured[name] for measured in self.seeds.values()]

    def mean(self, name: str) -> float:
        return fmean(self[name])

    def each(self, value: Callable[[Measurement], float]) -> list[float]:
        """What is computed of every seed's numbers."""
        return [value(measured) for measured in self.seeds.values()]


@dataclass(frozen=True)
class Figure:
    """A number that the page shows for every seed: `of` is its name in a measurement, or computes it. `expected` is
    what the specification's own implementation measured."""

    what: str
    of: str | Callable[[Measurement], float]
    expected: str = ""
    show: str = ".3f"

    def values(self, found: Found) -> list[float]:
        return found[self.of] if isinstance(self.of, str) else found.each(self.of)


@dataclass(frozen=True)
class Bar:
    """What is to be reached: a number computed of all seeds, and what it must be beside `limit`. One that is not
    `claimed` is shown, and does not count."""

    what: str
    of: Callable[[Found], float]
    relation: Relation
    limit: float
    show: str = ".3f"
    claimed: bool = True

    def met(self, found: Found) -> bool:
        """NaN reaches nothing."""
        value = self.of(found)
        return {
            "at least": value >= self.limit,
            "at most": value <= self.limit,
            "above": value > self.limit,
            "below": value < self.limit,
        }[self.relation]


@dataclass(frozen=True)
class Claim:
    """One row of the specification's plan. `source` names the paper and what it claims, `details` a page of docs/ that
    says more. Of a claim without bars that count nothing is claimed at this scale; then `notes` says why.
    `remark` says more of what was measured."""

    number: str
    title: str
    source: str
    setting: str
    figures: Sequence[Figure]
    bars: Sequence[Bar] = ()
    notes: str = ""
    details: str = ""
    remark: Callable[[Found], str] = lambda found: ""

    def missed(self, found: Found) -> list[Bar]:
        """The bars that count and are not reached."""
        return [bar for bar in self.bars if bar.claimed and not bar.met(found)]

    def verdict(self, found: Found) -> str:
        if not any(bar.claimed for bar in self.bars):
            return OPEN
        return MISSED if self.missed(found) else MET


@dataclass(frozen=True)
class Experiment:
    """What is measured together. `measure` gives the numbers of one seed; `setting` all that they depend on, made only
    when it is asked for. `drawn`: whether anything is drawn at random; otherwise one seed says all, and it is the
    program itself that is measured, anew each time."""

    name: str
    measure: Callable[[int], Measurement]
    setting: Callable[[], object]
    claims: Sequence[Claim]
    seeds: Sequence[int] = field(default=tuple(range(SEEDS)))
    drawn: bool = True

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self.setting()).encode()).hexdigest()[:12]

    def enough(self, found: Found) -> bool:
        """Whether there are as many seeds as a claim is judged by."""
        return not self.drawn or len(found.seeds) >= SEEDS
