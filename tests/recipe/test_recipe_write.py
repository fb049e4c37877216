"""Recipe → text → Recipe, and a setting's meaning through the text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergekit_lite.errors import Mark, RecipeError
from mergekit_lite.recipe.lock import plain_data
from mergekit_lite.recipe.model import Input, Model, Push, Recipe, Ref, Save, Step
from mergekit_lite.recipe.read import parse, split_location
from mergekit_lite.recipe.source import load
from mergekit_lite.recipe.value import Curve, Rule, Value
from mergekit_lite.recipe.write import dump, resolved, size_text, to_yaml

NOWHERE = Mark("", 1, 1)
# A recipe is many draws, which a busy machine makes slow.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=50)


def bare(thing: Any) -> Any:
    """`thing` without marks, text and file; numbers keep their type, so that 1, 1.0 and true differ."""
    if isinstance(thing, Recipe):
        thing = dataclasses.replace(thing, text="", file="", overrides=(), lock=None)
    if dataclasses.is_dataclass(thing):
        fields = [field.name for field in dataclasses.fields(thing) if not field.name.endswith("mark")]
        return (type(thing).__name__, *(bare(getattr(thing, field)) for field in fields))
    if isinstance(thing, Mapping):
        return {key: bare(value) for key, value in thing.items()}
    if isinstance(thing, tuple):
        return tuple(bare(item) for item in thing)
    return (type(thing).__name__, thing)


NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,6}", fullmatch=True) | st.sampled_from(
    ["on", "null", "true", "1", "1e-6", "010", "0x1F", "1.5", "else", "across", "model", "use", "y"]
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["on", "1e-6", "1:30", "010", "~", ".inf", "=", "<<", "- a", "a: b", "# x", " x ", "a\nb", "\ufeff", "\x85"]
)
PARAMS = TEXTS.filter(lambda key: key not in ("like", "model"))
FLOATS = st.floats(allow_nan=False)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), FLOATS, TEXTS)
SCALARS = LEAVES | st.lists(LEAVES | st.lists(LEAVES, max_size=2).map(tuple), max_size=4).map(tuple)
CURVES = st.lists(FINITE, min_size=2, max_size=4).map(lambda points: Curve(tuple(points)))
# A dot keeps these from being a slip of `across` or `else`.
GLOBS = st.builds("{}.{}".format, TEXTS, st.sampled_from(["*", "mlp.*", "[ab]", "x"]))
PATHS = st.builds("{}{}".format, st.sampled_from(["./", "../", "/", "~/", "org/", "a/b/"]), NAMES | TEXTS)
LOCATIONS = st.one_of(PATHS, st.builds("org/{}@{}".format, NAMES, NAMES), TEXTS).filter(
    lambda text: text.strip() != "" and "\0" not in text and split_location(text)[1] != ""
)


def group(glob: str | None) -> st.SearchStrategy[list[Rule]]:
    """The rules of one entry: a value, a curve, or a curve with a value outside the layers."""
    scalar = SCALARS.map(lambda value: [Rule(glob, value, NOWHERE)])
    curve = CURVES.map(lambda value: [Rule(glob, value, NOWHERE)])
    return scalar | curve | st.builds(list.__add__, curve, scalar)


@st.composite
def values(draw: st.DrawFn) -> Value:
    globs = draw(st.lists(GLOBS, max_size=2, unique=True))
    rules = [rule for glob in globs for rule in draw(group(glob))]
    if not rules or draw(st.booleans()):
        rules += draw(group(None))
    return Value(tuple(rules), NOWHERE)


def model(name: str, location: str) -> Model:
    return Model(name, *split_location(location), NOWHERE)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Recipes that `parse` can give: steps use models, models in place and earlier steps."""
    names = draw(st.lists(NAMES, min_size=2, max_size=7, unique=True))
    cut = draw(st.integers(0, len(names) - 1))
    models = {name: model(name, draw(LOCATIONS)) for name in names[:cut]}
    for name in names[:cut]:
        if draw(st.booleans()):
            adapter, revision = split_location(draw(LOCATIONS))
            models[name] = dataclasses.replace(models[name], adapter=adapter, adapter_revision=revision)
    in_place = draw(st.lists(LOCATIONS.filter(lambda text: "/" in text), min_size=1, max_size=2, unique=True))
    known = [*models, *in_place]
    refs = st.deferred(lambda: st.sampled_from(known).map(lambda name: Ref(name, NOWHERE)))
    chosen = st.dictionaries(PARAMS, values(), max_size=2)
    steps: dict[str, Step] = {}
    for name in names[cut:]:
        params = draw(chosen)
        if draw(st.booleans()):
            params["like"] = Value.plain(draw(refs).name, NOWHERE)
        of = tuple(draw(st.lists(st.builds(Input, refs, chosen), min_size=1, max_size=3)))
        use = draw(TEXTS.filter(str.strip))
        missing = draw(st.sampled_from(["error", "base", "skip", "zero_delta"]))
        optional = st.none() | refs
        steps[name] = Step(name, use, of, draw(optional), params, NOWHERE, NOWHERE, missing, draw(optional))
        known.append(name)
    dtypes = st.sampled_from([None, "float64", "bfloat16", "float8_e5m2"])
    shards = st.integers(1, 2**40) | st.integers(1, 2000).map(lambda n: n * 10**6) | st.just(2**31)
    tos = draw(st.lists(TEXTS.filter(lambda t: t.strip() and "\0" not in t and "/" not in t), max_size=3))
    places = {f"out/{place}-{to}": None for place, to in enumerate(tos)}
    branches, messages = st.none() | st.sampled_from(["main", "a/b-1.x"]), st.none() | st.sampled_from(["one", "no"])
    pushes = st.none() | st.builds(
        lambda repo, private, branch, message: Push(
            repo, NOWHERE, private, branch, branch is None and message is None, message
        ),
        st.sampled_from(["me/x", "1/2"]),
        st.none() | st.booleans(),
        branches,
        messages,
    )
    saves = [Save(draw(refs), to, draw(dtypes), draw(shards), NOWHERE, push=draw(pushes)) for to in places]
    saves = saves or [Save(draw(refs), None, None, 5 * 10**9, NOWHERE)]
    used = {ref.name for step in steps.values() for ref in (*(i.ref for i in step.of), step.base, step.rest) if ref}
    used |= {str(step.params["like"].rules[0].value) for step in steps.values() if "like" in step.params}
    used |= {save.step.name for save in saves if save.step}
    models |= {text: model(text, text) for text in in_place if text in used}
    seed, compute = draw(st.integers(0, 2**63 - 1)), draw(st.sampled_from(["float32", "float64"]))
    return Recipe(models, steps, tuple(saves), seed, "", "", 1, compute)


