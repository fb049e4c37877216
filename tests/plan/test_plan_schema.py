"""The schema of the recipe language, held against the reader: they accept and refuse the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lite.cli.manual import example
from mergekit_lite.methods.registry import all_methods
from mergekit_lite.plan.schema import schema
from mergekit_lite.plan.settings import check_steps
from mergekit_lite.recipe.node import plain_value
from mergekit_lite.recipe.read import parse
from mergekit_lite.recipe.write import dump

METHODS = all_methods()
SCHEMA = schema(METHODS)
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))

TIES = """
version: 1
models: {base: org/base-7b@4fa1c2, math: org/math-7b, code: org/code-7b, chat: ./chat}
steps:
  merged:
    use: ties
    base: base
    of:
      math: {weight: 1.0, density: 0.2}
      code: {weight: 0.8, density: 0.3}
      chat: {weight: 0.5}
save: {to: out/ties, dtype: bfloat16, shard: 5GB}
"""
STAGED = """
version: 1
seed: 7
models: {base: org/base-7b, a: org/a-7b, b: org/b-7b}
steps:
  delta_a: {use: delta, of: a, base: base}
  delta_b: {use: delta, of: b, base: base}
  sparse_a: {use: sparsify, of: delta_a, with: {density: 0.3, keep: largest}}
  sparse_b: {use: sparsify, of: delta_b, with: {density: 0.1, keep: random, rescale: true}}
  mixed:
    use: interpolate
    of: [sparse_a, sparse_b]
    with:
      t:
        "*.self_attn.*": {across: [0.0, 0.5, 1.0]}
        "*.mlp.*": 0.4
        else: 0.5
  merged: {use: add, base: base, of: mixed}
save: {step: merged, to: out/staged, shard: 2GB}
"""
TALL = """
version: 1
models: {math: org/math-7b, code: org/code-7b}
steps:
  tall:
    use: stack
    of:
      - {model: math, layers: [0, 24]}
      - {model: code, layers: [16, 32]}
    rest: math
save: {to: out/tall}
"""
SHORT = """
version: 1
steps: {soup: {use: linear, of: [org/a-7b@main, ./b]}}
"""
TWO_SAVES = """
version: 1
compute: float64
models: {a: org/a, b: org/b}
steps:
  one: {use: slerp, of: [a, b], with: {t: {across: [0, 1], else: 0.5}}}
  two: {use: linear, of: {a: , b: {weight: 2}}, with: {normalize: false, weight: 1}, missing: skip}
save:
  - {step: one, to: out/one, dtype: fp16, shard: 1.5 gib}
  - {step: two, to: out/two, shard: 5000000}
