"""Everything that commands print: results on stdout, talk on stderr, colour only on a terminal and without NO_COLOR.

    line, text, table, json   a result, to stdout
    note, problems, warnings  talk, to stderr
    size, count, ...          numbers for people, from plan/words.py

Text from strangers' files is safe here: control characters and line breaks are escaped, nothing is read as rich markup,
and secrets are taken out.
"""

from __future__ import annotations

import functools
import json as jsonlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from mergekit_lite.errors import Problem, printable
from mergekit_lite.plan.words import count as count
from mergekit_lite.plan.words import seconds as seconds
from mergekit_lite.plan.words import shape as shape
from mergekit_lite.plan.words import size as size
from mergekit_lite.redact import redact

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Listener = Callable[..., None]  # of events: a name, a level, fields
_listener: Listener | None = None
WIDE = 100_000  # columns of a console that is no terminal: what is piped is never wrapped


def listen(listener: Listener | None) -> None:
    """Give all talk to `listener`, as events for a log, in place of stderr; None: as text to stderr again."""
    global _listener
    _listener = listener


@functools.cache
def _console_type() -> type[Console]:
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            """Leave it to app.py; rich would exit with 1 here, which means another thing."""
            raise BrokenPipeError

    return Plain


def console(stderr: bool = False) -> Console:
    """A console for stdout or stderr as they are now. Without colours where they are no terminal or NO_COLOR is set."""
    # Without a colour system rich writes no escape at all, neither colours nor bold.
    colours: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    # FORCE_COLOR makes a terminal of anything, but not of a log.
    terminal = False if stderr and _listener is not None else None
    made = _console_type()(
        stderr=stderr, markup=False, emoji=False, highlight=False, color_system=colours, force_terminal=terminal
    )
    if not made.is_terminal:
        made.width = WIDE
    return made


def line(text: str = "", style: str = "") -> None:
    """One line of the result, to stdout."""
    _line(console(), text, style)


def note(text: str = "", style: str = "") -> None:
    """One line of talk, to stderr."""
    if _listener is not None:
        _listener("note", message=text)
        return
    _line(console(stderr=True), text, style)


def text(lines: str) -> None:
    """Text of many lines, a file for example, to stdout as it is but for control characters."""
    out = console()
    for one in lines.removesuffix("\n").split("\n"):
        _line(out, one, "")


def json(data: Any) -> None:
    """The result as JSON, to stdout. With `json_line` the only place that writes JSON: NaN and infinities become null,
    and everything outside ASCII is escaped."""
    # DEL is the one control character that JSON leaves as it is.
    print(jsonlib.dumps(_plain(data), indent=2, allow_nan=False).replace("\x7f", "\\u007f"))


def json_line(data: Any) -> str:
    """Data as JSON on one line, as `json` writes it."""
    return jsonlib.dumps(_plain(data), allow_nan=False).replace("\x7f", "\\u007f")


def problems(found: Iterable[Problem], kind: str = "error") -> None:
    """Findings to stderr, a blank line between them. `kind` is `error` or `warning`."""
    if _listener is not None:
        for problem in found:
            _listener(kind, kind, **problem.as_json())
        return
    out = console(stderr=True)
    for place, problem in enumerate(found):
        if place:
            _line(out, "", "")
        for text in redact(problem.render(kind)).splitlines():
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
        made.add_row(*(Text(printable(redact(cell))) for cell in row))
    _print(console(), made)


def _line(out: Console, text: str, style: str) -> None:
    from rich.text import Text

    out.print(Text(printable(redact(text)), style=style), soft_wrap=True)


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
        return {redact(str(key)): _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    return data if data is None or isinstance(data, int | bool) else redact(str(data))
