"""Text → Recipe: what the language says, file errors, references, the last step."""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergekit_lite.errors import InputError, RecipeError
from mergekit_lite.recipe.model import Recipe
from mergekit_lite.recipe.read import final_step, parse, read_file, split_location, unused_steps
from mergekit_lite.recipe.save import read_size
from mergekit_lite.recipe.value import NO_VALUE, Curve
from mergekit_lite.recipe.write import to_yaml

# A busy machine must not fail a test by being slow.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
TIES = """\
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
STAGED = """\
version: 1
seed: 7
models: {base: org/base-7b, a: org/a-7b, b: org/b-7b}
steps:
  b_like_a: {use: permute, of: b, like: a}
  delta_a: {use: delta, of: a, base: base}
  delta_b: {use: delta, of: b_like_a, base: base}
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
TALL = """\
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


def good(text: str, *overrides: str) -> Recipe:
    recipe, problems = parse(text, "r.yaml", overrides)
    assert recipe is not None
    assert problems == [], "\n\n".join(problem.render() for problem in problems)
    return recipe


def faults(text: str, *overrides: str) -> list[str]:
    return [problem.message for problem in parse(text, "r.yaml", overrides)[1]]


def steps(body: str, save: str = "") -> str:
    return f"version: 1\nmodels: {{a: ./a, b: ./b, base: ./base}}\nsteps:\n{body}\n{save}"


def test_ties() -> None:
    recipe = good(TIES)
    base = recipe.models["base"]
    assert (base.location, base.revision, base.mark.line) == ("org/base-7b", "4fa1c2", 2)
    assert (recipe.models["chat"].location, recipe.models["chat"].revision) == ("./chat", None)
    step = recipe.steps["merged"]
    assert (step.use, step.missing, step.rest) == ("ties", "error", None)
    assert step.base is not None and (step.base.name, step.base.mark.line) == ("base", 6)
    settings = {item.ref.name: {key: value.at("w", None) for key, value in item.params.items()} for item in step.of}
    assert list(settings) == ["math", "code", "chat"]
    assert settings == {
        "math": {"weight": 1.0, "density": 0.2},
        "code": {"weight": 0.8, "density": 0.3},
        "chat": {"weight": 0.5},
    }
    (save,) = recipe.saves
    assert (save.step, save.to, save.dtype, save.shard) == (None, "out/ties", "bfloat16", 5_000_000_000)
    assert (recipe.seed, recipe.compute, recipe.version, recipe.text) == (0, "float32", 1, TIES)
    assert final_step(recipe) == "merged"
    assert unused_steps(recipe) == []
    weight = step.of[1].params["weight"]
    assert weight.key_mark is not None
    assert (weight.key_mark.line, weight.key_mark.column, weight.key_mark.length, weight.mark.column) == (9, 14, 6, 22)


def test_staged() -> None:
    recipe = good(STAGED)
    assert recipe.seed == 7
    assert list(recipe.steps) == ["b_like_a", "delta_a", "delta_b", "sparse_a", "sparse_b", "mixed", "merged"]
    assert recipe.steps["b_like_a"].params["like"].at("w", None) == "a"
    assert recipe.steps["sparse_b"].params["rescale"].at("w", None) is True
    t = recipe.steps["mixed"].params["t"]
    assert [(rule.glob, rule.value) for rule in t.rules] == [
        ("*.self_attn.*", Curve((0.0, 0.5, 1.0))),
        ("*.mlp.*", 0.4),
        (None, 0.5),
    ]
    assert [rule.mark.line for rule in t.rules] == [15, 16, 17]
    assert t.at("layers.1.self_attn.q", 0.75) == 0.75
    assert t.at("head", None) == 0.5
    (save,) = recipe.saves
    assert save.step is not None and (save.step.name, save.shard) == ("merged", 2 * 10**9)
    assert final_step(recipe) == "merged"


def test_tall() -> None:
    step = good(TALL).steps["tall"]
    assert step.rest is not None and step.rest.name == "math"
    layers = [(item.ref.name, item.params["layers"].at("w", None)) for item in step.of]
    assert layers == [("math", (0, 24)), ("code", (16, 32))]


def test_push() -> None:
    keys = "repo: me/staged, private: false, branch: a/b.c, message: the first"
    (save,) = good(STAGED.replace("shard: 2GB}", f"shard: 2GB, push: {{{keys}}}}}")).saves
    found = save.push
    assert found is not None
    assert (found.repo, found.private, found.branch, found.pr, found.message) == (
        ("me/staged", False, "a/b.c", False, "the first")
    )
    (save,) = good(STAGED.replace("shard: 2GB}", "push: {repo: me/staged, pr: true}}")).saves
    assert save.push is not None and save.push.pr and save.push.private is None and save.push.branch is None


@pytest.mark.parametrize(
    "branch", ["..", "a..b", "a/", "a//b", ".a", "-a", "a.lock", "a b", "refs:x", "a~1", "a" * 201]
)
def test_what_no_branch_is_called(branch: str) -> None:
    told = faults(STAGED.replace("shard: 2GB}", f"push: {{repo: me/x, branch: '{branch}'}}}}"))
    assert (
        told == [f"`branch` must be the name of a branch, not the text `{branch}`"] or "the name of a branch" in told[0]
    )


@pytest.mark.parametrize(
    ("text", "location", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name@4fa1c2", "org/name", "4fa1c2"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
        ("org/name@a@b", "org/name", "a@b"),
        ("./org/name@x", "./org/name@x", None),
        ("../me@home/x", "../me@home/x", None),
        ("~/me/x@1", "~/me/x@1", None),
        ("~me/x@1", "~me/x@1", None),
        ("/data/x@1", "/data/x@1", None),
        ("a/b/c@1", "a/b/c@1", None),
        ("me@home/x", "me@home/x", None),
        ("a/b@c/d", "a/b@c/d", None),
        ("demo", "demo", None),
        ("demo@1", "demo@1", None),
    ],
)
def test_locations(text: str, location: str, revision: str | None) -> None:
    assert split_location(text) == (location, revision)
    model = good(f'version: 1\nmodels: {{x: "{text}"}}\nsave: {{step: x, to: out}}').models["x"]
    assert (model.location, model.revision) == (location, revision)


def test_models_in_place() -> None:
    recipe = good("version: 1\nsteps:\n  s: {use: linear, of: [org/x@v1, ./y, org/x@v1], base: ../b}\n")
    assert {name: (m.location, m.revision) for name, m in recipe.models.items()} == {
        "org/x@v1": ("org/x", "v1"),
        "./y": ("./y", None),
        "../b": ("../b", None),
    }
    pinned = good("version: 1\nmodels: {org/x: org/x@abc}\nsteps: {s: {use: linear, of: org/x}}")
    assert pinned.models["org/x"].revision == "abc"


def test_references_stand_in_any_order_and_a_result_may_be_used_twice() -> None:
    recipe = good(steps("  last: {use: linear, of: [first, first, a]}\n  first: {use: linear, of: [a, b]}"))
    assert [item.ref.name for item in recipe.steps["last"].of] == ["first", "first", "a"]
    assert final_step(recipe) == "last"


def test_forms_of_of() -> None:
    for of in ("a", "[a]", "{a: }", "{a: {}}", "[{model: a}]"):
        items = good(steps(f"  s: {{use: linear, of: {of}}}")).steps["s"].of
        assert [(item.ref.name, dict(item.params)) for item in items] == [("a", {})]


def test_forms_of_values() -> None:
    body = """\
  s:
    use: x
    of: [a, b]
    with:
      number: 1e-6
      word: on
      nothing: null
      flag: TRUE
      weights: [0.7, 0.3]
      nested: [[0, 1], [2]]
      curve: {across: [0, 1]}
      curve_else: {across: [0, 1], else: 0.25}
      globs: {else: 3, "*.x": {across: [4, 5], else: 6}, "*": on}