"""
FP8 = """
version: 1
models: {a: org/a, b: org/b}
steps: {m: {use: linear, of: [a, b]}}
save: {to: out/m, dtype: bfloat16, quantize: fp8}
"""
GOOD = [TIES, STAGED, TALL, SHORT, TWO_SAVES, FP8, *(example(m) for m in METHODS.values() if m.public)]


def data_of(text: str) -> Any:
    """The recipe as an editor sees it: YAML 1.2 scalars."""

    def plain(node: yaml.Node) -> Any:
        if isinstance(node, yaml.MappingNode):
            return {key.value: plain(value) for key, value in node.value}
        if isinstance(node, yaml.SequenceNode):
            return [plain(item) for item in node.value]
        return node.value if node.style else plain_value(node.value)

    return plain(yaml.compose(text, Loader=yaml.SafeLoader))


def refused(text: str) -> list[str]:
    """What reader and checker find in the text."""
    recipe, problems = parse(text, "recipe.yaml")
    if recipe is not None:
        problems = [*problems, *check_steps(recipe, METHODS)]
    return [problem.message for problem in problems]


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("text", GOOD)
def test_good_recipes_pass_both(text: str):
    assert refused(text) == []
    VALIDATOR.validate(data_of(text))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_the_recipes_of_the_project_pass(path: Path):
    VALIDATOR.validate(data_of(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "good, bad",
    [
        ("density: 0.2", "desnity: 0.2"),
        ("density: 0.2", "density: 2"),
        ("density: 0.2", "density: 0"),
        ("density: 0.2", "density: much"),
        ("density: 0.2", "density: true"),
        ("density: 0.2", "density: {across: [0.5]}"),
        ("density: 0.2", "density: {across: [0.5, 3]}"),
        ("density: 0.2", "density: {across: [0.5, 0.7], esle: 1}"),
        ("density: 0.2", "density: {}"),
        ("density: 0.2", "density: {'*.mlp.*': {'*.up.*': 1}}"),
        ("density: 0.2", "density: [0.2, 0.3]"),
        ("density: 0.2", "lambda: 0.2"),
        ("base: base", "bsae: base"),
        ("base: base", "base: [base]"),
        ("base: base", "base: base\n    rest: base"),
        ("base: base", "base: base\n    like: base"),
        ("base: base", "base: base\n    missing: maybe"),
        ("base: base", "base: base\n    with: {lamda: 1}"),
        ("base: base", "base: base\n    with: {scope: globl}"),
        ("base: base", "base: base\n    with: [1]"),
        ("use: ties", "use: tise"),
        ("use: ties", "use: linear"),
        ("use: ties", "use: slerp"),
        ("use: ties\n", "\n"),
        ("version: 1", "version: 2"),
        ("version: 1", ""),
        ("version: 1", "version: 1\nseed: -1"),
        ("version: 1", "version: 1\nseed: soon"),
        ("version: 1", "version: 1\ncompute: float16"),
        ("version: 1", "version: 1\nmethods: 1"),
        ("dtype: bfloat16", "dtype: int8"),
        ("dtype: bfloat16", "dytpe: bfloat16"),
        ("dtype: bfloat16", "quantize: int8"),
        ("dtype: bfloat16", "quantize: true"),
        ("dtype: bfloat16", "quantize: fp8, dtype: float8_e4m3fn"),
        ("dtype: bfloat16", "quantize: fp8, as: lora, base: base, rank: 4"),
        ("shard: 5GB", "shard: 5 horses"),
        ("shard: 5GB", "shard: 0"),
        ("save: {to: out/ties,", "save: {push: {private: true}, to: out/ties,"),
        ("save: {to: out/ties,", "save: {push: {repo: me/x, branch: a, pr: true}, to: out/ties,"),
        ("save: {to: out/ties,", "save: {push: {repo: me/x, branch: a..b}, to: out/ties,"),
        ("save: {to: out/ties,", "save: {push: {repo: me/x, private: maybe}, to: out/ties,"),
        ("save: {to: out/ties,", "save: {to: 5,"),
        ("save: {", "save: []\nsvae: {"),
        ("chat: ./chat", "chat: 3"),
        ("chat: ./chat", "chat: ./chat, a b: ./x"),
        ("models: {", "models: [1]\nmdoels: {"),
    ],
)
def test_wrong_recipes_fail_both(good: str, bad: str):
    text = TIES.replace(good, bad, 1)
    assert text != TIES
    assert refused(text)
    assert not VALIDATOR.is_valid(data_of(text))


@pytest.mark.parametrize(
    "step",
    [
        "{use: slerp, of: [a, b]}",
        "{use: slerp, of: a, with: {t: 0.5}}",
        "{use: slerp, of: [a, b, a], with: {t: 0.5}}",
        "{use: slerp, of: [a, b], base: a, with: {t: 0.5}}",
        "{use: add, of: a}",
        "{use: stack, of: [{model: a, layers: 3}]}",
        "{use: stack, of: [{model: a, layers: [0, 2, 4]}]}",
        "{use: linear, of: []}",
        "{use: linear, of: {model: a, weight: 1}}",
        "{use: linear, of: [{weight: 1}]}",
        "{use: linear, of: {a: 0.5}}",
        "{use: linear, of: [3]}",
        "{use: linear}",
        "linear",
    ],
)
def test_wrong_steps_fail_both(step: str):
    text = f"version: 1\nmodels: {{a: org/a, b: org/b}}\nsteps: {{one: {step}}}\nsave: {{to: out/x}}\n"
    assert refused(text)
    assert not VALIDATOR.is_valid(data_of(text))


def test_every_method_and_setting_is_described():
    uses = {one["const"]: one["description"] for one in SCHEMA["$defs"]["step"]["properties"]["use"]["oneOf"]}
    assert uses == {m.name: m.summary for m in METHODS.values() if m.public}
    for rule in SCHEMA["$defs"]["step"]["allOf"]:
        method = METHODS[rule["if"]["properties"]["use"]["const"]]
        offered = rule["then"]["properties"]["with"]["properties"]
        assert {name: one["description"].startswith(method.param(name).help) for name, one in offered.items()} == {
            p.name: True for p in method.params
        }
        assert all(
            offered[p.name]["default"] == p.default for p in method.params if p.kind == "choice" and not p.required
        )


def mappings(data: Any) -> list[dict[str, Any]]:
    """Every mapping inside the data, the data itself first."""
    below = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    return ([data] if isinstance(data, dict) else []) + [found for item in below for found in mappings(item)]


@given(st.sampled_from(GOOD), st.text("abcdelmnostuw_", min_size=2, max_size=8))
@settings(max_examples=40, deadline=None)
def test_a_key_that_the_reader_does_not_know_the_schema_does_not_know(text: str, key: str):
    """The key is put into every mapping of the recipe in turn. Where the reader takes it (a model, a glob, a setting
    that exists) it is none of this test's business; the top and the steps do not take it."""
    known = 0
    for place in range(len(mappings(data_of(text)))):
        data = data_of(text)
        mappings(data)[place].setdefault(key, 1)
        changed = dump(data)
        if any("has no" in message for message in refused(changed)):
            assert not VALIDATOR.is_valid(data_of(changed)), changed
        else:
            known += 1
    assert known < len(mappings(data_of(text)))


@pytest.mark.parametrize("text", GOOD)
def test_what_the_reader_takes_the_schema_takes(text: str):
    """Every key is taken away from a good recipe in turn; what the reader still accepts, an editor must not mark."""
    for place, holder in enumerate(mappings(data_of(text))):
        for key in holder:
            data = data_of(text)
            del mappings(data)[place][key]
            changed = dump(data)
            if not refused(changed):
                VALIDATOR.validate(data_of(changed))
