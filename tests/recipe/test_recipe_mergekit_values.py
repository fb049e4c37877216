"""Parameters of mergekit's recipes mean for every tensor what mergekit's rules of precedence say."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit_models import setting

from mergekit_lite.methods.registry import all_methods
from mergekit_lite.methods.spec import Param
from mergekit_lite.recipe.mergekit.language import TABLE
from mergekit_lite.recipe.model import Recipe
from mergekit_lite.recipe.read import parse
from mergekit_lite.recipe.value import NO_VALUE
from mergekit_lite.recipe.write import to_yaml

NAMES = ["model.embed_tokens.weight", "model.norm.weight"]
NAMES += [
    f"model.layers.{i}.{rest}.weight" for i in range(5) for rest in ("self_attn.q_proj", "mlp.up_proj[0]", "norm")
]

numbers = st.integers(-20, 20).map(lambda n: n / 4)
plain = numbers | st.lists(numbers, min_size=1, max_size=4)
filters = st.sampled_from(["mlp", "self_attn", "proj", "layers.2.", "[0]", "*", "proj.weight", None])
conditional = st.lists(
    st.builds(lambda f, v: {"filter": f, "value": v} if f else {"value": v}, filters, plain), min_size=1, max_size=3
)
levels = st.lists(st.none() | plain | conditional, min_size=3, max_size=3)


def depth(name: str) -> float | None:
    parts = name.split(".")
    return int(parts[2]) / 4 if parts[1] == "layers" else None


def read(document: dict[str, Any]) -> Recipe:
    recipe, problems = parse(json.dumps(document), "r.yaml")
    assert recipe is not None and not problems, [problem.message for problem in problems]
    return recipe


@given(levels)
@settings(deadline=None, max_examples=150)
def test_the_first_level_with_an_entry_for_the_tensor_wins(given_levels: list[Any]) -> None:
    source, part, top = ({} if value is None else {"scale": value} for value in given_levels)
    sources = [{"model": "./a", "layer_range": [0, 5], "parameters": source}]
    document = {"merge_method": "passthrough", "slices": [{"sources": sources, "parameters": part}], "parameters": top}
    recipe = read(document)
    for text in (None, to_yaml(recipe)):
        found = recipe if text is None else parse(text, "native.yaml")[0]
        assert found is not None
        step = found.steps["merged"]
        scale = step.params.get("scale")
        for name in NAMES:
            wanted = (setting(value, name, depth(name) or 0.0) for value in given_levels if value is not None)
            expected = next((value for value in wanted if value is not None), 1.0)
            value = 1.0 if scale is None else scale.at(name, depth(name))
            assert value is not NO_VALUE and value == pytest.approx(expected), name


@given(levels)
@settings(deadline=None, max_examples=50)
def test_a_parameter_without_a_default_may_leave_gaps_and_nothing_else(given_levels: list[Any]) -> None:
    if all(value is None for value in given_levels):
        return
    source, _, top = ({} if value is None else {"weight": value} for value in given_levels)
    models = [{"model": "./a", "parameters": source}, {"model": "./b", "parameters": {"weight": 1}}]
    if not source and not top:
        return
    step = read({"merge_method": "linear", "models": models, "parameters": top}).steps["merged"]
    weight = step.of[0].params["weight"]
    for name in NAMES:
        wanted = (
            setting(value, name, depth(name) or 0.0)
            for value in (given_levels[0], given_levels[2])
            if value is not None
        )
        expected = next((value for value in wanted if value is not None), NO_VALUE)
        found = weight.at(name, depth(name))
        assert found is expected if expected is NO_VALUE else found == pytest.approx(expected)


@pytest.mark.parametrize("name", TABLE)
def test_the_native_methods_have_what_the_table_says(name: str) -> None:
    """Every native setting exists, takes the value that mergekit's default becomes, and defaults to what is implied."""
    theirs = TABLE[name]
    method = all_methods().get(theirs.use)
    assert method is not None, f"{theirs.use} is missing"

    def param(to: str) -> Param:
        found = method.param(to)
        assert found is not None, to
        return found

    for key, value in theirs.fixed.items():
        assert param(key).fault(value) is None
    for item in theirs.settings:
        if item.to is None:
            assert item.unused or (theirs.joined and item.name in theirs.joined[0])
            continue
        native = param(item.to)
        assert native.per_input == (item.per_input and not item.of_step)
        if isinstance(item.default, bool | int | float):
            assert native.fault(item.value(item.default)) is None
        if item.implied is not None:
            assert native.default == item.implied
    if theirs.joined is not None:
        for flatten in (True, False):
            for row_wise in (True, False):
                assert param(theirs.joined[1]).fault(theirs.joined[2](flatten, row_wise)) is None
    low, high = method.inputs
    extra = 1 if theirs.base == "delta" and theirs.needed else 0
    assert low <= max(1, theirs.low - extra)
    assert high == (None if theirs.high is None else theirs.high - extra)
