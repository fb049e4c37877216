"""Everything that can go wrong, as data a person can act on. Imports nothing of ours.

    MergeError            exit code 70: a bug of this program
    ├── UsageError        2   a bad command line
    ├── RecipeError       3   the recipe or its plan is rejected; no weight was read, nothing was written
    ├── InputError        4   an input is missing, unreachable or corrupt
    ├── StoppedError      5   the run stopped; `--resume` goes on
    └── InterruptedRun    130 Ctrl-C; `--resume` goes on

A `Problem` is one finding; an error carries one or many, so that a recipe's faults come all together.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_SHOWN = 240  # characters of a line


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a text file: 1-based `line` and `column`, the line itself and how many characters to underline."""

    file: str
    line: int
    column: int
    text: str = ""
    length: int = 1


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding: what is wrong, where it stands and what to do about it."""

    message: str
    mark: Mark | None = None
    hint: str | None = None

    def render(self, kind: str = "error") -> str:
        """The finding as plain text: message, place, the line with a caret under it, hint."""
        lines = [f"{kind}: {printable(self.message)}"]
        if self.mark is not None:
            mark = self.mark
            lines.append(f"  --> {printable(mark.file)}:{mark.line}:{mark.column}")
            if mark.text.strip():
                gutter = " " * len(str(mark.line))
                # A stranger's line may have a million characters: what stands around the place is shown.
                cut = max(0, mark.column - 1 - _SHOWN // 2) if len(mark.text) > _SHOWN else 0
                text = printable(mark.text[cut : cut + _SHOWN].replace("\t", " "))
                caret = " " * (mark.column - 1 - cut) + "^" * min(max(1, mark.length), _SHOWN)
                lines += [f" {gutter} |", f" {mark.line} | {text}", f" {gutter} | {caret}"]
        if self.hint:
            lines.append(f"hint: {printable(self.hint)}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, object]:
        mark = self.mark
        place = None if mark is None else {"file": mark.file, "line": mark.line, "column": mark.column}
        return {"message": self.message, "place": place, "hint": self.hint}


class MergeError(Exception):
    """The root of every error this program raises on purpose; `exit_code` is the process's exit code."""

    exit_code = 70

    def __init__(
        self, problems: str | Problem | Sequence[Problem], *, hint: str | None = None, mark: Mark | None = None
    ):
        if isinstance(problems, str):
            problems = Problem(problems, mark, hint)
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n\n".join(problem.render() for problem in self.problems))


class UsageError(MergeError):
    """A bad command line."""

    exit_code = 2


class RecipeError(MergeError):
    """The recipe, or the plan made of it, is rejected. Nothing was written."""

    exit_code = 3


class InputError(MergeError):
    """An input is missing, unreachable or corrupt."""

    exit_code = 4


class StoppedError(MergeError):
    """The run stopped half way; what is finished is kept and `--resume` goes on."""

    exit_code = 5


class InterruptedRun(MergeError):
    """The user stopped the run; what is finished is kept and `--resume` goes on."""

    exit_code = 130


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """The known word nearest to `word`, or None where none is near."""
    if len(word) > 200:  # a stranger's file may hold a word of megabytes, and comparing takes 40 bytes for each letter
        return None
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return near[0] if near else None


def suggest(word: str, known: Iterable[str]) -> str | None:
    """A hint that names the nearest known word or, where none is near, all of them."""
    known = list(known)
    near = did_you_mean(word, known)
    if near:
        return f"did you mean `{near}`?"
    return f"known here: {', '.join(f'`{k}`' for k in known)}" if known else None


def printable(text: str) -> str:
    """`text` as one line that shows all that is in it: it comes from strangers' files and must not drive the terminal.

    Control characters, those that turn the direction of writing, line breaks (which could begin a line that looks like
    ours) and all else that is invisible are escaped as Python does it, without quotes.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
