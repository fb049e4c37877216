"""A setting's node as a `Value`: a scalar, a list, a curve over depth, globs with `else`."""

from __future__ import annotations

import difflib
import math

from mergekit_lite.errors import Mark, Problem
from mergekit_lite.recipe.node import Entry, ListNode, MapNode, Node, ScalarNode, describe
from mergekit_lite.recipe.value import NO_VALUE, Curve, NoValue, Rule, Scalar, Value

_CURVE_EXAMPLE = "for example `{across: [0.0, 0.5, 1.0]}`"
_GLOB_EXAMPLE = 'for example `{"*.mlp.*": 0.4, else: 0.5}`'


def read_value(entry: Entry, problems: list[Problem]) -> Value | None:
    """The value of the setting `entry`; findings go to `problems`, None where nothing can be made of it.

    A curve stands alone or has an `else` for the tensors outside the layers. The `else` of globs applies last, wherever
    it stands. A list stays one value: `layers: [0, 24]`, or one weight per input.
    """
    node = entry.value
    if not isinstance(node, MapNode):
        scalar = _scalar(node, problems)
        if isinstance(scalar, NoValue):
            return None
        return Value((Rule(None, scalar, node.mark),), node.mark, entry.mark)
    rules = _curve(node, None, node.mark, problems) if "across" in node.entries else _globs(node, problems)
    return Value(tuple(rules), node.mark, entry.mark) if rules else None


def _scalar(node: Node, problems: list[Problem]) -> Scalar | NoValue:
    """A number, a word or a list of them as a tuple; `NO_VALUE` where a mapping stands inside."""
    if isinstance(node, ScalarNode):
        return node.value
    if isinstance(node, MapNode):
        problems.append(Problem("a list holds numbers or words, not a mapping", node.mark, "for example `[0.7, 0.3]`"))
        return NO_VALUE
    items = [_scalar(item, problems) for item in node.items]
    whole = tuple(item for item in items if not isinstance(item, NoValue))
    return whole if len(whole) == len(items) else NO_VALUE


def _curve(node: MapNode, glob: str | None, mark: Mark, problems: list[Problem]) -> list[Rule]:
    """The rules of `{across: [..]}` and `{across: [..], else: ..}`, both for tensors that `glob` names."""
    for key, entry in node.entries.items():
        if key not in ("across", "else"):
            hint = f"a curve is `across` and, for tensors outside the layers, `else`; {_CURVE_EXAMPLE}"
            problems.append(Problem(f"a curve has no key `{key}`", entry.mark, hint))
    points = _points(node.entries["across"].value, problems)
    rules = [] if points is None else [Rule(glob, Curve(points), mark)]
    outside = node.entries.get("else")
    if outside is not None:
        if isinstance(outside.value, MapNode):
            message = f"the `else` of a curve is one value, not {describe(outside.value)}"
            problems.append(Problem(message, outside.value.mark, "for example `{across: [0.0, 1.0], else: 0.5}`"))
        elif not isinstance(value := _scalar(outside.value, problems), NoValue):
            rules.append(Rule(glob, value, outside.mark))
    return rules


def _points(node: Node, problems: list[Problem]) -> tuple[float, ...] | None:
    if not isinstance(node, ListNode):
        message = f"`across` must be a list of numbers, not {describe(node)}"
        problems.append(Problem(message, node.mark, _CURVE_EXAMPLE))
        return None
    if len(node.items) < 2:
        message = f"a curve needs at least 2 points, not {len(node.items)}"
        problems.append(Problem(message, node.mark, f"{_CURVE_EXAMPLE}; a value for all depths is a plain number"))
        return None
    points: list[float] = []
    for item in node.items:
        value = item.value if isinstance(item, ScalarNode) else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            message = f"a point of a curve must be a finite number, not {describe(item)}"
            problems.append(Problem(message, item.mark, _CURVE_EXAMPLE))
        else:
            points.append(float(value))
    return tuple(points) if len(points) == len(node.items) else None


def _globs(node: MapNode, problems: list[Problem]) -> list[Rule]:
    if not node.entries:
        problems.append(Problem("an empty mapping is no value", node.mark, _GLOB_EXAMPLE))
    rules: list[Rule] = []
    otherwise: list[Rule] = []
    for key, entry in node.entries.items():
        meant = _misspelt(key)
        if meant:
            message = f"`{key}` is neither `across` nor `else` nor a glob over tensor names"
            problems.append(Problem(message, entry.mark, f"did you mean `{meant}`?"))
            continue
        found = otherwise if key == "else" else rules
        glob = None if key == "else" else key
        if not isinstance(entry.value, MapNode):
            value = _scalar(entry.value, problems)
            found += [] if isinstance(value, NoValue) else [Rule(glob, value, entry.mark)]
        elif "across" in entry.value.entries:
            found += _curve(entry.value, glob, entry.mark, problems)
        else:
            message = f"`{key}` needs a number, a word or a curve, not {describe(entry.value)}"
            problems.append(Problem(message, entry.value.mark, f"globs do not nest; {_GLOB_EXAMPLE}"))
    return rules + otherwise


def _misspelt(key: str) -> str | None:
    """`across` or `else` where `key` is almost one of them and cannot be a pattern. Tensor names hold a dot."""
    if key == "else" or any(sign in key for sign in ".*?["):
        return None
    return next(iter(difflib.get_close_matches(key.lower(), ["across", "else"], n=1, cutoff=0.8)), None)
