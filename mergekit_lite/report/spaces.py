"""The spaces of a checkpoint as rows of a table: those that differ in the numbers of their names alone share a row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from mergekit_lite.family.spaces import Space

SHOWN = 4  # axes that a row names before it only counts
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True, slots=True)
class SpaceRow:
    """Spaces alike. `name` has a range for each number in which they differ (`layers.{0..31}.mlp`); `axes` counts the
    axes of tensors of one of them, `along` names some: the last part of the tensor's name, and the axis."""

    name: str
    kind: str
    spaces: int
    units: int
    group: int
    axes: int
    along: str


def rows_of(spaces: Iterable[Space]) -> list[SpaceRow]:
    """The table, in the order of the spaces."""
    alike: dict[tuple[object, ...], list[Space]] = {}
    for space in spaces:
        axes = frozenset((_NUMBER.sub("{}", use.tensor), use.axis) for use in space.uses)
        key = (_NUMBER.sub("{}", space.name), space.kind, space.size, space.group, len(space.renames), axes)
        alike.setdefault(key, []).append(space)
    return [_row(group) for group in alike.values()]


def as_json(spaces: Iterable[Space]) -> list[dict[str, object]]:
    """All that is known of every space."""
    return [asdict(space) for space in spaces]


def _row(group: Sequence[Space]) -> SpaceRow:
    first = group[0]
    axes = list(dict.fromkeys((use.tensor, use.axis) for use in first.uses))
    named = dict.fromkeys(f"{_short(tensor)} {axis}" for tensor, axis in axes)
    along = ", ".join(list(named)[:SHOWN])
    if len(named) > SHOWN:
        along += f" and {len(named) - SHOWN} more"
    if first.renames:
        moved = f"{len(first.renames)} tensors of each unit"
        along = f"{along}; {moved}" if along else moved
    name = _ranged([space.name for space in group])
    return SpaceRow(name, first.kind, len(group), first.size, first.group, len(axes), along)


def _short(tensor: str) -> str:
    """The last part of a name that says something, without `.weight`."""
    return ".".join(tensor.removesuffix(".weight").split(".")[-1 if tensor.endswith(".weight") else -2 :])


def _ranged(names: Sequence[str]) -> str:
    """One name for all: with a range for each number in which they differ."""
    found = [map(int, _NUMBER.findall(name)) for name in names]
    ranges = iter([_range(sorted(set(numbers))) for numbers in zip(*found, strict=True)])
    return _NUMBER.sub(lambda _: next(ranges), names[0])


def _range(numbers: Sequence[int]) -> str:
    first, last = numbers[0], numbers[-1]
    if first == last:
        return str(first)
    if last - first == len(numbers) - 1:
        return f"{{{first}..{last}}}"
    return "{" + ",".join(map(str, numbers)) + "}"
