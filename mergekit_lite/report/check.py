"""A verdict on one thing that was looked at: what `merge doctor` prints a line for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mergekit_lite.errors import Problem
from mergekit_lite.plan.words import few as few

Verdict = Literal["ok", "warn", "fail"]
FEW = 5  # names that a line holds before it only counts


@dataclass(frozen=True, slots=True)
class Check:
    """`name` says what was looked at, `detail` what was found, `hint` what to do about it."""

    name: str
    verdict: Verdict
    detail: str
    hint: str | None = None

    def as_json(self) -> dict[str, object]:
        return {"name": self.name, "verdict": self.verdict, "detail": self.detail, "hint": self.hint}


def ok(name: str, detail: str) -> Check:
    return Check(name, "ok", detail)


def warn(name: str, detail: str, hint: str | None = None) -> Check:
    return Check(name, "warn", detail, hint)


def fail(name: str, detail: str, hint: str | None = None) -> Check:
    return Check(name, "fail", detail, hint)


def failures(name: str, problems: Iterable[Problem]) -> list[Check]:
    """A failed check for each problem."""
    return [fail(name, problem.message, problem.hint) for problem in problems]


def count(number: int, noun: str) -> str:
    """`1 file`, `1,024 files`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
