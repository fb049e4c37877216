"""Settings that may differ from tensor to tensor: a plain value, a curve over layer depth, globs over tensor names."""

from __future__ import annotations

import fnmatch
import functools
import re
from dataclasses import dataclass

from mergekit_lite.errors import Mark

Scalar = float | int | bool | str | None | tuple["Scalar", ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """A piecewise linear function of depth: `points` stand at equal distances from the first layer (0) to the last
    (1)."""

    points: tuple[float, ...]

    def at(self, depth: float) -> float:
        """The curve's value at `depth` in [0, 1]."""
        if len(self.points) == 1:
            return float(self.points[0])
        place = min(max(depth, 0.0), 1.0) * (len(self.points) - 1)
        left = min(int(place), len(self.points) - 2)
        share = place - left
        return self.points[left] * (1.0 - share) + self.points[left + 1] * share


@dataclass(frozen=True, slots=True)
class Rule:
    """`value` for tensors whose name matches `glob` (None: every tensor)."""

    glob: str | None
    value: Scalar | Curve
    mark: Mark


@dataclass(frozen=True, slots=True)
class Value:
    """A setting as written: rules tried in order, the first that applies wins.

    A curve applies only to tensors that belong to a layer; others fall through to the next rule (`else`). `mark` is the
    place of the value, `key_mark` that of the setting's name.
    """

    rules: tuple[Rule, ...]
    mark: Mark
    key_mark: Mark | None = None

    @classmethod
    def plain(cls, value: Scalar, mark: Mark) -> Value:
        return cls((Rule(None, value, mark),), mark)

    @property
    def constant(self) -> bool:
        """True where the value is the same for every tensor."""
        return len(self.rules) == 1 and self.rules[0].glob is None and not isinstance(self.rules[0].value, Curve)

    def scalars(self) -> list[tuple[Scalar, Mark]]:
        """Every number or word that stands in the setting, for range and kind checks."""
        found: list[tuple[Scalar, Mark]] = []
        for rule in self.rules:
            points = rule.value.points if isinstance(rule.value, Curve) else (rule.value,)
            found += [(point, rule.mark) for point in points]
        return found

    def at(self, name: str, depth: float | None) -> Scalar | NoValue:
        """The value for tensor `name` at `depth` (0 first layer, 1 last, None outside the layers), or `NO_VALUE`."""
        for rule in self.rules:
            if rule.glob is not None and not glob_matches(rule.glob, name):
                continue
            if not isinstance(rule.value, Curve):
                return rule.value
            if depth is not None:
                return rule.value.at(depth)
        return NO_VALUE


class NoValue:
    """The type of `NO_VALUE`: no rule of a setting applies to a tensor."""


NO_VALUE = NoValue()


@functools.lru_cache(maxsize=4096)
def _pattern(glob: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(glob))


def glob_matches(glob: str, name: str) -> bool:
    """Shell-style match over the whole tensor name; `*` crosses dots."""
    return _pattern(glob).match(name) is not None
