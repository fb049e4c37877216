"""The keys of a save that make a mask store of it: `as: masks`, `base`, `tasks`, `threshold`, `compress`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from mergekit_lite.errors import Mark, Problem, suggest
from mergekit_lite.recipe.location import NAME
from mergekit_lite.recipe.model import AsMasks, Ref
from mergekit_lite.recipe.node import ListNode, MapNode, Node, ScalarNode, describe

KEYS = ("as", "base", "tasks", "threshold", "compress")
COMPRESS = ("zstd",)
THRESHOLD = 0.4
_EXAMPLE = (
    "for example `save: {as: masks, base: base, step: multi, tasks: [math, code], threshold: 0.4, to: out/store}`"
)
_THRESHOLDS = "a number for all tasks, or one for each: `threshold: {math: 0.4, code: 0.5}`"


def read_masks(node: MapNode, read_ref: Callable[[Node, str], Ref | None], problems: list[Problem]) -> AsMasks | None:
    """The mask store that the save `node` writes with `as: masks`; None where it is at fault."""
    before = len(problems)
    mark = node.entries["as"].mark
    for key in ("base", "tasks", "step"):
        if key not in node.entries:
            what = "the multi-task vector as its `step`" if key == "step" else f"its `{key}`"
            problems.append(Problem(f"a save with `as: masks` names {what}", mark, _EXAMPLE))
    base = read_ref(node.entries["base"].value, "`base`") if "base" in node.entries else None
    tasks = _tasks(node.get("tasks"), read_ref, problems)
    thresholds = _thresholds(node.get("threshold"), list(tasks), problems)
    compress = _compress(node.get("compress"), problems)
    if len(problems) > before or base is None:
        return None
    return AsMasks(base, tasks, thresholds, mark, compress)


def _compress(node: Node | None, problems: list[Problem]) -> str | None:
    if node is None or (isinstance(node, ScalarNode) and node.value in COMPRESS):
        return None if node is None else str(node.value)
    hint = "leave it out to store a bit for every entry and task"
    problems.append(Problem(f"`compress` must be zstd, not {describe(node)}", node.mark, hint))
    return None


def _tasks(
    node: Node | None, read_ref: Callable[[Node, str], Ref | None], problems: list[Problem]
) -> Mapping[str, Ref]:
    """Models or steps by the name of their task: a mapping, or names that stand for themselves."""
    if node is None:
        return {}
    hint = "for example `tasks: [math, code]`, or `tasks: {math: org/math-7b}`"
    named: list[tuple[str, Mark, Node]] = []
    if isinstance(node, MapNode):
        named = [(name, entry.mark, entry.value) for name, entry in node.entries.items()]
    elif isinstance(node, ListNode):
        named = [
            (item.value if isinstance(item, ScalarNode) and isinstance(item.value, str) else "", item.mark, item)
            for item in node.items
        ]
    if not named:
        problems.append(Problem(f"`tasks` must name models or steps, not {describe(node)}", node.mark, hint))
    found: dict[str, Ref] = {}
    for name, mark, item in named:
        ref = read_ref(item, "a task")
        if ref is None:
            continue
        if not NAME.fullmatch(name):
            problems.append(Problem(f"`{name}` cannot be the name of a task", mark, f"name it: `{hint[12:]}"))
        elif name in found:
            problems.append(Problem(f"the task `{name}` is given twice", mark, "keep one of the two"))
        else:
            found[name] = ref
    return found


def _thresholds(node: Node | None, tasks: list[str], problems: list[Problem]) -> Mapping[str, float]:
    if not isinstance(node, MapNode):
        value = THRESHOLD if node is None else _number(node, problems)
        return dict.fromkeys(tasks, value)
    found = dict.fromkeys(tasks, THRESHOLD)
    for name, entry in node.entries.items():
        value = _number(entry.value, problems)
        if name in found:
            found[name] = value
        else:
            problems.append(Problem(f"there is no task `{name}`", entry.mark, suggest(name, tasks)))
    return found


def _number(node: Node, problems: list[Problem]) -> float:
    value: Any = node.value if isinstance(node, ScalarNode) else None
    if not isinstance(value, bool) and isinstance(value, int | float) and value >= 0 and math.isfinite(value):
        return float(value)
    message = f"`threshold` must be a number from 0 on, not {describe(node)}"
    problems.append(Problem(message, node.mark, _THRESHOLDS))
    return THRESHOLD
