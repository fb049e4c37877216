"""mergekit's recipes give mergekit's numbers: every shape of its documentation against its formulas in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mergekit_models import (
    BASE,
    CONFIG,
    LAYERS,
    MODELS,
    State,
    consensus,
    depth,
    largest,
    merged,
    rescaled,
    setting,
    slerp,
)
from torch import Tensor

from mergekit_lite import load_recipe, merge_in_memory
from mergekit_lite.errors import RecipeError
from mergekit_lite.methods import all_methods
from mergekit_lite.recipe.mergekit.language import TABLE
from mergekit_lite.recipe.read import parse
from mergekit_lite.recipe.write import to_yaml

Expect = Callable[[str], Tensor]
A, B, C = (MODELS[name] for name in "abc")


def delta(model: State, name: str) -> Tensor:
    return model[name] - BASE[name]


def gradient_slerp(name: str) -> Tensor:
    t = [
        {"filter": "self_attn", "value": [0, 0.4, 0.2, 0.8, 1]},
        {"filter": "mlp", "value": [1, 0.6, 0.8, 0.2, 0]},
        {"value": 0.5},
    ]
    return slerp(setting(t, name, depth(name)), A[name], B[name])


def ties_with_gradients(name: str) -> Tensor:
    t = depth(name)
    deltas = [largest(delta(A, name), setting([1, 0.6, 0.2], name, t)), largest(delta(B, name), 0.4)]
    weights = [1.0, setting([{"filter": "mlp", "value": 0.5}, {"value": 0}], name, t)]
    return BASE[name] + consensus(deltas, weights, normalize=True)


def ties_of_a_stage(name: str) -> Tensor:
    stage = slerp(0.5, A[name], B[name]) - BASE[name]
    weights = [0.5, setting([0.2, 0.8], name, depth(name))]
    deltas = [largest(stage, 0.5), largest(delta(C, name), 0.5)]
    return BASE[name] + consensus(deltas, weights, normalize=True)


def crumbs(model: State, name: str, density: float, gamma: float) -> Tensor:
    return largest(delta(model, name), density, gamma)


CASES: dict[str, tuple[str, Expect]] = {
    "gradient slerp in one slice": (
        """
slices: [{sources: [{model: ./a, layer_range: [0, 4]}, {model: ./b, layer_range: [0, 4]}]}]
merge_method: slerp
base_model: ./a
parameters:
  t: [{filter: self_attn, value: [0, 0.4, 0.2, 0.8, 1]}, {filter: mlp, value: [1, 0.6, 0.8, 0.2, 0]}, {value: 0.5}]
""",
        gradient_slerp,
    ),
    "slerp puts the base first wherever it is listed": (
        "models: [{model: ./b}, {model: ./a}]\nmerge_method: slerp\nbase_model: ./a\nparameters: {t: 0.2}\n",
        lambda name: slerp(0.2, A[name], B[name]),
    ),
    "slerp of a base that is not listed": (
        "models: [{model: ./b}]\nmerge_method: slerp\nbase_model: ./a\nparameters: {t: 0.2}\n",
        lambda name: slerp(0.2, A[name], B[name]),
    ),
    "linear soup": (
        """
models: [{model: ./a, parameters: {weight: 1.0}}, {model: ./b, parameters: {weight: 0.3}}]
merge_method: linear
parameters: {normalize: true}
dtype: float32
""",
        lambda name: (A[name] + 0.3 * B[name]) / 1.3,
    ),
    "linear takes the base for one input among others": (
        """
models: [{model: ./a, parameters: {weight: 0.25}}]
merge_method: linear
base_model: ./base
parameters: {weight: 0.5, normalize: false}
""",
        lambda name: 0.25 * A[name] + 0.5 * BASE[name],
    ),
    "chat vector with a negative weight": (
        """
models:
  - {model: ./a, parameters: {weight: 1.0}}
  - {model: ./b, parameters: {weight: 0.7}}
  - {model: ./c, parameters: {weight: -0.2}}
merge_method: task_arithmetic
base_model: ./base
parameters: {normalize: false}
dtype: float32
""",
        lambda name: BASE[name] + delta(A, name) + 0.7 * delta(B, name) - 0.2 * delta(C, name),
    ),
    "task arithmetic, normalised": (
        """
