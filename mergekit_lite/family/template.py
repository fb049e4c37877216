"""Tensor names with numbers in them: `model.layers.{i}.mlp.up_proj.weight`.

`{i}` stands for a whole number, `{b=0}` for this one only, and `**` at the end for any rest of a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

_PLACEHOLDER = re.compile(r"\{([a-z]+)(?:=(\d+))?\}")
_NUMBER = "(0|[1-9][0-9]{0,8})"

Bound = Mapping[str, int]
T = TypeVar("T")


def placeholders(template: str) -> tuple[str, ...]:
    """The names of the template's numbers, in order."""
    return tuple(match[1] for match in _PLACEHOLDER.finditer(template))


def filled(template: str, bound: Bound) -> str:
    """The template with its numbers filled in. KeyError names a number that is not bound."""
    return _PLACEHOLDER.sub(lambda match: str(bound[match[1]]), template)


class Table(Generic[T]):
    """Templates, each with what it stands for. The first that fits a name holds."""

    def __init__(self, entries: Iterable[tuple[str, T]]):
        self._exact: dict[str, list[tuple[re.Pattern[str], str, T]]] = {}
        self._open: list[tuple[str, T]] = []
        for template, content in entries:
            if template.endswith("**"):
                self._open.append((template.removesuffix("**"), content))
            else:
                self._exact.setdefault(_key(template), []).append((_pattern(template), template, content))

    def find(self, name: str) -> tuple[T, str, dict[str, int]] | None:
        """What stands for this name, the template that fits and its numbers; None where no template fits."""
        for pattern, template, content in self._exact.get(_key(name), ()):
            match = pattern.fullmatch(name)
            if match is not None:
                return content, template, _bound(template, match)
        for lead, content in self._open:
            if name.startswith(lead):
                return content, lead + "**", {}
        return None


def fits(template: str, names: Iterable[str]) -> bool:
    """Whether one of the names is this template with numbers filled in."""
    pattern = _pattern(template)
    return any(pattern.fullmatch(name) is not None for name in names)


def _bound(template: str, match: re.Match[str]) -> dict[str, int]:
    return {name: int(number) for name, number in zip(placeholders(template), match.groups(), strict=True)}


def _key(text: str) -> str:
    # Names that differ in their numbers alone share a key, and so does their template.
    return re.sub(r"[0-9]+", "#", _PLACEHOLDER.sub("#", text))


def _pattern(template: str) -> re.Pattern[str]:
    parts = _PLACEHOLDER.split(template)
    text = re.escape(parts[0])
    for number, after in zip(parts[2::3], parts[3::3], strict=True):
        text += (_NUMBER if number is None else f"({number})") + re.escape(after)
    return re.compile(text, re.DOTALL)
