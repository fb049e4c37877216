"""`merge convert`: tidy YAML, JSON, the schema."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
from cli_process import Ran

Merge = Callable[..., Ran]
UNTIDY = """\
# a comment
version: 1
seed: 0
models:
  "a": './a'   # another
  b: org/b@main
steps:
  mixed: {of: [a, {model: b}], use: slerp,
    with: {t: {across: [0, 1e0], else: .5}, mode: tensor}}
save:
  - {to: "out/mixed", shard: 5000MB, dtype: bf16}
"""


def test_tidy_yaml(merge: Merge, folder: Path):
    Path("untidy.yaml").write_text(UNTIDY, encoding="utf-8")
    ran = merge("convert", "untidy.yaml")
    assert (ran.code, ran.err) == (0, "")
    assert (
        ran.out
        == """\
version: 1
models:
  a: ./a
  b: org/b@main
steps:
  mixed:
    use: slerp
    of: [a, b]
    with:
      t: {across: [0.0, 1.0], else: 0.5}
      mode: tensor
save: {to: out/mixed, dtype: bfloat16}
"""
    )


def test_tidy_is_tidy_already(merge: Merge, folder: Path):
    first = merge("convert", "ties.yaml").out
    Path("tidy.yaml").write_text(first, encoding="utf-8")
    assert merge("convert", "tidy.yaml").out == first


def test_set_is_in_it(merge: Merge, folder: Path):
    ran = merge("convert", "ties.yaml", "--set", "steps.merged.of.math.density=0.4", "--set", "seed=3")
    assert "math: {weight: 1.0, density: 0.4}" in ran.out
    assert "seed: 3" in ran.out


def test_json_has_every_default(merge: Merge, folder: Path):
    data = merge("convert", "ties.yaml", "--json").json
    assert (data["seed"], data["compute"], data["models"]["math"]) == (0, "float32", "./math")
    assert data["steps"]["merged"]["of"] == {
        "math": {"weight": 1.0, "density": 0.2},
        "code": {"weight": 0.8, "density": 0.3},
    }
    assert data["save"] == [{"step": "merged", "to": "out/ties", "dtype": "bfloat16", "shard": 5 * 10**9}]


def test_to_a_file_that_is_new(merge: Merge, folder: Path):
    ran = merge("convert", "ties.yaml", "--out", "tidy.yaml")
    assert ran == Ran(0, "", "wrote tidy.yaml\n")
    assert Path("tidy.yaml").read_text(encoding="utf-8") == merge("convert", "ties.yaml").out
    before = Path("tidy.yaml").read_bytes()
    again = merge("convert", "ties.yaml", "--set", "seed=3", "--out", "tidy.yaml")
    assert again == Ran(2, "", "error: `tidy.yaml` exists\nhint: name a new file: nothing is ever overwritten\n")
    assert Path("tidy.yaml").read_bytes() == before
    assert merge("convert", "ties.yaml", "--out", "no/such/tidy.yaml").code == 2


def test_schema(merge: Merge, folder: Path):
    printed = merge("convert", "--schema")
    assert (printed.code, printed.err) == (0, "")
    jsonschema.Draft202012Validator.check_schema(printed.json)
    assert merge("convert", "--schema", "--out", "recipe.schema.json").code == 0
    assert json.loads(Path("recipe.schema.json").read_text(encoding="utf-8")) == printed.json
    jsonschema.validate(merge("convert", "ties.yaml", "--json").json["models"], printed.json["properties"]["models"])


def test_a_wrong_recipe(merge: Merge, folder: Path):
    ran = merge("convert", "ties.yaml", "--set", "steps.merged.use=tise")
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.startswith("error: there is no method `tise`\n  --> --set:1:")
