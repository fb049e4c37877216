"""Wrong recipes of mergekit's and exactly what is said of them; what has no effect; how a file runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mergekit_models import CONFIG, LAYER, OUTSIDE
from safetensors.torch import load_file

from mergekit_lite import load_recipe, plan, run
from mergekit_lite.methods.registry import all_methods
from mergekit_lite.plan.settings import check_steps
from mergekit_lite.recipe.mergekit.document import TOP_KEYS
from mergekit_lite.recipe.mergekit.language import TABLE
from mergekit_lite.recipe.model import Ref
from mergekit_lite.recipe.read import parse
from mergekit_lite.recipe.write import to_yaml

FILE = Path(__file__).parent / "wrong_mergekit.txt"
CASES = re.findall(r"^=== (.*)\n((?s:.*?))^--- says\n((?s:.*?))(?=^=== |\Z)", FILE.read_text(encoding="utf-8"), re.M)
PLAIN = "merge_method: slerp\nbase_model: org/a\nmodels: [{model: org/b@v1}]\nparameters: {t: 0.5}\n"


@pytest.mark.parametrize(("name", "text", "says"), CASES, ids=[name for name, _, _ in CASES])
def test_what_is_said_of_a_wrong_recipe(name: str, text: str, says: str) -> None:
    _, problems = parse(text, "wrong.yaml")
    assert "\n\n".join(problem.render() for problem in problems) + "\n" == says
    assert problems and all(problem.hint for problem in problems)


def test_no_case_is_lost() -> None:
    assert len(CASES) >= 20


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("merge_method: linear\nmodels: [{model: ./a, parameters: {weight: 1, density: 0.5}}]", "density"),
        ("merge_method: linear\nmodels: [{model: ./a, parameters: {weight: 1, normalize: false}}]", "normalize"),
        (
            "merge_method: linear\nmodels: [{model: ./a, parameters: {weight: 1}}]\nparameters: {int8_mask: true}",
            "int8_mask",
        ),
        (
            "merge_method: ties\nbase_model: ./b\n"
            "models: [{model: ./a, parameters: {weight: 1}}, {model: ./b, parameters: {weight: 1}}]",
            "weight",
        ),
        (
            "merge_method: ties\nbase_model: ./b\nmodels: [{model: ./a}]\nparameters: {weight: 1, density: 1.5}",
            "density",
        ),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: ./a, layer_range: [0, 2]}], residual_weight: 0.5}]",
            "residual_weight",
        ),
    ],
)
def test_what_has_no_effect_is_remarked_on(text: str, said: str) -> None:
    recipe, problems = parse(text, "r.yaml")
    assert recipe is not None and not problems
    assert [said in note.message for note in recipe.notes] == [True]


def test_names_and_revisions_come_from_the_references() -> None:
    models = "[{model: org/x-7b@v1}, {model: other/x-7b}, {model: plain}]"
    text = f"merge_method: linear\nparameters: {{weight: 1}}\nmodels: {models}\n"
    recipe, problems = parse(text, "r.yaml")
    assert recipe is not None and not problems
    found = {name: (model.location, model.revision) for name, model in recipe.models.items()}
    assert found == {"x-7b": ("org/x-7b", "v1"), "x-7b_2": ("other/x-7b", None), "plain": ("plain", None)}


@pytest.mark.parametrize(
    ("lines", "dtype"),
    [
        ("", None),
        ("dtype: bfloat16", "bfloat16"),
        ("dtype: torch.float16", "float16"),
        ("dtype: float32\nout_dtype: bfloat16", "bfloat16"),
    ],
)
def test_the_dtype_written_is_out_dtype_or_else_dtype(lines: str, dtype: str | None) -> None:
    recipe, problems = parse(PLAIN + lines, "r.yaml")
    assert recipe is not None and not problems
    assert [save.dtype for save in recipe.saves] == [dtype]


@pytest.mark.parametrize("line", ["tokenizer_source: base", "tokenizer: {source: base}", "tokenizer_source: org/a"])
def test_the_tokenizer_of_the_base_may_be_asked_for(line: str) -> None:
    recipe, problems = parse(PLAIN + line, "r.yaml")
    assert recipe is not None and not problems
    (wish,) = [save.tokenizer for save in recipe.saves]
    source = None if wish is None else wish.source
    assert (source.name if isinstance(source, Ref) else source) in ("base", "a")


def test_settings_on_the_command_line_reach_a_document() -> None:
    recipe, problems = parse(PLAIN, "r.yaml", ["parameters.t=0.25"])
    assert recipe is not None and not problems
    assert recipe.steps["merged"].params["t"].rules[0].value == 0.25
    _, problems = parse(f"{PLAIN}name: one\n---\n{PLAIN}", "r.yaml", ["parameters.t=0.25"])
    assert any("several documents" in problem.message for problem in problems)


def test_a_second_document_of_the_native_language_is_still_an_error() -> None:
    _, problems = parse("version: 1\nsteps: {m: {use: linear, of: [a/b]}}\n---\nmerge_method: linear\n", "r.yaml")
    assert [problem.message for problem in problems] == ["a second YAML document begins here"]


def test_an_empty_last_document_counts_for_nothing() -> None:
    recipe, problems = parse(f"---\n{PLAIN}---\n", "r.yaml")
    assert recipe is not None and not problems


def test_a_file_runs_and_its_configuration_follows(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Of several slices the base gives the configuration, even where no layer is taken from it."""
    names = OUTSIDE | {f"model.layers.{i}.{rest}": shape for i in range(4) for rest, shape in LAYER.items()}
    for seed, name in enumerate(("base", "a", "b")):
        tiny_checkpoint(tmp_path / name, names, seed=seed, config=CONFIG | {"rope_theta": seed})
    text = (
        f"base_model: {tmp_path}/base\nmerge_method: passthrough\ndtype: bfloat16\nslices:\n"
        f"  - sources: [{{model: {tmp_path}/a, layer_range: [0, 3]}}]\n"
        f"  - sources: [{{model: {tmp_path}/b, layer_range: [1, 4]}}]\n"
    )
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    made = plan(load_recipe(tmp_path / "r.yaml"), out=tmp_path / "out")
    assert made.outputs[0].config["rope_theta"] == 0 and made.outputs[0].config["num_hidden_layers"] == 6
    run(made)
    found, a, b = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "a", "b"))
    for name, model in (("model.embed_tokens.weight", a), ("model.norm.weight", b), ("lm_head.weight", b)):
        assert torch.equal(found[name], model[name].bfloat16())
    native = tmp_path / "native.yaml"
    native.write_text(to_yaml(load_recipe(tmp_path / "r.yaml")), encoding="utf-8")
    assert plan(load_recipe(native), out=tmp_path / "other").digest == made.digest