models: [{model: ./a, parameters: {weight: 0.5}}, {model: ./b, parameters: {weight: 0.3}}]
merge_method: task_arithmetic
base_model: ./base
parameters: {normalize: true, lambda: 0.9}
""",
        lambda name: BASE[name] + 0.9 * (0.5 * delta(A, name) + 0.3 * delta(B, name)) / 0.8,
    ),
    "ties with gradients and filters": (
        """
models:
  - {model: ./a, parameters: {density: [1, 0.6, 0.2], weight: 1.0}}
  - {model: ./b, parameters: {density: 0.4, weight: [{filter: mlp, value: 0.5}, {value: 0}]}}
merge_method: ties
base_model: ./base
parameters: {normalize: true, int8_mask: true}
""",
        ties_with_gradients,
    ),
    "ties with a negative weight, rescaled": (
        """
models: [{model: ./a, parameters: {weight: 0.8}}, {model: ./b, parameters: {weight: -0.4}}]
merge_method: ties
base_model: ./base
parameters: {density: 0.3, normalize: false, rescale: true, lambda: 0.5}
""",
        lambda name: (
            BASE[name]
            + 0.5
            * consensus(
                [rescaled(largest(delta(m, name), 0.3), delta(m, name)) for m in (A, B)], [0.8, -0.4], normalize=False
            )
        ),
    ),
    "ties with a negative weight, divided by signed weights": (
        """
models: [{model: ./a, parameters: {weight: 0.8}}, {model: ./b, parameters: {weight: -0.4}}]
merge_method: ties
base_model: ./base
parameters: {density: 0.3, normalize: true}
compat: true
""",
        lambda name: (
            BASE[name] + consensus([largest(delta(m, name), 0.3) for m in (A, B)], [0.8, -0.4], normalize=True)
        ),
    ),
    "dare without dropping": (
        """
models: [{model: ./base}, {model: ./a, parameters: {weight: 0.4}}, {model: ./b, parameters: {weight: 0.3}}]
merge_method: dare_ties
base_model: ./base
""",
        lambda name: BASE[name] + consensus([delta(A, name), delta(B, name)], [0.4, 0.3], normalize=False),
    ),
    "della keeps everything by default": (
        """
models: [{model: ./a, parameters: {weight: 0.4}}, {model: ./b, parameters: {weight: 0.3}}]
merge_method: della
base_model: ./base
""",
        lambda name: BASE[name] + consensus([delta(A, name), delta(B, name)], [0.4, 0.3], normalize=True),
    ),
    "breadcrumbs with a gamma of each model": (
        """
models:
  - {model: ./a, parameters: {weight: 0.4, density: 0.5, gamma: 0.1}}
  - {model: ./b, parameters: {weight: 0.3, density: 0.9, gamma: 0.3}}
merge_method: breadcrumbs
base_model: ./base
parameters: {rescale: true, normalize: true}
""",
        lambda name: (
            BASE[name]
            + (
                0.4 * rescaled(crumbs(A, name, 0.5, 0.1), delta(A, name))
                + 0.3 * rescaled(crumbs(B, name, 0.9, 0.3), delta(B, name))
            )
            / 0.7
        ),
    ),
    "breadcrumbs with signs": (
        """
models: [{model: ./a, parameters: {weight: 0.4}}, {model: ./b, parameters: {weight: 0.3}}]
merge_method: breadcrumbs_ties
base_model: ./base
parameters: {density: 0.5, gamma: 0.2}
""",
        lambda name: (
            BASE[name] + consensus([crumbs(A, name, 0.5, 0.2), crumbs(B, name, 0.5, 0.2)], [0.4, 0.3], normalize=False)
        ),
    ),
    "one model, scaled": (
        "models: [{model: ./a, parameters: {scale: [{filter: mlp, value: [1, 3]}]}}]\nmerge_method: passthrough\n",
        lambda name: A[name] * (setting([1, 3], name, depth(name)) if "mlp" in name else 1),
    ),
    "two stages": (
        """
name: stage1
models: [{model: ./a}, {model: ./b}]
merge_method: slerp
base_model: ./a
parameters: {t: 0.5}
---
models: [{model: stage1, parameters: {weight: 0.5}}, {model: ./c, parameters: {weight: [0.2, 0.8]}}]
merge_method: ties
base_model: ./base
parameters: {density: 0.5}
""",
        ties_of_a_stage,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_recipe_gives_what_the_formula_says(case: str, tmp_path: Path) -> None:
    text, expect = CASES[case]
    found = merged(tmp_path / "r.yaml", text)
    assert found.keys() == BASE.keys()
    for name, x in found.items():
        torch.testing.assert_close(x, expect(name), rtol=2e-6, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


STACKED = """
slices:
  - sources: [{model: ./a, layer_range: [0, 3]}]
  - sources: [{model: ./b, layer_range: [1, 4]}]
