"""Which rule of a family's layout holds for each tensor of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from mergekit_lite.errors import InputError, Problem
from mergekit_lite.family.data import FamilyData, Prefix, families
from mergekit_lite.family.layout import AxisRule, Case, Layout
from mergekit_lite.family.section import lookup, section_of
from mergekit_lite.family.template import Table, fits

Shapes = Mapping[str, tuple[int, ...]]
_MOST_NAMED = 5
_HINT = "describe the family in a YAML file of its own (docs/families.md)"


@dataclass(frozen=True, slots=True)
class Hit:
    """The rule that names a tensor, the template that fits its name and the numbers in it."""

    rule: AxisRule
    template: str
    bound: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Fitted:
    """A layout fitted to a checkpoint. `hits` are in natural order; `fixed` are the words that may not be permuted."""

    family: str
    layout: Layout
    section: str
    hits: Mapping[str, Hit]
    fixed: frozenset[str]


def fit(config: Mapping[str, Any], shapes: Shapes, data: FamilyData | None) -> Fitted:
    """The family's layout, under the prefix that leaves the fewest tensors without a rule.

    InputError where the family is unknown, states no spaces or refuses this checkpoint, and where a tensor has no rule.
    """
    model_type, section = section_of(config, families() if data is None else data.model_types)
    if data is None:
        named = lookup(config, "model_type")
        if model_type is None:
            raise InputError(
                f"the spaces of model type `{named}` are unknown" if named else "config.json names no model type",
                hint=_HINT,
            )
        data = families()[model_type]
    if data.layout is None:
        raise InputError(f"the family `{data.name}` states no spaces", hint=_HINT)
    names = sorted(shapes, key=natural)
    best: tuple[list[str], list[Case], dict[str, Hit]] | None = None
    for prefix in data.prefixes:
        cases = [case for case in data.layout.cases if _holds(case, prefix, config, section, shapes)]
        hits, unknown = _hits(data.layout, cases, prefix, names)
        if best is None or len(unknown) < len(best[0]):
            best = (unknown, cases, hits)
    assert best is not None
    unknown, cases, hits = best
    refusal = next((case.refuse for case in cases if case.refuse is not None), None)
    if refusal is not None:
        raise InputError(f"the spaces of model type `{model_type}` are unknown: {refusal}", hint=_HINT)
    if unknown:
        raise InputError(_unknown(data.name, unknown))
    fixed = {word for case in cases for word in case.fixed}
    # What lies in the groups of a fixed space is numbered by it, and so fixed with it.
    fixed |= {rule.word for rule in data.layout.spaces.values() if rule.of in fixed}
    return Fitted(data.name, data.layout, section, hits, frozenset(fixed))


def natural(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts the numbers in names as numbers."""
    return [(part.isascii() and part.isdigit(), int(part) if part.isascii() and part.isdigit() else 0, part)
            for part in re.split(r"([0-9]{1,9})", name)]  # fmt: skip


def _hits(
    layout: Layout, cases: Sequence[Case], prefix: Prefix, names: Sequence[str]
) -> tuple[dict[str, Hit], list[str]]:
    rules = [rule for case in cases for rule in case.rules] + list(layout.rules)
    table = Table((prefix.fill(template), rule) for template, rule in rules)
    hits, unknown = {}, []
    for name in names:
        found = table.find(name)
        if found is None:
            unknown.append(name)
        else:
            hits[name] = Hit(*found)
    return hits, unknown


def _holds(case: Case, prefix: Prefix, config: Mapping[str, Any], section: str, shapes: Shapes) -> bool:
    stated = lookup(config, "architectures")
    names = [name for name in stated if isinstance(name, str)] if isinstance(stated, list) else []
    return (
        (not case.architecture or any(fnmatchcase(name, known) for name in names for known in case.architecture))
        and (not case.model_types or lookup(config, section + "model_type") in case.model_types)
        and all(lookup(config, section + str(key)) == value for key, value in case.config.items())
        and all(fits(prefix.fill(template), shapes) for template in case.has)
        and not any(fits(prefix.fill(template), shapes) for template in case.lacks)
    )


def _unknown(family: str, names: Sequence[str]) -> list[Problem]:
    found = [
        Problem(f"no rule of the family `{family}` names the tensor `{name}`, so the checkpoint's spaces are unknown")
        for name in names[:_MOST_NAMED]
    ]
    if len(names) > _MOST_NAMED:
        found.append(Problem(f"no rule names {len(names) - _MOST_NAMED} further tensors"))
    return found
