"""The `score` section: the commands that say how good a merge is, for `merge search`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergekit_lite.errors import Problem, suggest
from mergekit_lite.recipe.model import Scoring
from mergekit_lite.recipe.node import ListNode, MapNode, Node, ScalarNode, describe

KEYS = ("name", "command", "metric", "goal", "timeout", "screen")
SCREEN_KEYS = ("command", "metric", "goal", "timeout")
GOALS = ("max", "min")
PLACES = ("{model}", "{out}")
_EXAMPLE = 'for example `score: {command: "python score.py {model}", metric: accuracy, goal: max}`'
_HINTS = {
    "goal": "`max` where large scores are good, `min` where small ones are",
    "timeout": "seconds, for example `timeout: 600`",
    "metric": "where the number is in the JSON that is printed, for example `metric: results.accuracy`",
    "name": "a word for tables, for example `name: accuracy`",
}


def read_scores(node: Node | None, problems: list[Problem]) -> tuple[Scoring, ...]:
    """The scores that `node` writes, one mapping or a list of them; findings go to `problems`."""
    if node is None:
        return ()
    items = node.items if isinstance(node, ListNode) else (node,)
    if not items:
        problems.append(Problem("`score` is an empty list", node.mark, _EXAMPLE))
    found = [_read(item, KEYS, None, problems) for item in items]
    whole = [score for score in found if score is not None]
    for number, score in enumerate(whole):
        if any(score.name == other.name for other in whole[:number]):
            hint = "give each a `name` of its own"
            problems.append(Problem(f"two scores are called `{score.name}`", score.mark, hint))
        if score.screen is not None and len(items) > 1:
            message = "a search with several scores gives up no trial early"
            problems.append(Problem(message, score.mark, "leave out `screen`, or keep one score"))
    return tuple(whole)


def written(score: Scoring) -> dict[str, Any]:
    """The score as the data that its YAML text writes."""
    data: dict[str, Any] = {"name": score.name} if score.name != (score.metric or "score") else {}
    data["command"] = score.command
    if score.metric is not None:
        data["metric"] = score.metric
    data["goal"] = score.goal
    if score.timeout is not None:
        data["timeout"] = score.timeout
    if score.screen is not None:
        data["screen"] = {k: v for k, v in written(replace(score.screen, screen=None)).items() if k != "name"}
    return data


def _read(node: Node, keys: Sequence[str], above: Mapping[str, Any] | None, problems: list[Problem]) -> Scoring | None:
    what = "`score`" if above is None else "`screen`"
    if not isinstance(node, MapNode):
        problems.append(Problem(f"{what} must be a mapping, not {describe(node)}", node.mark, _EXAMPLE))
        return None
    before = len(problems)
    found: dict[str, Any] = {}
    for key, entry in node.entries.items():
        if key not in keys:
            problems.append(Problem(f"{what} has no key `{key}`", entry.mark, suggest(key, keys)))
        elif key != "screen":
            found[key] = _value(key, entry.value, problems)
    for key in ("command", "goal"):
        if key not in found and (above is None or key == "command"):
            missing = "does not say whether large or small scores are good" if key == "goal" else "has no `command`"
            hint = f"`goal: max` or `goal: min`; {_EXAMPLE}" if key == "goal" else _EXAMPLE
            problems.append(Problem(f"{what} {missing}", node.mark, hint))
    if above is not None and "goal" not in found:
        found["goal"] = above.get("goal")
    command = found.get("command")
    if isinstance(command, str) and PLACES[0] not in command:
        hint = "`{model}` stands for the folder of the merged checkpoint"
        problems.append(Problem(f"the command has no `{PLACES[0]}`", node.entries["command"].value.mark, hint))
    screen = node.get("screen") if above is None else None
    first = _read(screen, SCREEN_KEYS, found, problems) if screen is not None else None
    if len(problems) > before:
        return None
    name = found.get("name") or found.get("metric") or "score"
    return Scoring(
        name, found["command"], found.get("metric"), found["goal"], found.get("timeout"), node.mark, screen=first
    )


def _value(key: str, node: Node, problems: list[Problem]) -> Any:
    value = node.value if isinstance(node, ScalarNode) else None
    if key == "goal":
        sound = value in GOALS
    elif key == "timeout":
        number = isinstance(value, int | float) and not isinstance(value, bool)
        sound = number and math.isfinite(value) and value > 0  # type: ignore[arg-type, operator]
    else:
        sound = isinstance(value, str) and bool(value.strip())
    if not sound:
        wanted = {"goal": "max or min", "timeout": "a number of seconds"}.get(key, "a text")
        message = f"`{key}` must be {wanted}, not {describe(node)}"
        problems.append(Problem(message, node.mark, _HINTS.get(key, _EXAMPLE)))
        return None
    return value