merge_method: passthrough
"""
SCALED = """
slices:
  - sources: [{model: ./a, layer_range: [0, 3]}]
  - sources:
      - model: ./a
        layer_range: [2, 3]
        parameters: {scale: [{filter: o_proj, value: 0}, {filter: down_proj, value: 0}, {value: 1}]}
  - sources: [{model: ./a, layer_range: [3, 4]}]
merge_method: passthrough
"""
OVERLAPPING = """
slices:
  - sources: [{model: ./a, layer_range: [0, 2]}, {model: ./b, layer_range: [1, 3]}]
    parameters: {t: [0.1, 0.9]}
  - sources: [{model: ./a, layer_range: [2, 4]}, {model: ./c, layer_range: [1, 3]}]
    parameters: {t: [{filter: layers.3.mlp, value: 0.3}, {filter: mlp, value: [0.4, 0.6]}]}
  - sources: [{model: ./a, layer_range: [3, 4]}, {model: ./b, layer_range: [0, 1]}]
    parameters: {t: [0.2, 0.7]}
base_model: ./a
merge_method: slerp
parameters: {t: 0.5}
"""


def layer(number: int, rest: str) -> str:
    return f"model.layers.{number}.{rest}"


def test_layers_are_put_above_one_another_with_the_head_of_the_last_slice(tmp_path: Path) -> None:
    found = merged(tmp_path / "r.yaml", STACKED)
    layers = [(A, 0), (A, 1), (A, 2), (B, 1), (B, 2), (B, 3)]
    expected = {
        layer(new, n.split(".", 3)[3]): m[n] for new, (m, old) in enumerate(layers) for n in m if f".{old}." in n
    }
    expected["model.embed_tokens.weight"] = A["model.embed_tokens.weight"]
    expected |= {name: B[name] for name in ("model.norm.weight", "lm_head.weight")}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_a_slice_in_the_middle_has_scales_of_its_own(tmp_path: Path) -> None:
    found = merged(tmp_path / "r.yaml", SCALED)
    for rest in ("self_attn.o_proj.weight", "mlp.down_proj.weight", "mlp.up_proj.weight"):
        factor = 1 if "up_proj" in rest else 0
        assert torch.equal(found[layer(3, rest)], factor * A[layer(2, rest)])
        assert torch.equal(found[layer(4, rest)], A[layer(3, rest)])
    assert torch.equal(found["lm_head.weight"], A["lm_head.weight"])


def test_slices_are_merged_each_with_its_gradient(tmp_path: Path) -> None:
    """A filter on layer numbers counts the output's layers; a slice of one layer takes a gradient's last value, what
    stands outside the layers its first."""
    found = merged(tmp_path / "r.yaml", OVERLAPPING)
    # output layer -> layer of ./a, other model, its layer, t of mlp, t of attention
    made = [(0, B, 1, 0.1, 0.1), (1, B, 2, 0.9, 0.9), (2, C, 1, 0.4, 0.5), (3, C, 2, 0.3, 0.5), (3, B, 0, 0.7, 0.7)]
    assert len(found) == 3 + 3 * len(made)
    for number, (own, other, theirs, mlp, attention) in enumerate(made):
        for rest, t in (
            ("mlp.up_proj.weight", mlp),
            ("mlp.down_proj.weight", mlp),
            ("self_attn.o_proj.weight", attention),
        ):
            expected = slerp(t, A[layer(own, rest)], other[layer(theirs, rest)])
            torch.testing.assert_close(found[layer(number, rest)], expected, rtol=1e-6, atol=1e-6)
    for name, t in (("model.embed_tokens.weight", 0.1), ("model.norm.weight", 0.2), ("lm_head.weight", 0.2)):
        torch.testing.assert_close(found[name], slerp(t, A[name], B[name]), rtol=1e-6, atol=1e-6)


def test_a_filter_beside_a_source_counts_the_layers_of_the_source(tmp_path: Path) -> None:
    text = """
slices:
  - sources: [{model: ./a, layer_range: [0, 1]}]
  - sources: [{model: ./a, layer_range: [2, 4], parameters: {scale: [{filter: layers.3., value: 5}, {value: 1}]}}]