"""
    params = good(steps(body)).steps["s"].params
    plain = {key: value.at("w", None) for key, value in params.items() if value.constant}
    expected = {"number": 1e-6, "word": "on", "nothing": None, "flag": True, "weights": (0.7, 0.3)}
    assert plain == {**expected, "nested": ((0, 1), (2,))}
    assert params["curve"].at("w", 0.25) == 0.25
    assert params["curve"].at("w", None) is NO_VALUE
    assert params["curve_else"].at("w", 1.0) == 1.0
    assert params["curve_else"].at("w", None) == 0.25
    assert [(rule.glob, rule.value) for rule in params["globs"].rules] == [
        ("*.x", Curve((4.0, 5.0))),
        ("*.x", 6),
        ("*", "on"),
        (None, 3),
    ]


def test_infinite_settings_reach_the_range_checks() -> None:
    assert good(steps("  s: {use: x, of: a, with: {t: .inf}}")).steps["s"].params["t"].at("w", None) == math.inf


def test_cycles_are_named_once_each() -> None:
    body = """\
  a1: {use: x, of: [a3, a]}
  a2: {use: x, of: a1}
  a3: {use: x, of: b, base: a2}
  b1: {use: x, of: b1}
  c1: {use: x, of: a, rest: c2}
  c2: {use: x, of: a, like: c1}
  tail: {use: x, of: [a1, c1]}
