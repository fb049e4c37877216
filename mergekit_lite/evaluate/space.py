"""Holes as Optuna's distributions, and what it draws as settings of the recipe."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergekit_lite.recipe.holes import Hole, points, setting

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


def distributions(holes: Sequence[Hole]) -> dict[str, BaseDistribution]:
    """What each hole may hold, by its path."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, BaseDistribution] = {}
    for hole in holes:
        if hole.kind == "choice":
            found[hole.path] = CategoricalDistribution([_category(value) for value in hole.values])
        elif isinstance(hole.low, int):
            found[hole.path] = IntDistribution(int(hole.low), int(hole.high), step=int(hole.step or 1))
        else:
            found[hole.path] = FloatDistribution(hole.low, hole.high, log=hole.log, step=hole.step)
    return found


def grid(holes: Sequence[Hole]) -> Iterator[dict[str, Any]]:
    """All fillings of holes of which none has endless many values, as they are drawn."""
    values = [[_category(value) if hole.kind == "choice" else value for value in points(hole) or ()] for hole in holes]
    for point in itertools.product(*values):
        yield dict(zip((hole.path for hole in holes), point, strict=True))


def settings(holes: Sequence[Hole], drawn: Mapping[str, Any]) -> list[str]:
    """The settings (`--set`) that fill the holes with what was drawn."""
    return [setting(hole.path, value(hole, drawn[hole.path])) for hole in holes]


def value(hole: Hole, drawn: Any) -> Any:
    """What was drawn, as the recipe writes it."""
    if hole.kind == "choice":
        return next(value for value in hole.values if _category(value) == drawn)
    return drawn


def _category(value: Any) -> str:
    """A choice as a text: Optuna takes no lists, and holds 1 and true for one."""
    return json.dumps(value)
