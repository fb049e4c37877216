"""Models with adapters as recipes write them: the native language, mergekit's, and the way from one to the other."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import torch
from adapter_files import factors, write_adapter
from mergekit_models import BASE, CONFIG
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_lite import load_recipe, plan, run
from mergekit_lite.cli.app import execute
from mergekit_lite.methods.registry import all_methods
from mergekit_lite.plan.schema import schema
from mergekit_lite.recipe.model import Recipe
from mergekit_lite.recipe.read import parse
from mergekit_lite.recipe.write import resolved, to_yaml

Places = dict[str, tuple[str, str | None, str | None, str | None]]


def read(text: str) -> Recipe:
    recipe, problems = parse(text, "r.yaml")
    assert recipe is not None and not problems, problems
    return recipe


def places(recipe: Recipe) -> Places:
    return {n: (m.location, m.revision, m.adapter, m.adapter_revision) for n, m in recipe.models.items()}


NATIVE = """\
version: 1
models:
  a: {path: org/base@v1, adapter: org/lora@abc}
  b: {path: ./base, adapter: ./lora}
steps:
  merged: {use: linear, of: [a, b]}
"""


def test_the_native_form_and_back() -> None:
    recipe = read(NATIVE)
    assert places(recipe) == {"a": ("org/base", "v1", "org/lora", "abc"), "b": ("./base", None, "./lora", None)}
    assert (recipe.models["a"].mark.line, recipe.models["a"].mark.column) == (3, 3)
    assert to_yaml(recipe) == NATIVE
    assert resolved(recipe)["models"]["b"] == {"path": "./base", "adapter": "./lora"}


def test_an_adapter_on_the_command_line() -> None:
    recipe, problems = parse(NATIVE, "r.yaml", ["models.b.adapter=./other"])
    assert recipe is not None and not problems and recipe.models["b"].adapter == "./other"


@pytest.mark.parametrize(
    ("model", "good"),
    [
        ({"path": "org/a", "adapter": "./l"}, True),
        ("org/a", True),
        ({"path": "org/a"}, False),
        ({"adapter": "./l"}, True),
        ({"path": "org/a", "adapter": ["./l"]}, False),
        ({"path": "org/a", "adapter": "./l", "weight": 1}, False),
        ({}, False),
    ],
)
def test_the_schema_and_the_reader_take_the_same(model: object, good: bool) -> None:
    recipe = {"version": 1, "models": {"a": model}, "save": {"step": "a"}}
    assert jsonschema.Draft202012Validator(schema(all_methods())).is_valid(recipe) == good
    assert (not parse(f"version: 1\nmodels: {{a: {model!r}}}\nsave: {{step: a}}\n", "r.yaml")[1]) == good


@pytest.mark.parametrize(
    ("reference", "place"),
    [
        ("org/base+org/lora", ("org/base", None, "org/lora", None)),
        ("org/base@v1+org/lora", ("org/base", "v1", "org/lora", None)),
        ("org/base@v1+org/lora@v2", ("org/base", "v1", "org/lora", "v2")),
        ("./base+../lora", ("./base", None, "../lora", None)),
        ("{model: org/base, lora: org/lora@v2}", ("org/base", None, "org/lora", "v2")),
        ("{model: org/base@v1, lora: {path: org/lora, revision: v2}}", ("org/base", "v1", "org/lora", "v2")),
        ("{model: {path: ./b+c}, lora: {path: ./l+m}}", ("./b+c", None, "./l+m", None)),
        ("{model: {path: org/base, revision: v1}, lora: null}", ("org/base", "v1", None, None)),
        ("{model: org/base+org/lora}", ("org/base", None, "org/lora", None)),
    ],
)
def test_references_of_mergekit(reference: str, place: tuple[str | None, ...]) -> None:
    recipe = read(f"merge_method: passthrough\nmodels: [{{model: {reference}}}]\n")
    assert list(places(recipe).values()) == [place]
    assert places(read(to_yaml(recipe))) == places(recipe)


def test_one_base_with_several_adapters_is_several_models() -> None:
    items = [f"{{model: {ref}, parameters: {{weight: 1}}}}" for ref in ("./base+./x", "./base+./y", "./z+./x")]
    text = f"merge_method: ties\nbase_model: ./base\nmodels: [{', '.join(items)}]\n"
    recipe = read(text)
    assert sorted(recipe.models) == ["base", "base_x", "base_y", "z_x"]
    (step,) = recipe.steps.values()
    assert [item.ref.name for item in step.of] == ["base_x", "base_y", "z_x"]
    assert step.base is not None and step.base.name == "base"


def test_one_adapter_twice_is_an_error_as_one_model_is() -> None:
    text = "merge_method: linear\nmodels:\n" + "  - {model: ./base+./x, parameters: {weight: 1}}\n" * 2
    _, problems = parse(text, "r.yaml")
    assert "twice" in problems[0].message


def weights(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """An adapter of every up_proj and down_proj of the models, and the base with it, worked out here."""
    shapes = {name.removesuffix(".weight"): tuple(value.shape) for name, value in BASE.items() if ".mlp." in name}
    parts = factors({name: (shape[0], shape[1]) for name, shape in shapes.items()}, rank=3, seed=seed)
    whole = dict(BASE)
    for name in shapes:
        product = parts[f"{name}.lora_B.weight"].double() @ parts[f"{name}.lora_A.weight"].double()
        whole[f"{name}.weight"] = (BASE[f"{name}.weight"].double() + 8 / 3 * product).float()
    return parts, whole


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`base`, adapters `x` and `y` of it, and the same folded in: `wx` and `wy`."""
    import json

    found = {"base": BASE}
    for seed, name in enumerate("xy"):
        parts, found[f"w{name}"] = weights(seed)
        write_adapter(tmp_path / name, parts)
    for name, state in found.items():
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path)
    return tmp_path


