"""Settings changed on the command line (`--set steps.mixed.with.t=0.4`), applied to the tree before it is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mergekit_lite.errors import Mark, Problem, suggest
from mergekit_lite.recipe.node import Entry, ListNode, MapNode, Node, describe
from mergekit_lite.recipe.source import load_value

FILE = "--set"
_PART = re.compile(r'"([^"]*)"|([^."]+)')
_EXAMPLE = "write PATH=VALUE, for example `--set steps.mixed.with.t=0.4`"


@dataclass(frozen=True, slots=True)
class _Part:
    name: str
    quoted: bool
    mark: Mark


def apply(root: MapNode, overrides: Sequence[str], problems: list[Problem]) -> MapNode:
    """The tree with every override in it; findings go to `problems`, and an override at fault changes nothing.

    A path is the keys joined by dots. Keys may hold dots themselves: the longest that exists wins, and `"..."` keeps a
    key together. A number picks an item of a list. The last key may be new; `models`, `save` and a step's `with` are
    added where they are missing. The value is YAML. Later overrides win.
    """
    for text in overrides:
        changed = _apply_one(root, text, problems)
        root = changed if isinstance(changed, MapNode) else root
    return root


def apply_each(documents: Sequence[Node], overrides: Sequence[str], problems: list[Problem]) -> list[Node]:
    """The only document with every override in it. Several documents have no paths: overrides of them are findings."""
    if len(documents) == 1 and isinstance(documents[0], MapNode):
        return [apply(documents[0], overrides, problems)]
    hint = "`merge convert` makes one native recipe of them, whose steps have names"
    for text in overrides:
        mark = Mark(FILE, 1, 1, text, max(1, len(text.partition("=")[0])))
        problems.append(Problem("nothing can be set in a file of several documents", mark, hint))
    return list(documents)


def _apply_one(root: MapNode, text: str, problems: list[Problem]) -> Node | None:
    path, equals, value_text = text.partition("=")
    parts = _split(path, text)
    if not equals or parts is None:
        problems.append(Problem("this is not PATH=VALUE", Mark(FILE, 1, 1, text, max(1, len(path))), _EXAMPLE))
        return None
    value = load_value(value_text, FILE, text, len(path) + 1, problems)
    return None if value is None else _put(root, parts, value, (), problems)


def _split(path: str, text: str) -> list[_Part] | None:
    parts: list[_Part] = []
    place = 0
    while match := _PART.match(path, place):
        mark = Mark(FILE, 1, place + 1, text, max(1, match.end() - place))
        quoted = match.group(1) is not None
        parts.append(_Part(match.group(1) if quoted else match.group(2).strip(), quoted, mark))
        place = match.end()
        if place == len(path):
            return parts
        if path[place] != ".":
            return None
        place += 1
    return None


def _put(node: Node, parts: list[_Part], value: Node, above: tuple[str, ...], problems: list[Problem]) -> Node | None:
    """`node` with `value` at the end of `parts`; `above` are the keys that led to it."""
    if not parts:
        return value
    if isinstance(node, ListNode):
        return _put_item(node, parts, value, above, problems)
    if not isinstance(node, MapNode):
        where = ".".join(above)
        message = f"`{where}` is {describe(node)}, so nothing can be set below it"
        problems.append(Problem(message, parts[0].mark, f"set `{where}` as a whole"))
        return None
    for count in range(len(parts), 0, -1):
        key = ".".join(part.name for part in parts[:count])
        if (count > 1 and any(part.quoted for part in parts[:count])) or key not in node.entries:
            continue
        entry = node.entries[key]
        inner = _put(entry.value, parts[count:], value, (*above, key), problems)
        return None if inner is None else _with(node, Entry(key, entry.mark, inner))
    key, mark = parts[0].name, parts[0].mark
    if len(parts) > 1 and above == ("models",):
        key = ".".join(part.name for part in parts)
    elif len(parts) > 1 and (key in ("models", "save") if not above else key == "with" and _is_step(above)):
        empty = MapNode({}, mark)
        inner = _put(empty, parts[1:], value, (*above, key), problems)
        return None if inner is None else _with(node, Entry(key, mark, inner))
    elif len(parts) > 1:
        where = f"`{'.'.join(above)}` has" if above else "the recipe has"
        problems.append(Problem(f"{where} no key `{key}`", mark, suggest(key, node.entries)))
        return None
    return _with(node, Entry(key, mark, value))


def _is_step(above: tuple[str, ...]) -> bool:
    return len(above) == 2 and above[0] == "steps"


def _put_item(
    node: ListNode, parts: list[_Part], value: Node, above: tuple[str, ...], problems: list[Problem]
) -> Node | None:
    name = parts[0].name
    where = ".".join(above)
    if not re.fullmatch(r"[0-9]{1,6}", name) or int(name) >= len(node.items):
        hint = f"its items are `{where}.0` to `{where}.{len(node.items) - 1}`" if node.items else "it is empty"
        problems.append(Problem(f"`{where}` is a list without an item `{name}`", parts[0].mark, hint))
        return None
    place = int(name)
    inner = _put(node.items[place], parts[1:], value, (*above, name), problems)
    return None if inner is None else replace(node, items=(*node.items[:place], inner, *node.items[place + 1 :]))


def _with(node: MapNode, entry: Entry) -> MapNode:
    return replace(node, entries={**node.entries, entry.key: entry})
