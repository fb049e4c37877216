"""`--set PATH=VALUE`: what changes, what is added, what is refused."""

from __future__ import annotations

import pytest

from mergekit_lite.recipe.model import Recipe
from mergekit_lite.recipe.read import parse

TEXT = """\
version: 1
models: {a: ./a, b.v2: ./b}
steps:
  mixed:
    use: interpolate
    of: {a: {weight: 1}, b.v2: {weight: 2}}
    with:
      t: {"*.mlp.*": 0.4, else: 0.5}
  end.x: {use: linear, of: [{model: mixed, weight: 1}, {model: a, weight: 3}]}
"""


def changed(*overrides: str) -> Recipe:
    recipe, problems = parse(TEXT, "r.yaml", overrides)
    assert recipe is not None
    assert problems == [], [problem.render() for problem in problems]
    return recipe


def refused(*overrides: str) -> str:
    _, problems = parse(TEXT, "r.yaml", overrides)
    assert len(problems) == 1, [problem.render() for problem in problems]
    return problems[0].render()


def test_values_are_yaml_and_the_last_one_wins() -> None:
    recipe = changed("seed=3", "seed=0x10", "compute=float64", "models.a=org/x@v1")
    assert (recipe.seed, recipe.compute, recipe.models["a"].revision) == (16, "float64", "v1")
    assert recipe.overrides == ("seed=3", "seed=0x10", "compute=float64", "models.a=org/x@v1")
    assert recipe.text == TEXT


def test_a_changed_value_points_at_the_command_line() -> None:
    value = changed("steps.mixed.with.t={across: [0, 1]}").steps["mixed"].params["t"]
    assert value.at("w", 0.5) == 0.5
    mark = value.mark
    assert (mark.file, mark.line, mark.column) == ("--set", 1, 20)
    assert mark.text[mark.column - 1 :][: mark.length] == "{across: [0, 1]}"


def test_keys_with_dots() -> None:
    recipe = changed(
        "models.b.v2=./c",
        "steps.mixed.of.b.v2.weight=9",
        "steps.mixed.with.t.*.mlp.*=0.1",
        'steps.mixed.with.t."*.attn.*"=0.2',
        "steps.end.x.of.1.weight=7",
    )
    assert recipe.models["b.v2"].location == "./c"
    assert recipe.steps["mixed"].of[1].params["weight"].at("w", None) == 9
    t = recipe.steps["mixed"].params["t"]
    assert (t.at("0.mlp.up", None), t.at("0.attn.q", None), t.at("head", None)) == (0.1, 0.2, 0.5)
    assert [item.params["weight"].at("w", None) for item in recipe.steps["end.x"].of] == [1, 7]


def test_what_is_missing_is_added_below_what_exists() -> None:
    recipe = changed("save.to=x", "save.shard=1MB", "models.c.d=./c", "steps.end.x.with.k=1", "steps.mixed.base=c.d")
    assert (recipe.saves[0].to, recipe.saves[0].shard) == ("x", 10**6)
    assert recipe.models["c.d"].location == "./c"
    assert recipe.steps["end.x"].params["k"].at("w", None) == 1


def test_an_alias_is_changed_in_one_place_only() -> None:
    text = TEXT.replace('{"*.mlp.*": 0.4, else: 0.5}', "&t {else: 0.5}\n      u: *t")
    recipe, problems = parse(text, "r.yaml", ["steps.mixed.with.u.else=1"])
    assert recipe is not None and not problems
    params = recipe.steps["mixed"].params
    assert (params["t"].at("w", None), params["u"].at("w", None)) == (0.5, 1)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("steps.mixd.with.t=1", "error: `steps` has no key `mixd`\n  --> --set:1:7\n   |"),
        ("steps.mixd.with.t=1", "\n 1 | steps.mixd.with.t=1\n   |       ^^^^\nhint: did you mean `mixed`?"),
        ("step.mixed.use=x", "hint: did you mean `steps`?"),
        ("sed=3", "error: a recipe has no key `sed`\n  --> --set:1:1\n   |\n 1 | sed=3\n   | ^^^\n"),
        ("steps.mixed.wiht.t=1", "hint: did you mean `with`?"),
        ("version.x=1", "error: `version` is the number 1, so nothing can be set below it"),
        ("steps.end.x.of.2.weight=1", "hint: its items are `steps.end.x.of.0` to `steps.end.x.of.1`"),
        ("steps.end.x.of.-1.weight=1", "is a list without an item `-1`"),
        ("seed", "error: this is not PATH=VALUE"),
        ("=3", "error: this is not PATH=VALUE"),
        ("a..b=3", "error: this is not PATH=VALUE"),
        ('steps."mixed=3', "error: this is not PATH=VALUE"),
        ("seed=[1", "error: not valid YAML"),
        ("seed=@", "error: not valid YAML: found character '@' that cannot start any token\n  --> --set:1:6"),
        ("seed=", "error: `seed` must be a whole number from 0 to 2**63 - 1, not nothing\n  --> --set:1:6"),
        ("seed=!!int 3", "error: `!!int` is a tag\n  --> --set:1:6"),
        ("seed=-1", "   |\n 1 | seed=-1\n   |      ^^"),
    ],
)
def test_refused(override: str, text: str) -> None:
    assert text in refused(override)