merge_method: passthrough
"""
    found, rest = merged(tmp_path / "r.yaml", text), "mlp.up_proj.weight"
    assert torch.equal(found[layer(1, rest)], A[layer(2, rest)])
    assert torch.equal(found[layer(2, rest)], 5 * A[layer(3, rest)])


@pytest.mark.parametrize("text", [*(text for text, _ in CASES.values()), STACKED, SCALED, OVERLAPPING])
def test_the_native_recipe_makes_the_same_bytes(text: str, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    theirs.write_text(text, encoding="utf-8")
    recipe = load_recipe(theirs)
    ours.write_text(to_yaml(recipe), encoding="utf-8")
    one, other = (merge_in_memory(read, MODELS, config=CONFIG) for read in (recipe, load_recipe(ours)))
    assert one.keys() == other.keys()
    assert all(torch.equal(x, other[name]) for name, x in one.items())


def test_dropped_changes_are_rescaled_to_the_norm_of_all(tmp_path: Path) -> None:
    text = (
        "models: [{model: ./a, parameters: {weight: 1, density: 0.5}}]\nmerge_method: dare_linear\nbase_model: ./base\n"
    )
    found = merged(tmp_path / "r.yaml", text)
    dropped = 0
    for name, x in found.items():
        kept, whole = x - BASE[name], delta(A, name)
        torch.testing.assert_close(kept.abs().sum(), whole.abs().sum(), rtol=1e-5, atol=1e-5)
        mask = kept != 0
        torch.testing.assert_close(
            kept[mask] / whole[mask], torch.full_like(kept[mask], (kept[mask] / whole[mask]).mean())
        )
        dropped += int((~mask).sum())
    total = sum(x.numel() for x in found.values())
    assert 0.4 < dropped / total < 0.6


def test_depth_is_that_of_the_output(tmp_path: Path) -> None:
    text = "models: [{model: ./a, parameters: {scale: [0, 3]}}]\nmerge_method: passthrough\n"
    found = merged(tmp_path / "r.yaml", text)
    for number in range(LAYERS):
        name = layer(number, "mlp.up_proj.weight")
        torch.testing.assert_close(found[name], A[name] * number)
    assert torch.equal(found["lm_head.weight"], A["lm_head.weight"] * 0)


def test_below_and_above_in_the_native_language(tmp_path: Path) -> None:
    head = "version: 1\nmodels: {base: ./base, a: ./a, b: ./b}\nsteps:\n"
    text = f"{head}  m: {{use: stack, of: [{{model: a, layers: [0, 1]}}], rest: base, above: b}}\n"
    found = merged(tmp_path / "r.yaml", text)
    assert torch.equal(found["model.embed_tokens.weight"], BASE["model.embed_tokens.weight"])
    assert torch.equal(found["model.norm.weight"], B["model.norm.weight"])
    assert torch.equal(found["lm_head.weight"], B["lm_head.weight"])
    with pytest.raises(RecipeError, match="`linear` takes no `below`"):
        merged(tmp_path / "r.yaml", f"{head}  m: {{use: linear, of: [a, b], below: a}}\n")


def test_compat_reaches_every_method_that_has_it() -> None:
    methods = all_methods()
    for name, theirs in TABLE.items():
        assert theirs.compat == (methods[theirs.use].param("compat") is not None), name


@pytest.mark.parametrize("where", ["file", "set"])
def test_compat_is_asked_for_in_the_file_or_beside_it(where: str) -> None:
    text = "models: [{model: ./a}]\nmerge_method: slerp\nbase_model: ./base\nparameters: {t: 0.5}\n"
    plain, problems = parse(text, "r.yaml", [])
    assert plain is not None and not problems and "compat" not in to_yaml(plain)
    asked = (text + "compat: true\n", []) if where == "file" else (text, ["compat=true"])
    recipe, problems = parse(asked[0], "r.yaml", asked[1])
    assert recipe is not None and not problems
    assert recipe.steps["merged"].params["compat"].rules[0].value is True
    assert "compat: true" in to_yaml(recipe)


def test_of_several_documents_one_may_ask_for_compat() -> None:
    common = "merge_method: slerp\nbase_model: ./base\nparameters: {t: 0.5}\n"
    text = f"name: s\nmodels: [{{model: ./a}}]\ncompat: true\n{common}---\nmodels: [{{model: s}}]\n{common}"
    recipe, problems = parse(text, "r.yaml", [])
    assert recipe is not None and not problems
    assert ["compat" in step.params for step in recipe.steps.values()] == [True, False]
