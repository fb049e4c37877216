"""Numbers for people, and what is printed where."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_lite.cli import show
from mergekit_lite.errors import Mark, Problem


@pytest.mark.parametrize(
    "nbytes, text",
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (13_500_000_000, "13.5 GB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (5 * 10**15, "5000.0 TB"),
    ],
)
def test_size(nbytes: int, text: str):
    assert show.size(nbytes) == text


@given(st.integers(0, 10**14))
def test_a_size_is_near_the_number_it_names(nbytes: int):
    number, unit = show.size(nbytes).split()
    factor = {"byte": 1, "bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert abs(float(number) * factor - nbytes) <= 0.0501 * factor
    assert float(number) < 1000 or unit == "TB"


@pytest.mark.parametrize(
    "duration, text",
    [
        (0.04, "0.0 s"),
        (14.21, "14.2 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (185, "3 min 5 s"),
        (4800, "1 h 20 min"),
    ],
)
def test_seconds(duration: float, text: str):
    assert show.seconds(duration) == text


def test_json_is_json_whatever_is_in_it(capsys: pytest.CaptureFixture[str]):
    show.json({"nan": float("nan"), "inf": [float("-inf"), 1.5], "name": "\x1b[31m\x9b\u202e", 3: (True, None)})
    text = capsys.readouterr().out
    assert text.isascii() and "\x1b" not in text
    assert json.loads(text) == {"nan": None, "inf": [None, 1.5], "name": "\x1b[31m\x9b\u202e", "3": [True, None]}


def test_a_table_off_a_terminal_is_never_cut(capsys: pytest.CaptureFixture[str]):
    long = "x" * 500
    show.table(["name", "bytes"], [[long, "5"], ["[red]y\x1b", "1000"]], right=["bytes"])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["name".ljust(500) + "  bytes", long + "      5", "[red]y\\x1b".ljust(500) + "   1000"]


def test_problems_stand_apart(capsys: pytest.CaptureFixture[str]):
    mark = Mark("r.yaml", 12, 3, "  a: [bold]b", 1)
    show.problems([Problem("one [red]x[/]", mark, "do"), Problem("two")], "warning")
    out, err = capsys.readouterr()
    assert out == ""
    assert (
        err
        == """\
warning: one [red]x[/]
  --> r.yaml:12:3
    |
 12 |   a: [bold]b
    |   ^
hint: do

warning: two
"""
    )