@patient
@given(recipes())
def test_a_recipe_reads_back(recipe: Recipe) -> None:
    text = to_yaml(recipe)
    again, problems = parse(text, "r.yaml")
    assert problems == [], text + "\n\n".join(problem.render() for problem in problems)
    assert again is not None
    assert bare(again) == bare(recipe)
    assert list(again.steps) == list(recipe.steps)
    assert to_yaml(again) == text


@patient
@given(recipes())
def test_the_resolved_recipe_says_the_same(recipe: Recipe) -> None:
    """`resolved` is the native language with every default: read as YAML, it is the recipe again."""
    data = resolved(recipe)
    json.dumps(data)
    again, problems = parse(dump(data), "r.yaml")
    assert again is not None and problems == []
    assert bare(again) == bare(recipe)


@patient
@given(
    st.lists(
        st.builds(
            Rule,
            st.sampled_from([None, None, "*.a", "x.*", "*"]),
            st.integers(0, 99) | st.builds(lambda a, b: Curve((a, b)), st.floats(0, 1), st.floats(2, 3)),
            st.just(NOWHERE),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_rules_in_any_order_keep_their_meaning(rules: list[Rule]) -> None:
    """Rules that a converter makes may be dead, repeated or general before special; the text gives the same values."""
    value = Value(tuple(rules), NOWHERE)
    step = Step("s", "x", (Input(Ref("./m", NOWHERE)),), None, {"t": value}, NOWHERE, NOWHERE)
    recipe = Recipe({}, {"s": step}, (Save(None, None, None, 1, NOWHERE),), 0, "", "")
    live = [rule.glob or "*" for rule in rules]
    if len(set(live)) == len(live):
        text = to_yaml(recipe)
    else:
        # Rules of one glob that stand apart and all count have no text, and are not written wrongly.
        try:
            text = to_yaml(recipe)
        except ValueError:
            return
    again, problems = parse(text, "r.yaml")
    assert again is not None and problems == []
    for name in ("q.a", "x.a", "x.b", "other"):
        for depth in (None, 0.0, 0.3, 1.0):
            assert again.steps["s"].params["t"].at(name, depth) == value.at(name, depth)


@patient
@given(
    st.dictionaries(TEXTS.filter(lambda key: key != "<<"), st.lists(LEAVES) | LEAVES | st.dictionaries(TEXTS, LEAVES))
)
def test_plain_data_reads_back(data: dict[str, Any]) -> None:
    text = dump(data)
    problems: list[Any] = []
    node = load(text, "r.yaml", problems)
    assert node is not None and problems == []
    assert repr(plain_data(node)) == repr(data)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_recipes_of_the_project_read_back(path: Path) -> None:
    recipe, problems = parse(path.read_text(), str(path))
    assert recipe is not None and problems == []
    again, problems = parse(to_yaml(recipe), "r.yaml")
    assert problems == [] and bare(again) == bare(recipe)


def test_the_text_is_tidy() -> None:
    text = """\
version: 1
seed: 7
models:
  base: org/base-7b@4fa1c2
  a: ./a
steps:
  delta_a: {use: delta, of: a, base: base}
  mixed:
    use: interpolate
    of: [delta_a, org/b]
    with:
      t:
        "*.self_attn.*": {across: [0.0, 0.5, 1.0]}
        "*.mlp.*": 0.4
        else: 1e-06
  merged:
    use: linear
    of:
      mixed: {weight: 1}
      a:
        weight: {across: [0.0, 1.0], else: 0.5}
    missing: skip
  tall:
    use: stack
    of:
      - {model: merged, layers: [0, 24]}
      - {model: merged, layers: [16, 32]}
    rest: a
save:
  - {step: tall, to: out/tall, dtype: bfloat16, shard: 2GiB}
  - {step: merged, to: "1"}
"""
    recipe, problems = parse(text, "r.yaml")
    assert recipe is not None and problems == []
    assert to_yaml(recipe) == text


def test_a_pinned_model_in_place_keeps_its_name() -> None:
    """The name keys the random masks, so a lock must not change it."""
    recipe, _ = parse("version: 1\nsteps: {s: {use: x, of: org/x}}", "r.yaml")
    assert recipe is not None
    pinned = dataclasses.replace(recipe, models={"org/x": Model("org/x", "org/x", "abc", NOWHERE)})
    again, problems = parse(to_yaml(pinned), "r.yaml")
    assert problems == [] and bare(again) == bare(pinned)


def test_a_path_cannot_be_pinned() -> None:
    recipe = Recipe({"a": Model("a", "./a", "abc", NOWHERE)}, {}, (), 0, "", "")
    with pytest.raises(ValueError, match="not a Hub id"):
        to_yaml(recipe)


def test_resolved_names_the_step_of_every_save() -> None:
    recipe, _ = parse("version: 1\nsteps: {s: {use: x, of: ./m}}\nsave: {to: out}", "r.yaml")
    assert recipe is not None
    assert resolved(recipe) == {
        "version": 1,
        "seed": 0,
        "compute": "float32",
        "models": {"./m": "./m"},
        "steps": {"s": {"use": "x", "of": "./m", "missing": "error"}},
        "save": [{"step": "s", "to": "out", "shard": 5_000_000_000}],
    }
    with pytest.raises(RecipeError):
        resolved(dataclasses.replace(recipe, steps={}))


@pytest.mark.parametrize(
    ("nbytes", "text"), [(5 * 10**9, "5GB"), (2**31, "2GiB"), (10**12, "1TB"), (1500, 1500), (1024, "1KiB"), (7, 7)]
)
def test_size_text(nbytes: int, text: str | int) -> None:
    assert size_text(nbytes) == text
