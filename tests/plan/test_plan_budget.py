"""Plans within a budget of memory, made of headers alone: kept or refused, and what a refusal names is true."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lite import RecipeError, UsageError, load_recipe, plan
from mergekit_lite.plan.budget import memory_bytes, within
from mergekit_lite.plan.model import Plan
from tests.faults.memory import STEPS, shapes, write_recipe

STANDING = 150_000_000
RECIPES = ("stack", "linear", "ties_global", "sce", "permute", "tsv_m", "wudi", "knots")


def write_hollow(folder: Path, tensors: Mapping[str, tuple[int, ...]]) -> None:
    """A checkpoint in bfloat16 that is a header and a hole."""
    header, at = {}, 0
    for name, shape in tensors.items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    config = {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
    }
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}), encoding="utf-8")


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plan]:
    """Plans of `RECIPES` over a model with an embedding of 65 million numbers."""
    folder = tmp_path_factory.mktemp("hollow")
    for name in ("base", "a", "b", "c"):
        write_hollow(folder / name, shapes(2048, 5632, 2, 32000))
    made = {}
    for name in RECIPES:
        recipe = write_recipe(folder / f"{name}.yaml", folder, STEPS[name], folder / f"out_{name}")
        made[name] = plan(load_recipe(recipe))
    return made


def figure(refused: RecipeError) -> int:
    found = re.fullmatch(r"`--memory (\d+)MB` is the least that does.*", refused.problems[0].hint or "")
    assert found is not None
    return int(found[1]) * 1_000_000


def allowed(one: Plan, budget: int, threads: int | None, block: int | None, most: int) -> Plan | None:
    try:
        return within(one, budget, STANDING, threads, block, most)
    except RecipeError:
        return None


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(RECIPES),
    budget=st.integers(1, 8_000_000_000) | st.integers(150_000_000, 500_000_000),
    threads=st.none() | st.integers(1, 20),
    block=st.none() | st.integers(1, 1 << 22),
    most=st.integers(1, 20),
)
def test_any_budget_is_kept_or_refused_with_a_figure_that_does(
    plans: dict[str, Plan], name: str, budget: int, threads: int | None, block: int | None, most: int
) -> None:
    one = plans[name]
    try:
        kept = within(one, budget, STANDING, threads, block, most)
    except RecipeError as refused:
        least = figure(refused)
        assert least > budget
        kept = within(one, least, STANDING, threads, block, most)
        budget = least
        # It is the least but for what runs of one program differ by.
        assert allowed(one, least - 8_000_000, threads, block, most) is None
    assert kept.memory is not None and kept.memory.peak <= kept.memory.budget == budget
    assert kept.digest == one.digest
    assert threads in (None, kept.threads) and block in (None, kept.block)
    assert kept.threads <= max(most, threads or 0) and kept.block <= max(1 << 18, block or 0)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("budget", ["250MB", "300MB", "500MB", "1GB", "4GB"])
def test_block_size_is_given_up_before_threads(plans: dict[str, Plan], name: str, budget: str) -> None:
    """What the planner chooses is the first that is allowed where everything is said."""
    nbytes = memory_bytes(budget)
    each = itertools.product((4, 3, 2, 1), (1 << 18, 1 << 17, 1 << 16))
    first = next((way for way in each if allowed(plans[name], nbytes, *way, most=4)), None)
    free = allowed(plans[name], nbytes, None, None, 4)
    assert first == (None if free is None else (free.threads, free.block))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tsv_m", "`m` needs the whole of `model.embed_tokens.weight` of 4 models at once: "),
        ("permute", "`p` needs the tensors of the space `layers.0.mlp` of two models at once: "),
        ("linear", "`m` needs blocks of `model.embed_tokens.weight` of 3 models: "),
        ("stack", "a copy needs blocks of "),
    ],
)
def test_a_refusal_says_what_takes_the_memory(plans: dict[str, Plan], name: str, text: str) -> None:
    with pytest.raises(RecipeError) as refused:
        within(plans[name], 1_000_000, STANDING, None, None, 4)
    assert text in refused.value.problems[0].message


@pytest.mark.parametrize("value", ["", "300", "3x", "-1MB", "0MB", "MB", "1e9", "300 M B", 0, -5])
def test_wrong_sizes(value: int | str, plans: dict[str, Plan], tmp_path: Path) -> None:
    """A number without a unit is bytes, of which 300 are too few for anything."""
    error = RecipeError if value == "300" else UsageError
    with pytest.raises(error, match="must be a size" if error is UsageError else "does not fit into 300 bytes"):
        plan(plans["stack"].recipe, memory=value)


@pytest.mark.parametrize(("text", "nbytes"), [("300MB", 300e6), ("1.5GiB", 1.5 * 2**30), ("2 gb", 2e9), ("77", 77)])
def test_sizes_are_those_of_recipes(text: str, nbytes: float) -> None:
    assert memory_bytes(text) == nbytes
