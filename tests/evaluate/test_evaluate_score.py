"""What a score command prints becomes a number, or an error that says what it did instead."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mergekit_lite.errors import StoppedError, UsageError
from mergekit_lite.evaluate.score import Score


def command(body: str) -> str:
    return f"{sys.executable} -c '{body}' {{model}}"


@pytest.mark.parametrize(
    ("body", "metric", "wanted"),
    [
        ("print(0.25)", None, 0.25),
        ('print("loading"); print(3)', None, 3.0),
        ('print("{\\"results\\": {\\"task\\": {\\"acc\\": 0.5}}}")', "results.task.acc", 0.5),
        ('print("{\\"scores\\": {\\"out/a.b\\": {\\"mean\\": 2}}}")', "scores.*.mean", 2.0),
        ('print("done"); print("{\\"loss\\": -1e-3}")', "loss", -1e-3),
    ],
)
def test_a_number_or_the_number_at_a_path_is_the_score(body: str, metric: str | None, wanted: float) -> None:
    assert Score(command(body), metric).of(Path("x")) == wanted


def test_the_command_gets_the_folder_as_one_word(tmp_path: Path) -> None:
    folder = tmp_path / "a folder; with $words"
    folder.mkdir()
    (folder / "number").write_text("7", encoding="utf-8")
    script = 'import sys, pathlib; print((pathlib.Path(sys.argv[1]) / "number").read_text())'
    assert Score(command(script)).of(folder) == 7.0


@pytest.mark.parametrize(
    ("body", "metric", "words"),
    [
        ('import sys; print("no such task", file=sys.stderr); sys.exit(3)', None, "exit code 3: no such task"),
        ('print("fine")', None, "printed no number"),
        ('print("{\\"loss\\": 1}")', None, "--metric"),
        ('print("{\\"loss\\": 1}")', "los", "no number `los`"),
        ('print("NaN")', None, "printed no number"),
        ("print(True)", None, "printed no number"),
        ("import time; time.sleep(60)", None, "more than 0.5 s"),
    ],
)
def test_what_is_no_score_is_told(body: str, metric: str | None, words: str) -> None:
    with pytest.raises(StoppedError) as caught:
        Score(command(body), metric, 0.5 if "sleep" in body else None).of(Path("x"))
    assert words in caught.value.problems[0].render()


def test_a_command_that_names_no_model_or_cannot_start_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no `\{model\}`"):
        Score("python score.py")
    with pytest.raises(UsageError, match="cannot be read"):
        Score("python 'score.py {model}")
    with pytest.raises(StoppedError, match="cannot start"):
        Score("/nowhere/at/all {model}").of(Path("x"))
