"""Texts of strangers in a page of Markdown: what they hold is shown and does nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from mergekit_lite.errors import printable
from mergekit_lite.redact import redact

LONGEST = 200  # characters of a stranger's text
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;", ":": "&#58;"})
_MARKS = re.compile(r"([\\`*_{}\[\]()#!|~$])")


def plain(text: str) -> str:
    """`text` on one line that Markdown and HTML read as plain words, without secrets and not too long."""
    shown = printable(redact(text))
    shown = shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…"
    # Marks first: the entities hold some of them. A colon and an at sign would make links and mentions.
    return _MARKS.sub(r"\\\1", shown).translate(_ENTITIES)


def fenced(language: str, text: str) -> str:
    """A block of code that nothing in `text` ends."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the cells are Markdown already."""
    lines = [head, ["-"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
