"""The `push` part of a save: where on the Hub the output is published once the run is done."""

from __future__ import annotations

import re
from typing import Any

from mergekit_lite.errors import Problem, suggest
from mergekit_lite.recipe.model import Push
from mergekit_lite.recipe.node import MapNode, Node, ScalarNode, describe

KEYS = ("repo", "private", "branch", "pr", "message")
BRANCH = r"(?!.*(?:\.\.|//|\.lock$|/$|\.$))[A-Za-z0-9_][A-Za-z0-9_./-]{0,199}"
MOST_MESSAGE = 500  # characters
_EXAMPLE = "for example `push: {repo: me/merged, private: true}`"
_KINDS = {"private": "true or false", "pr": "true or false", "branch": "the name of a branch"}
_HINTS = {
    "repo": "for example `repo: me/merged`",
    "private": "`true` or `false`; left out, a repository that is made is private",
    "branch": "for example `branch: second-try`; a pull request has `pr: true` in its place",
    "pr": "`true` or `false`",
    "message": f"one line of at most {MOST_MESSAGE} characters",
}


def read_push(node: Node, problems: list[Problem]) -> Push | None:
    """What `node` says; findings go to `problems`, None where there is no repository to push to.

    Whether `repo` can be an id of the Hub is for the plan to say.
    """
    if not isinstance(node, MapNode):
        problems.append(Problem(f"`push` must be a mapping, not {describe(node)}", node.mark, _EXAMPLE))
        return None
    found: dict[str, Any] = {}
    for key, entry in node.entries.items():
        if key not in KEYS:
            problems.append(Problem(f"`push` has no key `{key}`", entry.mark, suggest(key, KEYS)))
            continue
        value = entry.value.value if isinstance(entry.value, ScalarNode) else None
        if fits(key, value):
            found[key] = value
        else:
            what = _KINDS.get(key, "a text")
            message = f"`{key}` must be {what}, not {describe(entry.value)}"
            problems.append(Problem(message, entry.value.mark, _HINTS[key]))
    if "repo" not in node.entries:
        problems.append(Problem("`push` does not say to which `repo`", node.mark, _EXAMPLE))
    if found.get("branch") is not None and found.get("pr"):
        hint = "leave one of the two out: a pull request is a branch of its own"
        problems.append(Problem("`push` has both `branch` and `pr`", node.entries["branch"].mark, hint))
    mark = node.entries["repo"].value.mark if "repo" in node.entries else node.mark
    return Push(mark=mark, **found) if "repo" in found else None


def fits(key: str, value: object) -> bool:
    """Whether a value may stand at `key`."""
    if key in ("private", "pr"):
        return isinstance(value, bool)
    if not isinstance(value, str) or not value.strip():
        return False
    if key == "branch":
        return re.fullmatch(BRANCH, value) is not None
    return key != "message" or (len(value) <= MOST_MESSAGE and value.isprintable())
