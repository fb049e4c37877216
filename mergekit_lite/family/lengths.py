"""How long the axes of a family's tensors are: sizes from config.json, or from the tensors where it is left to them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from mergekit_lite.errors import InputError
from mergekit_lite.family import expression
from mergekit_lite.family.expression import Axis, Product, Sum, Word
from mergekit_lite.family.fit import Fitted
from mergekit_lite.family.layout import SpaceRule
from mergekit_lite.family.section import lookup
from mergekit_lite.family.template import Bound, filled, placeholders


@dataclass(frozen=True, slots=True)
class Placed:
    """One axis of one tensor and what lies along it."""

    tensor: str
    axis: int
    length: int
    node: Axis
    bound: Bound
    weighed: bool


@dataclass(frozen=True, slots=True)
class Meant:
    """What a word means on an axis: a space with its numbers (`grouped`: its groups), where it may be permuted."""

    rule: SpaceRule
    numbers: Bound
    grouped: bool

    @property
    def name(self) -> str:
        return filled(self.rule.name, self.numbers)


class Lengths:
    """The sizes of all spaces and axes of a fitted layout.

    InputError where config.json lacks a key, where an axis is longer or shorter than its parts, and where the tensors
    do not tell a size that the file leaves to them.
    """

    def __init__(self, fitted: Fitted, config: Mapping[str, Any], axes: Sequence[Placed]):
        self._layout, self._fixed, self._family = fitted.layout, fitted.fixed, fitted.family
        self._config, self._section = config, fitted.section
        self._told: dict[str, int] = {}
        self._known: dict[tuple[str, str | None, tuple[tuple[str, int], ...]], int] = {}
        rules = fitted.layout.spaces.values()
        texts = [
            *fitted.layout.sizes.values(),
            *(r.size for r in rules if r.size),
            *(r.groups[1] for r in rules if r.groups),
        ]
        self._asked = sorted({key for text in texts for key in expression.keys(text)})
        numbers: dict[str, set[int]] = defaultdict(set)
        for hit in fitted.hits.values():
            for place, number in hit.bound.items():
                numbers[place].add(number)
        self._numbers = {place: sorted(found) for place, found in numbers.items()}
        self._settle(axes)

    def meant(self, word: Word, bound: Bound) -> Meant | None:
        """The space that a word means; None for a size and for what is fixed here."""
        rule = self._layout.space_of(word.name)
        if rule is None or rule.word in self._fixed:
            return None
        numbers = dict(bound)
        if word.index is not None:
            (place,) = placeholders(rule.name)
            number = self._indexed(word.index, place, bound)
            if number is None:
                return None
            numbers[place] = number
        if rule.last_fixed:
            place = placeholders(rule.name)[-1]
            if numbers[place] == self._numbers[place][-1]:
                return None
        return Meant(rule, numbers, rule.groups is not None and word.name == rule.groups[0])

    def size(self, meant: Meant) -> int:
        """The number of units of a space."""
        if meant.rule.size is not None:
            return self._number(meant.rule.size, meant.numbers, f"the size of `{meant.rule.word}`")
        return self._told[meant.name]

    def value(self, text: str, numbers: Bound, word: str | None = None) -> int:
        """What a size of the family's file comes to; `word` where it has a name there."""
        return self._number(text, numbers, f"`{text}`", word)

    def groups(self, meant: Meant) -> int:
        """The number of groups of a space, which is that of its units where it has none."""
        if meant.rule.groups is None:
            return self.size(meant)
        return self._number(meant.rule.groups[1], meant.numbers, f"`{meant.rule.groups[0]}`")

    def length(self, node: Axis, bound: Bound, whole: int | None = None) -> int | None:
        """How many entries a part of an axis has; `fixed` takes what the axis of `whole` entries leaves. None: open."""
        match node:
            case int():
                return node
            case Sum(parts) | Product(parts):
                lengths = [self.length(part, bound) for part in parts]
                known = [length for length in lengths if length is not None]
                total = sum(known) if isinstance(node, Sum) else prod(known)
                if len(known) == len(parts):
                    return total
                free = [part for part, length in zip(parts, lengths, strict=True) if length is None]
                if whole is None or len(free) > 1 or not self._free(free[0], bound):
                    return None
                # What does not come out even is a length other than `whole`, which the caller reports.
                return max(whole, total) if isinstance(node, Sum) else total * max(1, whole // max(1, total))
            case Word(name):
                meant = self.meant(node, bound)
                if meant is not None:
                    if meant.grouped:
                        return self.groups(meant)
                    return self.size(meant) if meant.rule.size is not None else self._told.get(meant.name)
                if name in self._layout.sizes:
                    return self._number(self._layout.sizes[name], bound, f"`{name}`", name)
                stated = self._stated(node, bound)
                return whole if stated is None else stated
        raise AssertionError(node)

    def _stated(self, word: Word, bound: Bound) -> int | None:
        # A space that is fixed here still has the size that the file gives it.
        rule = self._layout.space_of(word.name)
        if rule is None or rule.size is None:
            return None
        grouped = rule.groups is not None and rule.groups[0] == word.name
        text = rule.groups[1] if grouped and rule.groups is not None else rule.size
        return self._number(text, bound, f"`{word.name}`")

    def _free(self, part: Axis, bound: Bound) -> bool:
        return isinstance(part, Word) and self.meant(part, bound) is None

    def _indexed(self, index: tuple[str | None, int], place: str, bound: Bound) -> int | None:
        base, shift = index
        if base is None:
            among = self._numbers.get(place, [])
            return shift if shift >= 0 else (among[-1] if among else None)
        among = self._numbers[base]
        position = among.index(bound[base]) + shift
        return among[position] if 0 <= position < len(among) else None

    def _settle(self, axes: Sequence[Placed]) -> None:
        pending = list(axes)
        while pending:
            still = [placed for placed in pending if not self._settled(placed)]
            if len(still) == len(pending):
                raise InputError(f"`{still[0].tensor}` leaves the sizes along its axis {still[0].axis} open")
            pending = still

    def _settled(self, placed: Placed) -> bool:
        if isinstance(placed.node, Word):
            meant = self.meant(placed.node, placed.bound)
            if meant is not None and meant.rule.size is None:
                self._told.setdefault(meant.name, placed.length)
        length = self.length(placed.node, placed.bound, placed.length)
        if length is None:
            return False
        if length != placed.length:
            raise InputError(
                f"`{placed.tensor}` has {placed.length} entries along axis {placed.axis}, where config.json and the "
                f"other tensors tell {length}",
                hint=f"is this a checkpoint of the family `{self._family}`, and its config.json the one it came with?",
            )
        return True

    def _number(self, text: str, bound: Bound, what: str, word: str | None = None) -> int:
        """The value of a size, which may use sizes that stand before it in the file and the numbers in names."""
        place = (text, word, tuple((key, bound[key]) for key in self._asked if key in bound))
        if place not in self._known:
            self._known[place] = self._computed(text, bound, what, word)
        return self._known[place]

    def _computed(self, text: str, bound: Bound, what: str, word: str | None) -> int:
        earlier = list(self._layout.sizes)
        if word is not None:
            earlier = earlier[: earlier.index(word)]

        def value(key: str) -> int | float | None:
            if key in bound:
                return bound[key]
            if key in earlier:
                return self._number(self._layout.sizes[key], bound, what, key)
            stated = lookup(self._config, self._section + key)
            return stated if isinstance(stated, int | float) and not isinstance(stated, bool) else None

        try:
            found = expression.size(text, value)
        except (ValueError, OverflowError) as fault:
            raise InputError(f"config.json does not fit the family `{self._family}`: {what}: {fault}") from None
        if found is None:
            missing = ", ".join(f"`{self._section}{key}`" for key in expression.keys(text) if value(key) is None)
            raise InputError(f"config.json does not state {missing} as a number, as {what} of `{self._family}` needs")
        return found