"""
    circle = "steps use one another in a circle: "
    found = faults(steps(body))
    assert found == [circle + "a1 -> a3 -> a2 -> a1", circle + "b1 -> b1", circle + "c1 -> c2 -> c1"]


@patient
@given(st.dictionaries(st.integers(0, 7), st.lists(st.integers(0, 7), min_size=1, max_size=3), min_size=1, max_size=8))
def test_a_circle_is_reported_exactly_where_there_is_one(graph: dict[int, list[int]]) -> None:
    """Oracle: the reachability matrix by repeated squaring; each path reported is made of real uses."""
    body = "\n".join(
        f"  s{n}: {{use: x, of: [{', '.join(f's{u}' if u in graph else 'a' for u in us)}]}}" for n, us in graph.items()
    )
    reach = {(n, u) for n, us in graph.items() for u in us if u in graph}
    edges = set(reach)
    for _ in range(4):
        reach |= {(x, z) for x, y in reach for y2, z in reach if y == y2}
    found = [m.split(": ")[1].split(" -> ") for m in faults(steps(body, "save: {step: a, to: out}"))]
    assert bool(found) == any(x == y for x, y in reach)
    for path in found:
        numbers = [int(name[1:]) for name in path]
        assert numbers[0] == numbers[-1] and len(set(numbers)) == len(numbers) - 1
        assert set(itertools.pairwise(numbers)) <= edges


def test_the_last_step() -> None:
    two = "  one: {use: x, of: a}\n  two: {use: x, of: b}"
    assert faults(steps(two)) == ["2 steps are used by no other: `one`, `two`"]
    assert faults(steps(two, "save: {to: out}")) == ["2 steps are used by no other: `one`, `two`"]
    recipe = good(steps(two, "save: {step: one, to: out}"))
    assert unused_steps(recipe) == ["two"]
    with pytest.raises(RecipeError, match="`one`, `two`"):
        final_step(recipe)
    assert faults("version: 1\nmodels: {a: ./a}\nsave: {to: out}") == ["there is no step to save"]
    assert good("version: 1\nmodels: {a: ./a}\nsave: {step: a, to: out}").saves[0].step is not None


def test_a_setting_that_names_a_step_uses_it_unless_that_leaves_no_last_step() -> None:
    body = "  mask: {use: x, of: a}\n  end: {use: y, of: b, with: {by: mask}}"
    recipe = good(steps(body, "save: {to: out}"))
    assert final_step(recipe) == "end"
    assert unused_steps(recipe) == []
    assert final_step(good(steps("  largest: {use: x, of: a, with: {keep: largest}}"))) == "largest"


def test_no_save_is_one_save_without_a_folder() -> None:
    (save,) = good(steps("  s: {use: x, of: a}")).saves
    assert (save.step, save.to, save.dtype, save.shard) == (None, None, None, 5 * 10**9)


@pytest.mark.parametrize(
    "short, dtype", [("fp64", "float64"), ("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")]
)
def test_short_dtypes(short: str, dtype: str) -> None:
    assert good(steps("  s: {use: x, of: a}", f"save: {{to: o, dtype: {short}}}")).saves[0].dtype == dtype


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500MB", 5 * 10**8),
        ("2GiB", 2**31),
        ("1.5 gb", 1_500_000_000),
        ("4.35GB", 4_350_000_000),
        ("7 B", 7),
        (123, 123),
        (0, None),
        (-1, None),
        (True, None),
        (1.5, None),
        ("0GB", None),
        ("0.1B", None),
        ("5", None),
        ("GB", None),
        ("5XB", None),
        ("-5GB", None),
        ("5GB ", None),
        (None, None),
    ],
)
def test_sizes(value: object, size: int | None) -> None:
    assert read_size(value) == size


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("out/a", "./out/b/../a/", "two saves go to the folder `./out/b/../a/`"),
        ("out", "out/a/b", "`out/a/b` and `out` lie inside one another"),
        ("out/a/b", "out", "`out` and `out/a/b` lie inside one another"),
        ("out/a", os.path.abspath("out/a"), f"two saves go to the folder `{os.path.abspath('out/a')}`"),
        ("out/a", "out/ab", None),
    ],
)
def test_folders_of_saves(first: str, second: str, message: str | None) -> None:
    save = f'save: [{{step: s, to: "{first}"}}, {{step: a, to: "{second}"}}]'
    assert faults(steps("  s: {use: x, of: a}", save)) == ([] if message is None else [message])


LOCK = """
lock:
  plan: abc
  set: [seed=3]
  inputs: {a: [{file: model.safetensors, bytes: 3, blake3: "00"}]}
  outputs: [{to: out, shards: [{file: m.safetensors, bytes: 9, blake3: ff}]}]
