"""Holes of a recipe: where they are found, what is said of wrong ones, and that a filled recipe is a plain one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_lite.recipe.holes import Hole, setting
from mergekit_lite.recipe.model import Recipe
from mergekit_lite.recipe.read import holes_of, parse
from mergekit_lite.recipe.write import to_yaml

RECIPE = """
version: 1
seed: {choice: [1, 2]}
models: {choice: ./c, other: ./s, base: ./base}
steps:
  search: {use: linear, of: {other: {weight: {search: [0, 2]}}, choice: {weight: 1}}}
  merged:
    use: {choice: [slerp, interpolate]}
    of: [search, base]
    with:
      t:
        "*.mlp.*": {search: [0, 1], step: 0.25}
        "model.layers.0.*": {across: [{search: [0, 1]}, {search: [1e-3, 1], log: true}]}
        else: 0.5
save: {step: merged, to: out, dtype: {choice: [float32, bfloat16]}}
score: {command: "score {model}", goal: max}
"""


def holes(text: str) -> list[Hole]:
    found, problems = holes_of(text, "r.yaml")
    assert not problems, [p.render() for p in problems]
    return found


def read(text: str, settings: list[str] | None = None) -> Recipe:
    recipe, problems = parse(text, "r.yaml", settings or [])
    assert recipe is not None and not problems, [p.render() for p in problems]
    return recipe


def test_holes_are_found_wherever_a_value_may_stand_and_models_and_steps_of_that_name_are_none() -> None:
    assert [(hole.path, hole.kind, hole.mark.line) for hole in holes(RECIPE)] == [
        ("seed", "choice", 3),
        ("steps.search.of.other.weight", "search", 6),
        ("steps.merged.use", "choice", 8),
        ('steps.merged.with.t."*.mlp.*"', "search", 12),
        ('steps.merged.with.t."model.layers.0.*".across.0', "search", 13),
        ('steps.merged.with.t."model.layers.0.*".across.1', "search", 13),
        ("save.dtype", "choice", 15),
    ]


def values(hole: Hole) -> st.SearchStrategy[Any]:
    if hole.kind == "choice":
        return st.sampled_from(hole.values)
    return st.floats(hole.low, hole.high, allow_nan=False)


@given(st.data())
def test_a_filled_recipe_holds_the_values_and_nothing_is_left_to_find(data: st.DataObject) -> None:
    found = holes(RECIPE)
    drawn = {hole.path: data.draw(values(hole)) for hole in found}
    recipe = read(RECIPE, [setting(path, value) for path, value in drawn.items()])
    text = to_yaml(recipe)
    assert holes(text) == []
    again = read(text)
    t = {rule.glob: rule.value for rule in again.steps["merged"].params["t"].rules}
    assert again.seed == drawn["seed"]
    assert again.steps["search"].of[0].params["weight"].scalars()[0][0] == drawn["steps.search.of.other.weight"]
    assert again.steps["merged"].use == drawn["steps.merged.use"]
    assert t["*.mlp.*"] == drawn['steps.merged.with.t."*.mlp.*"']
    curve = [drawn[f'steps.merged.with.t."model.layers.0.*".across.{i}'] for i in (0, 1)]
    assert list(getattr(t["model.layers.0.*"], "points")) == curve  # noqa: B009 (the type of a value is a union)
    assert again.saves[0].dtype == drawn["save.dtype"]
    assert again.scores[0].command == "score {model}"


def test_a_recipe_with_holes_is_not_run_and_every_hole_is_named() -> None:
    recipe, problems = parse(RECIPE, "r.yaml")
    assert recipe is None
    assert [p.message.split("`")[1] for p in problems] == [hole.path for hole in holes(RECIPE)]
    assert all("merge search" in (p.hint or "") for p in problems)


@pytest.mark.parametrize(
    ("hole", "words"),
    [
        ("{search: [0]}", "two numbers"),
        ("{search: [1, 0]}", "two numbers"),
        ("{search: [0, .inf]}", "two numbers"),
        ("{search: 3}", "needs a list"),
        ("{search: [0, 1], stop: 2}", "no key `stop`"),
        ("{search: [0, 1], step: 2}", "`step` must be"),
        ("{search: [0, 1], log: true}", "begins above 0"),
        ("{search: [1, 2], log: true, step: 1}", "has no `step`"),
        ("{search: [1, 2], log: 1}", "true or false"),
        ("{choice: []}", "needs a list"),
        ("{choice: [1, 2, 1]}", "listed twice"),
    ],
)
def test_a_wrong_hole_is_told_at_its_place(hole: str, words: str) -> None:
    text = RECIPE.replace("{search: [0, 2]}", hole)
    _, problems = holes_of(text, "r.yaml")
    assert [words in p.message and p.mark is not None and p.mark.line == 6 for p in problems] == [True]


def test_one_and_true_are_two_choices() -> None:
    assert holes(RECIPE.replace("{search: [0, 2]}", "{choice: [1, true]}"))[1].values == (1, True)


def test_whole_numbers_are_searched_only_in_whole_steps() -> None:
    whole, real = (
        holes(RECIPE.replace("{search: [0, 2]}", text))[1] for text in ("{search: [1, 9], step: 2}", "{search: [1, 9]}")
    )
    assert [type(n) for n in (whole.low, whole.high)] == [int, int]
    assert [type(n) for n in (real.low, real.high)] == [float, float]


@pytest.mark.parametrize(
    ("score", "words"),
    [
        ("{command: python score.py, goal: max}", "no `{model}`"),
        ('{command: "s {model}"}', "large or small"),
        ('{command: "s {model}", goal: up}', "max or min"),
        ('{command: "s {model}", goal: max, timeout: -1}', "number of seconds"),
        ("{goal: max, metrics: a}", "no key `metrics`"),
        ('[{command: "s {model}", goal: max}, {command: "t {model}", goal: max}]', "two scores"),
        (
            """[{command: "s {model}", goal: max, screen: {command: "t {model}"}},
            {name: b, command: "{model}", goal: max}]""",
            "several scores",
        ),
    ],
)
def test_a_wrong_score_is_told(score: str, words: str) -> None:
    text = f"version: 1\nmodels: {{a: ./a}}\nsteps: {{m: {{use: linear, of: a}}}}\nscore: {score}\n"
    _, problems = parse(text, "r.yaml")
    assert any(words in p.message for p in problems), [p.message for p in problems]


def test_scores_come_back_from_the_text_and_are_no_part_of_what_is_merged() -> None:
    text = """
version: 1
models: {a: ./a}
steps: {m: {use: linear, of: a}}
score:
  - {name: far, command: "s {model}", metric: x.y, goal: max, timeout: 3}
  - {command: "t {model}", goal: min}
"""
    recipe = read(text)
    again = read(to_yaml(recipe))
    assert [(s.name, s.command, s.metric, s.goal, s.timeout) for s in again.scores] == [
        ("far", "s {model}", "x.y", "max", 3),
        ("score", "t {model}", None, "min", None),
    ]
    from mergekit_lite.recipe.places import in_header

    assert "score" not in in_header(recipe)