ITEMS = "models: [{model: ./base+./x, parameters: {weight: 0.3}}, {model: ./base+./y, parameters: {weight: 0.9}}]"
SLICES = """\
slices:
  - sources: [{model: ./base+./x, layer_range: [0, 3]}]
  - sources: [{model: ./base+./y, layer_range: [1, 4]}]
"""
MERGES = {
    "linear": f"merge_method: linear\n{ITEMS}\n",
    "task_arithmetic": f"merge_method: task_arithmetic\nbase_model: ./base\n{ITEMS}\n",
    "ties": f"merge_method: ties\nbase_model: ./base\n{ITEMS}\nparameters: {{density: 0.4}}\n",
    "slerp": "merge_method: slerp\nbase_model: ./base+./x\nmodels: [{model: ./base+./x}, {model: ./base+./y}]\n"
    "parameters: {t: [0.2, 0.7]}\n",
    "slices": f"merge_method: passthrough\n{SLICES}",
}


@pytest.mark.parametrize("name", MERGES)
def test_recipes_of_mergekit_run_as_on_the_folded_models(name: str, place: Path) -> None:
    """The recipe, what `convert` prints of it, and the same recipe over folders with the adapters folded in."""
    Path("theirs.yml").write_text(MERGES[name] + "dtype: float32\n")
    assert execute(["convert", "theirs.yml", "--out", "ours.yaml"]) == 0
    assert "{path: ./base, adapter: ./x}" in Path("ours.yaml").read_text()
    Path("folded.yml").write_text(MERGES[name].replace("./base+./", "./w") + "dtype: float32\n")
    for recipe, to in (("theirs.yml", "theirs"), ("ours.yaml", "ours"), ("folded.yml", "folded")):
        assert execute(["run", recipe, "--out", f"out/{to}"]) == 0
    theirs, ours, folded = (load_file(f"out/{to}/model.safetensors") for to in ("theirs", "ours", "folded"))
    assert list(theirs) == list(ours) and set(ours) == set(folded)
    for key, value in ours.items():
        assert torch.equal(theirs[key], value)
        torch.testing.assert_close(value, folded[key], rtol=1e-5, atol=2e-6)


def test_ties_of_two_adapters_in_the_native_language(place: Path) -> None:
    models = "{base: ./base, x: {path: ./base, adapter: ./x}, y: {path: ./base, adapter: ./y}}"
    for file, found in (("a.yaml", models), ("b.yaml", "{base: ./base, x: ./wx, y: ./wy}")):
        step = "m: {use: ties, base: base, of: [x, y], with: {density: 0.5}}"
        Path(file).write_text(f"version: 1\nmodels: {found}\nsteps: {{{step}}}\nsave: {{to: out/{file}}}\n")
        run(plan(load_recipe(file)))
    ours, folded = (load_file(f"out/{file}/model.safetensors") for file in ("a.yaml", "b.yaml"))
    for key, value in ours.items():
        torch.testing.assert_close(value, folded[key], rtol=1e-5, atol=2e-6)


def test_inspect_shows_an_adapter(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    assert execute(["inspect", "x", "--tensors"]) == 0
    out = capsys.readouterr().out
    assert "LoRA · 8 modules" in out and "4 down_proj, 4 up_proj" in out and "2.66667" in out
    assert "base_model.model.model.layers.3.mlp.up_proj.lora_A.weight" in out
    assert execute(["inspect", "x", "--json", "--tensors"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["adapter"], found["ranks"], found["tensors"], len(found["list"])) == (True, [3], 16, 16)
    assert found["modules"] == {"up_proj": 4, "down_proj": 4}
    assert found["parameters"] == sum(value.numel() for value in load_file("x/adapter_model.safetensors").values())
    assert execute(["inspect", "base"]) == 0
    assert "adapter" not in capsys.readouterr().out
    write_adapter(place / "x", {}, peft_type="ADALORA")
    assert execute(["inspect", "x"]) == 4
    assert "what is read is LORA" in capsys.readouterr().err


SAVES = [
    "{step: a, as: lora, base: b, rank: 16}",
    "{step: a, to: out/x, dtype: float32, as: lora, base: b, rank: 8, energy: 0.9, svd: randomised, targets: [x, y]}",
    "{step: a, as: lora, base: b, energy: 1, targets: x}",
]


@pytest.mark.parametrize("save", SAVES)
def test_saves_as_adapters_come_back(save: str) -> None:
    import yaml

    text = f"version: 1\nmodels: {{a: org/a, b: org/b}}\nsave: {save}\n"
    recipe = read(text)
    again = read(to_yaml(recipe))
    (one,), (two,) = recipe.saves, again.saves
    assert one.lora is not None and two.lora is not None
    first, second = ((x.base.name, x.rank, x.energy, x.svd, x.targets) for x in (one.lora, two.lora))
    assert first == second
    for written in (text, to_yaml(recipe)):
        jsonschema.validate(yaml.safe_load(written), schema(all_methods()))


@pytest.mark.parametrize("save", ["{as: dora, base: b, rank: 1}", "{rank: 3}", "{as: lora, rank: 3}",
                                  "{as: lora, base: b, rank: 0}", "{as: lora, base: b, energy: 2}"])  # fmt: skip
def test_the_schema_sees_wrong_saves(save: str) -> None:
    import yaml

    text = f"version: 1\nmodels: {{a: org/a, b: org/b}}\nsave: {save}\n"
    assert parse(text, "r.yaml")[1]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(text), schema(all_methods()))