"""


def test_a_lock_is_kept_as_plain_data() -> None:
    lock = good(steps("  s: {use: x, of: a}") + LOCK).lock
    assert lock is not None
    assert lock["inputs"]["a"][0] == {"file": "model.safetensors", "bytes": 3, "blake3": "00"}
    assert lock["outputs"][0]["shards"][0]["blake3"] == "ff"
    assert (lock["plan"], lock["set"]) == ("abc", ["seed=3"])


@pytest.mark.parametrize(
    ("old", "new"),
    [('blake3: "00"', "sha: 1"), ('"00"', "00"), ("[{file: m.", "{x: {file: m."), ("inputs: {a: [", "inputs: [{a: [")],
)
def test_a_broken_lock_is_a_problem(old: str, new: str) -> None:
    text = LOCK.replace(old, new).replace("ff}]}]", "ff}}}]" if "x:" in new else "ff}]}]")
    text = text.replace('"00"}]}', '"00"}]}]') if "inputs: [" in text else text
    assert len(faults(steps("  s: {use: x, of: a}") + text)) == 1


def test_a_recipe_at_fault_is_still_given_for_further_checks() -> None:
    recipe, problems = parse(steps("  s: {use: x, of: a}\n  t: {of: s}\n  u: {use: y, of: nothing}"), "r.yaml")
    assert recipe is not None and list(recipe.steps) == ["s", "u"]
    assert len(problems) == 2


@pytest.mark.parametrize("text", ["", "- a", "text", "5", "a: [", "FROM python:3.11", "name: x\non: push\njobs: {}\n"])
def test_what_is_no_recipe_gives_none_and_one_problem(text: str) -> None:
    recipe, problems = parse(text, "r.yaml")
    assert recipe is None
    assert len(problems) == 1


WORDS = [
    "version: 1",
    "models:",
    "steps:",
    "save:",
    "a",
    "b",
    "use",
    "of",
    "with",
    "base",
    "x",
    "{",
    "}",
    "[",
    "]",
    ", ",
    ": ",
]
WORDS += [
    "\n",
    "\n  ",
    "\n    ",
    "- ",
    "1",
    ".inf",
    "null",
    "./m",
    "across",
    "else",
    '"*"',
    "to",
    "dtype",
    "shard",
    "5GB",
    "@",
    "like",
]


@patient
@given(st.lists(st.sampled_from(WORDS), max_size=40).map("".join), st.booleans())
def test_any_text_gives_a_recipe_or_problems(text: str, headed: bool) -> None:
    text = f"version: 1\nmodels: {{a: ./a}}\nsteps: {{b: {{use: x, of: a, with: {{{text}}}}}}}" if headed else text
    recipe, problems = parse(text, "r.yaml")
    assert recipe is not None or problems
    for problem in problems:
        assert problem.mark is not None
        problem.render()


def test_read_file(tmp_path: Path) -> None:
    file = tmp_path / "ties.yaml"
    file.write_bytes(TIES.encode() + b"# \xc3\xa9\r\n")
    assert read_file(file) == read_file(str(file)) == TIES + "# é\r\n"
    with pytest.raises(InputError) as missing:
        read_file(tmp_path / "tied.yaml")
    assert f"did you mean `{file}`?" in str(missing.value) and missing.value.exit_code == 4
    with pytest.raises(InputError, match="there is no folder"):
        read_file(tmp_path / "nowhere" / "ties.yaml")
    with pytest.raises(InputError, match="is a folder"):
        read_file(tmp_path)
    with pytest.raises(InputError, match="cannot read"):
        read_file(file / "x.yaml")
    with pytest.raises(InputError, match="cannot read"):
        read_file("a\0b")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(b"a: 1\nb: \xc3\xa9\xff\n")
    with pytest.raises(RecipeError) as error:
        read_file(file)
    mark = error.value.problems[0].mark
    assert mark is not None and (mark.line, mark.column) == (2, 5)
    file.write_bytes("version: 1".encode("utf-16"))
    with pytest.raises(RecipeError, match="not as UTF-16"):
        read_file(file)
    file.write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(RecipeError, match="larger than 1 MiB"):
        read_file(file)


@pytest.mark.parametrize("text", ["$HOME/m", "${HOME}/m", "./%HOME%/m", "./`id`/m", "./$(id)/m", "./{{ HOME }}/m"])
def test_nothing_is_expanded_in_a_recipe(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a shell, a template or an environment would fill in is plain text, wherever it stands."""
    monkeypatch.setenv("HOME", "/expanded")
    recipe, problems = parse(f"version: 1\nmodels: {{m: '{text}'}}\nsave: {{step: m, to: '{text}'}}\n", "r.yaml")
    assert recipe is not None and not problems
    assert recipe.models["m"].location == recipe.saves[0].to == text
    assert "/expanded" not in to_yaml(recipe)