SCALARS = st.sampled_from(
    ["./a", "org/b@v", "base", "union", "x+y", "", "*", "layers.1.", "m", 0, 1, 4, -1, 0.5, 2.5, True, False, None]
)
KEYS = st.sampled_from(
    [
        *TOP_KEYS,
        "sources",
        "model",
        "layer_range",
        "weight",
        "t",
        "density",
        "filter",
        "value",
        "path",
        "revision",
        "kind",
    ]
)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)
NAMES = st.sampled_from(["weight", "t", "density", "lambda", "normalize", "scale"])
PARAMETERS = st.dictionaries(NAMES, ANYTHING, max_size=3)
MODEL = st.sampled_from(["./a", "./b", "org/c@v", "m", "k"]) | ANYTHING
RANGE = st.sampled_from([[0, 2], [1, 3], [2, 3]]) | ANYTHING
SOURCE = st.fixed_dictionaries({"model": MODEL}, optional={"layer_range": RANGE, "parameters": PARAMETERS})
SLICE = st.fixed_dictionaries(
    {"sources": st.lists(SOURCE, max_size=2)}, optional={"parameters": PARAMETERS, "base_model": MODEL}
)
DOCUMENT = st.fixed_dictionaries(
    {"merge_method": st.sampled_from(sorted(TABLE)) | ANYTHING},
    optional={
        "models": st.lists(SOURCE, max_size=3) | ANYTHING,
        "slices": st.lists(SLICE, max_size=3) | ANYTHING,
        "base_model": MODEL,
        "parameters": PARAMETERS | ANYTHING,
        "dtype": st.sampled_from(["bfloat16", "int64"]),
        "tokenizer": ANYTHING,
        "name": st.sampled_from(["m", "k", 3]),
    },
)


NUMBER = st.sampled_from([0.25, 0.5, 1])
PLAIN_VALUE = NUMBER | st.lists(NUMBER, min_size=1, max_size=3)
FILTERED = st.lists(
    st.builds(
        lambda f, v: {"filter": f, "value": v}, st.sampled_from(["mlp", "layers.2.", "q_proj", None]), PLAIN_VALUE
    )
)
GOOD_PARAMETERS = st.dictionaries(NAMES.filter(lambda name: name != "normalize"), PLAIN_VALUE | FILTERED.filter(bool))


@st.composite
def good_document(draw: st.DrawFn) -> dict[str, object]:
    """A document whose structure is sound; the method may still lack something."""
    document: dict[str, object] = {"merge_method": draw(st.sampled_from(sorted(TABLE)))}
    document["parameters"] = {"weight": 1, "t": 0.5} | draw(GOOD_PARAMETERS)
    if draw(st.booleans()):
        document["base_model"] = "./base"
    if draw(st.booleans()):
        document["name"] = draw(st.sampled_from(["m", "merged", "a"]))
    models = st.lists(st.sampled_from(["./base", "./a", "./b", "org/a", "m"]), min_size=1, max_size=3, unique=True)
    if draw(st.booleans()):
        document["models"] = [{"model": model, "parameters": draw(GOOD_PARAMETERS)} for model in draw(models)]
        return document
    slices = []
    for length in draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)):
        starts = {model: draw(st.integers(0, 2)) for model in draw(models)}
        ranges = {model: [start, start + length] for model, start in starts.items()}
        sources = [
            {"model": model, "layer_range": span, "parameters": draw(GOOD_PARAMETERS)} for model, span in ranges.items()
        ]
        slices.append({"sources": sources, "parameters": draw(GOOD_PARAMETERS)})
    document["slices"] = slices
    return document


@given(st.lists(DOCUMENT, min_size=1, max_size=3) | st.lists(good_document(), min_size=1, max_size=2))
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_is_written_gives_problems_or_a_native_recipe(documents: list[object]) -> None:
    text = "\n---\n".join(json.dumps(document) for document in documents)
    recipe, problems = parse(text, "r.yaml")
    assert recipe is not None or problems
    assert all(problem.render() and problem.hint for problem in problems)
    if recipe is not None and not problems:
        native, found = parse(to_yaml(recipe), "native.yaml")
        assert native is not None and not found, to_yaml(recipe)
        assert native.steps.keys() == recipe.steps.keys()
        assert not check_steps(native, all_methods()), to_yaml(recipe)
