"""Wrong recipes and exactly what is said of them (`wrong_recipes.txt`): every fault at once, each with its place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mergekit_lite.recipe.read import parse

FILE = Path(__file__).parent / "wrong_recipes.txt"
CASES = re.findall(r"^=== (.*)\n((?s:.*?))^--- says\n((?s:.*?))(?=^=== |\Z)", FILE.read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize(("name", "text", "says"), CASES, ids=[name for name, _, _ in CASES])
def test_what_is_said_of_a_wrong_recipe(name: str, text: str, says: str) -> None:
    overrides = re.findall(r"^# --set (.*)$", text, re.M)
    _, problems = parse(text, "wrong.yaml", overrides)
    assert "\n\n".join(problem.render() for problem in problems) + "\n" == says
    assert all(problem.hint for problem in problems)


def test_no_case_is_lost() -> None:
    assert len(CASES) >= 20
