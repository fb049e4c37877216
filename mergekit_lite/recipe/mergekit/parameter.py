"""mergekit's parameter values: a number, a gradient over the layers, a list of `{filter, value}`. Made into `Value`s.

mergekit asks for every tensor: source, slice, top, default; the first level whose list has an entry for the tensor
wins. The same here is one list of rules, level after level.

A gradient runs over the layers of its slice. Tensors outside the layers take its first value, the layer of a slice of
one layer its last, as in mergekit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mergekit_lite.errors import Mark, Problem, suggest
from mergekit_lite.recipe.mergekit.language import Setting
from mergekit_lite.recipe.node import Entry, ListNode, MapNode, Node, ScalarNode, describe
from mergekit_lite.recipe.value import Curve, Rule, Scalar, Value

_FILTERS = "for example `[{filter: mlp, value: 0.5}, {value: 0.3}]`"
_NUMBER = re.compile(r"(?:^|(?<=\.))(\d+)(?=\.|$)")
_WILD = re.compile(r"([*?[])")
_MANY = 1000


@dataclass(frozen=True, slots=True)
class Span:
    """Where the tensors stand that a value is for. `shift` is what must be taken from the layer numbers that mergekit
    sees to have those of the step's inputs, `count` the number of layers, None for whole models. `gradient` says which
    part of gradients counts: all of it, the first or the last value."""

    shift: int = 0
    count: int | None = None
    gradient: Literal["all", "first", "last"] = "all"


@dataclass(frozen=True, slots=True)
class Written:
    """One entry of a parameter: for names that hold `filter` (None: all), the points of a gradient, or one value."""

    filter: str | None
    points: tuple[float | bool, ...]
    mark: Mark


class Parameters:
    """Reads parameters, each entry once, so that a fault is told once however many steps it concerns."""

    def __init__(self, problems: list[Problem], notes: list[Problem]):
        self.problems = problems
        self.notes = notes
        self._read: dict[tuple[int, str], list[Written]] = {}
        self._told: set[tuple[str, Mark]] = set()

    def value(self, setting: Setting, levels: Sequence[Mapping[str, Entry]], span: Span, mark: Mark) -> Value | None:
        """What `levels` (highest first) and the default say for the tensors of `span`. None: nothing and no default.

        `mark` is the place for a default. A filter without an entry for all other names may leave a gap, where the
        parameter has no default.
        """
        rules: list[Rule] = []
        first: Entry | None = None
        for level in levels:
            entry = level.get(setting.name)
            if entry is None or _settled(rules):
                continue
            first = first or entry
            for written in self.written(setting, entry):
                rules += self.rules(setting, written, span)
        default = setting.default
        if not _settled(rules) and isinstance(default, bool | int | float):
            rules.append(Rule(None, setting.value(default), first.value.mark if first else mark))
        elif not _settled(rules) and rules and default is None and setting.implied is not None:
            rules.append(Rule(None, setting.implied, first.value.mark if first else mark))
        if not rules:
            return None
        return Value(_reachable(rules), first.value.mark if first else mark, first.mark if first else None)

    def written(self, setting: Setting, entry: Entry) -> list[Written]:
        """The entries of one parameter, in order."""
        key = (id(entry), setting.name)
        if key not in self._read:
            self._read[key] = self._entries(setting, entry.value)
        return self._read[key]

    def rules(self, setting: Setting, written: Written, span: Span) -> list[Rule]:
        glob: str | None = None
        if written.filter is not None:
            shifted = self._shifted(written, span)
            if shifted is None:
                return []
            glob = "*" + _WILD.sub(r"[\1]", shifted) + "*"
        points = [setting.value(point) for point in written.points]
        if all(point == points[0] for point in points) or span.gradient == "first":
            return [Rule(glob, points[0], written.mark)]
        if span.gradient == "last":
            return [Rule(glob, points[-1], written.mark)]
        numbers = tuple(float(point) for point in points if isinstance(point, int | float))
        return [Rule(glob, Curve(numbers), written.mark), Rule(glob, numbers[0], written.mark)]

    def tell(self, message: str, mark: Mark, hint: str | None) -> None:
        """Report a fault once."""
        if (message, mark) not in self._told:
            self._told.add((message, mark))
            self.problems.append(Problem(message, mark, hint))

    def note(self, message: str, mark: Mark, hint: str | None) -> None:
        """Remark on something once."""
        if (message, mark) not in self._told:
            self._told.add((message, mark))
            self.notes.append(Problem(message, mark, hint))

    def _entries(self, setting: Setting, node: Node) -> list[Written]:
        items = node.items if isinstance(node, ListNode) else (node,)
        if all(isinstance(item, ScalarNode) for item in items):
            points = self._points(setting, node)
            return [Written(None, points, node.mark)] if points else []
        found: list[Written] = []
        for item in items:
            if isinstance(item, MapNode):
                found += self._conditional(setting, item)
            else:
                message = f"`{setting.name}` mixes values with `{{filter, value}}` entries"
                self.tell(message, item.mark, f"give every entry its `value`, {_FILTERS}")
        return found

    def _conditional(self, setting: Setting, node: MapNode) -> list[Written]:
        for key, entry in node.entries.items():
            if key not in ("filter", "value"):
                self.tell(
                    f"an entry of `{setting.name}` has no key `{key}`", entry.mark, suggest(key, ("filter", "value"))
                )
        value = node.get("value")
        if value is None:
            self.tell(f"an entry of `{setting.name}` has no `value`", node.mark, _FILTERS)
            return []
        if isinstance(value, MapNode) or (
            isinstance(value, ListNode) and any(isinstance(i, MapNode) for i in value.items)
        ):
            self.tell(
                "entries with filters do not nest",
                value.mark,
                "write one entry for each filter, the first that fits wins",
            )
            return []
        points = self._points(setting, value)
        return [Written(name, points, value.mark) for name in self._filters(node.get("filter"))] if points else []

    def _filters(self, node: Node | None) -> list[str | None]:
        """The filters of an entry: one, or a list of which any may fit. None fits every name."""
        items = node.items if isinstance(node, ListNode) else (node,)
        found: list[str | None] = []
        for item in items:
            text = item.value if isinstance(item, ScalarNode) else ""
            if item is None or text is None or text == "*":
                found.append(None)
            elif isinstance(text, str) and text:
                found.append(text)
            else:
                self.tell(
                    f"`filter` must be a part of tensor names, not {describe(item)}",
                    item.mark,
                    "for example `filter: mlp`",
                )
        return found

    def _points(self, setting: Setting, node: Node) -> tuple[float | bool, ...]:
        items = node.items if isinstance(node, ListNode) else (node,)
        if not items or len(items) > _MANY:
            self.tell(
                f"`{setting.name}` is a list of {len(items)} values", node.mark, "for example `[0, 0.5, 1]`, a gradient"
            )
            return ()
        points = [self._point(setting, item, gradient=len(items) > 1) for item in items]
        whole = tuple(point for point in points if point is not None)
        if len(whole) < len(points):
            return ()
        if setting.kind == "flag" and len(set(whole)) > 1:
            self.tell(
                f"`{setting.name}` cannot change over the layers", node.mark, "choose true or false, or use filters"
            )
            return ()
        return whole

    def _point(self, setting: Setting, node: Node, gradient: bool) -> float | bool | None:
        value = node.value if isinstance(node, ScalarNode) else None
        if setting.kind == "flag":
            if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
                return bool(value)
            self.tell(f"`{setting.name}` is true or false, not {describe(node)}", node.mark, "for example `true`")
            return None
        number = _number(value)
        if number is None or (setting.kind == "integer" and not isinstance(number, int)):
            what = "a whole number" if setting.kind == "integer" else "a number"
            self.tell(f"`{setting.name}` must be {what}, not {describe(node)}", node.mark, _FILTERS)
            return None
        if setting.share and not 0 < number <= 1:
            return self._share(setting, number, node.mark, gradient)
        return number

    def _share(self, setting: Setting, number: float, mark: Mark, gradient: bool) -> float | None:
        if number > 1 and not gradient:
            self.note(f"`{setting.name}: {number:g}` keeps everything, as 1 does", mark, "write 1")
            return 1.0
        self.tell(f"`{setting.name}` is a share above 0 and up to 1, not {number:g}", mark, "for example `0.5`")
        return None

    def _shifted(self, written: Written, span: Span) -> str | None:
        """The filter with layer numbers as the step's inputs have them; None where it fits no layer of the slice."""
        text = written.filter
        assert text is not None
        numbers = [m for m in _NUMBER.finditer(text) if not text[: m.start()].endswith("experts.")]
        if not numbers or (span.shift == 0 and span.count is None):
            return text
        only = numbers[0]
        if span.shift == 0 and (len(numbers) > 1 or only.start() == 0 or only.end() == len(text)):
            return text
        if len(numbers) > 1 or only.start() == 0 or only.end() == len(text):
            message = f"`filter: {text}` holds a layer's number, which is another one inside this slice"
            self.tell(message, written.mark, "write the number between dots, for example `layers.20.`")
            return None
        number = int(only[1]) - span.shift
        if number < 0 or (span.count is not None and number >= span.count):
            return None
        return f"{text[: only.start()]}{number}{text[only.end() :]}"


def _settled(rules: Sequence[Rule]) -> bool:
    """Whether the last rule applies to every tensor that has come so far."""
    return bool(rules) and rules[-1].glob is None and not isinstance(rules[-1].value, Curve)


def _reachable(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules up to the first that applies to every tensor, each glob once (a curve may have a value behind it)."""
    kept: list[Rule] = []
    globs: set[str | None] = set()
    for rule in rules:
        if rule.glob in globs:
            continue
        kept.append(rule)
        if not isinstance(rule.value, Curve):
            globs.add(rule.glob)
            if rule.glob is None:
                break
    return tuple(kept)


def _number(value: Scalar) -> float | None:
    """The finite number that a scalar is. mergekit's YAML takes `1e-5` for text and reads the number in it later."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value
