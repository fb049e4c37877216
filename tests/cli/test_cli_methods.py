"""`merge methods`: the list, the pages, the examples."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from cli_process import Ran
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from mergekit_lite import load_recipe, plan
from mergekit_lite.cli import manual
from mergekit_lite.methods.registry import all_methods
from mergekit_lite.methods.spec import Param

Merge = Callable[..., Ran]
PUBLIC = {name: method for name, method in all_methods().items() if method.public}


def test_the_list(merge: Merge):
    ran = merge("methods")
    head, *rows = ran.out.splitlines()
    assert re.split(r"  +", head) == ["method", "inputs", "takes → gives", "what it does"]
    assert [row.split()[0] for row in rows] == list(PUBLIC)
    assert re.split(r"  +", rows[list(PUBLIC).index("ties")])[1:] == [
        "1 or more + base",
        "weight → weight",
        PUBLIC["ties"].summary,
    ]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_page_explains_everything(merge: Merge, name: str):
    method = PUBLIC[name]
    ran = merge("methods", name)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(method.signature() + "\n\n" + method.doc + "\n")
    for param in method.params:
        (row,) = re.findall(rf"^{param.name} +{param.kind} .*$", ran.out, re.M)
        for text in (param.kind, param.range_text(), manual.default_text(param), param.help):
            assert text in row
    assert method.paper in ran.out
    assert ran.out.endswith("\nexample\n\n" + manual.example(method))


def test_a_composite_shows_its_parts(merge: Merge):
    ran = merge("methods", "dare_linear")
    (made_of,) = re.findall(r"^made of (.*)$", ran.out, re.M)
    assert made_of.count("sparsify(") == 2 and "keep=random" in made_of and "rescale=true" in made_of
    assert "made of" not in merge("methods", "linear").out


# What the examples about experts need, by the end of a model's name: its type and its tensors.
_EXPERTS = [f"block_sparse_moe.experts.{e}.{weight}.weight" for e in range(8) for weight in ("w1", "w2", "w3")]
_DENSE = [f"mlp.{weight}_proj.weight" for weight in ("gate", "up", "down")]
_GATE = "block_sparse_moe.gate"
_LAYERS = [f"model.layers.{i}." for i in range(8)]
MIXTURES: dict[str, dict[str, tuple[str, dict[str, tuple[int, ...]]]]] = {
    "moe": {
        "_prompts": ("", {"hidden_states": (2, 8, 4), "mean": (8, 4)}),
        "": ("llama", {lead + name: (4, 4) for lead in _LAYERS for name in _DENSE}),
    },
    "merge_experts": {
        "routers": (
            "",
            {f"{lead}{_GATE}.usage": (8,) for lead in _LAYERS}
            | {f"{lead}{_GATE}.logits_gram": (8, 8) for lead in _LAYERS},
        ),
        "": (
            "mixtral",
            {lead + name: (4, 4) for lead in _LAYERS for name in _EXPERTS}
            | {f"{lead}{_GATE}.weight": (8, 4) for lead in _LAYERS},
        ),
    },
}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_example_can_be_planned(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Callable[..., Path]
):
    """With tiny checkpoints of 8 layers in place of its models, the example has a plan without a finding."""
    monkeypatch.chdir(tmp_path)
    Path("example.yaml").write_text(manual.example(PUBLIC[name]), encoding="utf-8")
    recipe = load_recipe("example.yaml")
    names = {f"model.layers.{i}.mlp.up_proj.weight": (4, 4) for i in range(8)}
    names |= {"model.norm.weight": (4,), "head.weight": (4, 4)}
    if PUBLIC[name].reach == "alignment":
        # Orders of units are told by a family file, which these fit.
        Path("recipes").symlink_to(Path(__file__).parents[2] / "recipes")
        names = {f"encoder.layers.{i}.weight": (256, 256) for i in range(8)} | {"head.weight": (256, 256)}
        names |= {key.replace("weight", "bias"): (256,) for key in names}
    if PUBLIC[name].reach == "vocabulary":
        names["model.embed_tokens.weight"] = (100, 4)
    for seed, model in enumerate(recipe.models.values()):
        # Gram matrices belong to linear layers only.
        shapes = {key: shape for key, shape in names.items() if len(shape) == 2 or not model.name.endswith("_gram")}
        kind = (
            {"config": {"model_type": "digits_mlp", "num_hidden_layers": 8, "hidden_size": 256}}
            if "head.bias" in names
            else {}
        )
        if name in MIXTURES:
            model_type, shapes = next((v for ending, v in MIXTURES[name].items() if model.name.endswith(ending)))
            kind = {"config": {"model_type": model_type, "num_hidden_layers": 8, "num_local_experts": 8}}
        if "model.embed_tokens.weight" in names:
            kind = {"config": {"model_type": "llama", "num_hidden_layers": 8, "vocab_size": 100}}
        folder = tiny_checkpoint(tmp_path / "models" / model.name, shapes, seed=seed, **kind)
        if "model.embed_tokens.weight" in names:
            tokens = {f"t{number}": number for number in range(100)}
            Tokenizer(WordLevel(tokens, unk_token="t0")).save(str(folder / "tokenizer.json"))
    overrides = [f"models.{model}=models/{model}" for model in recipe.models]
    made = plan(load_recipe("example.yaml", overrides))
    assert name in {step.use for step in made.steps}
    assert made.warnings == ()


def test_json(merge: Merge):
    data = merge("methods", "ties", "--json").json
    (density,) = (param for param in data["params"] if param["name"] == "density")
    assert density == {
        "name": "density",
        "kind": "number",
        "required": False,
        "default": 0.2,
        "range": "(0, 1]",
        "low": 0,
        "high": 1,
        "open_low": True,
        "open_high": False,
        "choices": [],
        "per_input": True,
        "help": "share of this model's delta that is kept",
    }
    assert data["inputs"] == {"least": 1, "most": None}
    assert [method["name"] for method in merge("methods", "--json").json] == list(PUBLIC)


def test_markdown(merge: Merge):
    page = merge("methods", "--markdown").out
    assert re.findall(r"^## (.*)$", page, re.M) == list(PUBLIC)
    linked = re.findall(r"^\| \[(\w+)\]\(#(\w+)\) ", page, re.M)
    assert linked == [(name, name) for name in PUBLIC]
    # Every table has as many cells in each row as in its head, whatever stands in them.
    for table in re.findall(r"(?:^\|.*\|\n)+", page, re.M):
        widths = {len(re.split(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(widths) == 1, table
    for block in re.findall(r"```yaml\n(.*?)```", page, re.S):
        assert yaml.safe_load(block)["version"] == 1
    assert merge("methods", "--markdown").out == page


def test_one_method_as_markdown(merge: Merge):
    ran = merge("methods", "slerp", "--markdown")
    assert ran.out.startswith("## slerp\n\n`slerp(of: 2)`\n")
    assert "| `t` | number | any number | required | no |" in ran.out


@pytest.mark.parametrize(
    "param",
    [
        Param("p", "number", 0, "", 0, 1, open_low=True),
        Param("p", "number", 0, "", low=5),
        Param("p", "number", 0, "", high=-2, open_high=True),
        Param("p", "number", 0, ""),
        Param("p", "integer", 0, "", 3, 9),
        Param("p", "integer", 0, ""),
        Param("p", "choice", "a", "", choices=("a", "b")),
        Param("p", "flag", False, ""),
        Param("p", "reference", None, ""),
        Param("p", "layers", None, ""),
    ],
)
def test_values_made_up_for_examples_are_allowed(param: Param):
    assert param.fault(manual.fitting(param)) is None
