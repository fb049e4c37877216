"""The nodes of a YAML tree, each with its place, and what an unquoted scalar means. YAML 1.2's rules, not 1.1's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from mergekit_lite.errors import Mark

MAX_DIGITS = 300

Plain: TypeAlias = "float | int | bool | str | None"

INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
WORD = re.compile(r"|~|null|Null|NULL|true|True|TRUE|false|False|FALSE")


@dataclass(frozen=True, slots=True)
class ScalarNode:
    """A number, a word, a text or nothing."""

    value: Plain
    mark: Mark


@dataclass(frozen=True, slots=True)
class ListNode:
    """A sequence of nodes."""

    items: tuple[Node, ...]
    mark: Mark


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of a mapping: `mark` is the key's place."""

    key: str
    mark: Mark
    value: Node


@dataclass(frozen=True, slots=True)
class MapNode:
    """A mapping in the order of the text."""

    entries: Mapping[str, Entry]
    mark: Mark

    def get(self, key: str) -> Node | None:
        """The node under `key`, or None where the mapping lacks it."""
        entry = self.entries.get(key)
        return None if entry is None else entry.value


Node: TypeAlias = "ScalarNode | ListNode | MapNode"


def plain_value(text: str) -> Plain:
    """What an unquoted scalar means: `1e-6` is a number, `010` is ten, `on` and `1:30` are text.

    Raises ValueError for an integer of more than 300 digits: no setting needs one, and a float cannot hold it.
    """
    if WORD.fullmatch(text):
        return {"t": True, "f": False}.get(text[:1].lower())
    if INTEGER.fullmatch(text):
        if len(text) > MAX_DIGITS:
            raise ValueError(f"more than {MAX_DIGITS} digits")
        number = int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        if abs(number) >= 10**MAX_DIGITS:
            raise ValueError(f"more than {MAX_DIGITS} digits")
        return number
    if FLOAT.fullmatch(text):
        special = text[-3:].lower() in ("inf", "nan")
        return float(text.replace(".", "") if special else text)
    return text


def describe(node: Node) -> str:
    """The node in words for a message: `a list`, `the number 3`, ``the text `x` ``."""
    if isinstance(node, ListNode):
        return "a list"
    if isinstance(node, MapNode):
        return "a mapping"
    value = node.value
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text `{value}`" if len(value) <= 60 else f"the text `{value[:57]}...`"
    return f"the number {value}" if len(str(value)) <= 60 else "a long number"
