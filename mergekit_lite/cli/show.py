"""Everything that commands print: results on stdout, talk on stderr, colour only on a terminal and without NO_COLOR.

    line, table, json   a result, to stdout
    note, problems      talk, to stderr

Text from strangers' files is safe here: control characters are escaped and nothing is read as rich markup.
"""

from __future__ import annotations

import json as jsonlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergekit_lite.errors import Problem, printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

WIDE = 100_000  # columns of a console that is no terminal: what is piped is never wrapped


def console(stderr: bool = False) -> Console:
    """A console for stdout or stderr as they are now. Without colours where they are no terminal or NO_COLOR is set."""
    from rich.console import Console

    made = Console(stderr=stderr, markup=False, emoji=False, highlight=False, no_color=True, color_system=None)
    if made.is_terminal:
        colours = None if os.environ.get("NO_COLOR") else "auto"
        return Console(stderr=stderr, markup=False, emoji=False, highlight=False, color_system=colours)
    made.width = WIDE
    return made


def line(text: str = "", style: str = "") -> None:
    """One line of the result, to stdout."""
    _line(console(), text, style)


def note(text: str = "", style: str = "") -> None:
    """One line of talk, to stderr."""
    _line(console(stderr=True), text, style)


def json(data: Any) -> None:
    """The result as JSON, to stdout. The only place that writes JSON: NaN and infinities become null, and everything
    outside ASCII is escaped."""
    print(jsonlib.dumps(_plain(data), indent=2, allow_nan=False))


def problems(found: Iterable[Problem], kind: str = "error") -> None:
    """Findings to stderr, a blank line between them. `kind` is `error` or `warning`."""
    out = console(stderr=True)
    for place, problem in enumerate(found):
        if place:
            _line(out, "", "")
        for text in problem.render(kind).splitlines():
            _coloured(out, text, kind)


def warnings(found: Iterable[Problem]) -> None:
    """Findings that stop nothing, to stderr."""
    problems(found, "warning")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> None:
    """A table without lines, to stdout. `right` names the columns of numbers. On a terminal the last column wraps."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for place, name in enumerate(columns):
        last = place == len(columns) - 1
        made.add_column(Text(name), justify="right" if name in right else "left", no_wrap=not last, overflow="fold")
    for row in rows:
        made.add_row(*(Text(printable(cell)) for cell in row))
    _print(console(), made)


def size(nbytes: float) -> str:
    """Bytes for people, in decimal units: `13.5 GB`, `987 bytes`."""
    if nbytes < 1000:
        return f"{nbytes:.0f} byte" + ("" if nbytes == 1 else "s")
    for unit in ("kB", "MB", "GB", "TB"):
        nbytes /= 1000
        if nbytes < 999.95 or unit == "TB":
            break
    return f"{nbytes:.1f} {unit}"


def count(number: int, noun: str) -> str:
    """`1 shard`, `3 shards`, `1,024 tensors`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def seconds(duration: float) -> str:
    """A duration for people: `0.4 s`, `14.2 s`, `3 min 5 s`."""
    if duration < 60:
        return f"{duration:.1f} s"
    minutes, rest = divmod(round(duration), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def shape(sizes: Sequence[int]) -> str:
    """The shape of a tensor: `4096×128`, `scalar`."""
    return "×".join(map(str, sizes)) or "scalar"


def _line(out: Console, text: str, style: str) -> None:
    from rich.text import Text

    out.print(Text(printable(text), style=style), soft_wrap=True)


def _coloured(out: Console, text: str, kind: str) -> None:
    """A line of `Problem.render` with its colours."""
    from rich.text import Text

    made = Text(text)
    if text.startswith(f"{kind}: "):
        made.stylize("bold red" if kind == "error" else "bold yellow", 0, len(kind) + 1)
    elif text.startswith("hint: "):
        made.stylize("bold cyan", 0, 5)
    elif text.startswith("  --> "):
        made.stylize("blue", 0, 5)
    else:
        gutter, bar, rest = text.partition(" |")
        if bar and not gutter.strip(" 0123456789"):
            made.stylize("blue", 0, len(gutter) + 2)
            if not rest.strip(" ^"):
                made.stylize("red" if kind == "error" else "yellow", len(gutter) + 2)
    out.print(made, soft_wrap=True)


def _print(out: Console, renderable: RenderableType) -> None:
    if out.is_terminal:
        out.print(renderable)
        return
    with out.capture() as captured:
        out.print(renderable)
    print("\n".join(text.rstrip() for text in captured.get().splitlines()))


def _plain(data: Any) -> Any:
    """Dataclass-free data that JSON can hold."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    return data if data is None or isinstance(data, str | int | bool) else str(data)
