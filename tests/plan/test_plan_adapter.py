"""Adapters held against their bases: names, shapes, ties, dtypes. Every fault comes before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import factors, write_adapter
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from mergekit_lite import MergeError, load_recipe, plan
from mergekit_lite.plan import explain
from mergekit_lite.plan.adapter import places
from mergekit_lite.plan.model import Plan

CONFIG: Mapping[str, Any] = {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": True}
WITHOUT_HEAD = {
    "model.embed_tokens.weight": (20, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.1.self_attn.q_proj.weight": (8, 8),
}
Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def base(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(tmp_path / "base")


def planned(folder: Path, steps: str = "", save: str = "x") -> Plan:
    text = f"version: 1\nmodels:\n  base: {folder}/base\n  x: {{path: {folder}/base, adapter: {folder}/lora}}\n"
    (folder / "r.yaml").write_text(f"{text}{steps}save: {{step: {save}}}\n", encoding="utf-8")
    return plan(load_recipe(folder / "r.yaml"), out=folder / "out")


def fails(folder: Path, *parts: str) -> None:
    with pytest.raises(MergeError) as caught:
        planned(folder)
    for part in parts:
        assert part in str(caught.value)
    assert all(problem.mark and problem.mark.line == 4 and problem.hint for problem in caught.value.problems)


def changed(made: Plan) -> set[str]:
    return {t.name for output in made.outputs for t in output.tensors if not t.copied}


@pytest.mark.parametrize("prefix", ["", "model.", "base."])
def test_names_with_and_without_a_prefix(prefix: str, base: Path, tmp_path: Path) -> None:
    """The adapter of the inner model, of the model as it lies there, and of one that holds it."""
    modules = {Q: (8, 8), UP: (16, 8)}
    if prefix == "model.":
        modules = {name.removeprefix(prefix): shape for name, shape in modules.items()}
    if prefix == "base.":
        modules = {prefix + name: shape for name, shape in modules.items()}
    write_adapter(tmp_path / "lora", factors(modules))
    assert changed(planned(tmp_path)) == {f"{Q}.weight", f"{UP}.weight"}


NAMES_ = st.lists(st.sampled_from("abcd"), min_size=1, max_size=3).map(".".join)


@given(st.lists(NAMES_, unique=True, max_size=6), st.lists(NAMES_, unique=True, max_size=8))
def test_a_place_is_never_guessed(wanted: list[str], names: list[str]) -> None:
    found, lost = places(wanted, names)
    assert sorted([*found, *lost]) == sorted(wanted)
    assert len(set(found.values())) == len(found) and set(found.values()) <= set(names)
    moved = {(name.removesuffix(place), place.removesuffix(name)) for name, place in found.items() if name != place}
    for name, place in found.items():
        assert name == place or place.endswith(f".{name}") or name.endswith(f".{place}")
        assert name not in names or name == place
    # All that are not there by their own name have moved in the same way.
    assert len({(bool(name != place), len(name) - len(place)) for name, place in found.items() if name != place}) <= 1
    assert len(moved) <= len(found)


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (["layers.0.q"], ["vision.layers.0.q", "text.layers.0.q"]),
        (["model.layers.0.norm"], ["norm"]),
        (["q"], ["layers.0.q"]),
        (["model.a.q", "a.q"], ["a.q"]),
    ],
    ids=["two prefixes", "a layer is no prefix", "a layer is no prefix either", "one tensor twice"],
)
def test_what_has_no_place(wanted: list[str], names: list[str]) -> None:
    assert places(wanted, names)[1] == wanted[:1]


def test_tensors_that_the_base_lacks(base: Path, tmp_path: Path) -> None:
    modules = {Q: (8, 8), "model.layers.7.mlp.up_proj": (8, 8), "model.layers.8.mlp.up_proj": (8, 8)}
    write_adapter(tmp_path / "lora", factors(modules), base_model_name_or_path="org/other")
    fails(tmp_path, "lacks", "`model.layers.7.mlp.up_proj.weight`, `model.layers.8.mlp.up_proj.weight`", "org/other")
    write_adapter(tmp_path / "lora", {**factors({Q: (8, 8)}), f"{Q}.lora_B.bias": torch.ones(8)}, lora_bias=True)
    fails(tmp_path, "lacks", f"`{Q}.bias`")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (factors({Q: (8, 9)}), "4×9 and 8×4, do not fit a weight of 8×8"),
        (factors({UP: (17, 8)}), "4×8 and 17×4, do not fit a weight of 16×8"),
        ({**factors({UP: (16, 8)}), f"{UP}.lora_B.weight": torch.ones(16, 5)}, "do not fit"),
        ({f"{UP}.lora_A.weight": torch.ones(0, 8), f"{UP}.lora_B.weight": torch.ones(16, 0)}, "do not fit"),
        ({f"{UP}.lora_A.weight": torch.ones(8), f"{UP}.lora_B.weight": torch.ones(16)}, "do not fit"),
        (factors({"model.norm": (8, 8)}), "do not fit a weight of 8"),
        ({"model.norm.weight": torch.ones(9)}, "another shape than its base, 9 and not 8"),
        ({"lm_head.weight": torch.ones(24, 8)}, "another vocabulary"),
        ({"model.norm.weight": torch.ones(8, dtype=torch.int64)}, "stored as I64"),
        ({name: value.to(torch.int8) for name, value in factors({Q: (8, 8)}).items()}, "stored as I8"),
    ],
)
def test_shapes_and_dtypes_that_do_not_go_together(
    tensors: dict[str, Tensor], message: str, base: Path, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "lora", tensors)
    with pytest.raises(MergeError) as caught:
        planned(tmp_path)
    assert message in str(caught.value) and "r.yaml:4:3" in str(caught.value)


def test_magnitudes_are_as_many_as_the_outputs(base: Path, tmp_path: Path) -> None:
    write_adapter(
        tmp_path / "lora", {**factors({UP: (16, 8)}), f"{UP}.lora_magnitude_vector": torch.ones(8)}, use_dora=True
    )
    fails(tmp_path, "has 8 magnitudes for 16 outputs")


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize(
    "tensors",
    [
        factors({"lm_head": (20, 8)}),
        {"lm_head.weight": torch.ones(20, 8)},
        {
            "model.embed_tokens.lora_embedding_A": torch.ones(2, 20),
            "model.embed_tokens.lora_embedding_B": torch.ones(8, 2),
        },
    ],
    ids=["head", "whole head", "embedding"],
)  # fmt: skip
def test_one_side_of_tied_tensors(
    tensors: dict[str, Tensor], stored: bool, tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    """Folded in it would change both, while the adapter was trained with the other one as it was."""
    names = WITHOUT_HEAD | ({"lm_head.weight": (20, 8)} if stored else {})
    tiny_checkpoint(tmp_path / "base", names, config=CONFIG)
    write_adapter(tmp_path / "lora", {**factors({Q: (8, 8)}), **tensors})
    fails(tmp_path, "ties `lm_head.weight` to `model.embed_tokens.weight`", "`tie_word_embeddings` to false")


def test_an_embedding_that_peft_kept_tied(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    tiny_checkpoint(tmp_path / "base", WITHOUT_HEAD, config=CONFIG)
    write_adapter(tmp_path / "lora", {"model.embed_tokens.weight": torch.ones(20, 8)}, ensure_weight_tying=True)
    made = planned(tmp_path)
    file = {t.name: t.node.load.file for o in made.outputs for t in o.tensors if t.node.load is not None}
    assert file["model.embed_tokens.weight"].endswith("adapter_model.safetensors")


def test_a_quantised_base(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    tiny_checkpoint(tmp_path / "base", config={**CONFIG, "quantization_config": {"quant_method": "bitsandbytes"}})
    write_adapter(tmp_path / "lora", factors({Q: (8, 8)}))
    fails(tmp_path, "quantised", "bfloat16")


def test_faults_of_an_adapter_come_with_those_of_the_steps(base: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "lora", factors({"model.none": (8, 8)}))
    steps = "steps:\n  d: {use: delta, of: x, base: base}\n  m: {use: linear, of: [x, d]}\n"
    with pytest.raises(MergeError) as caught:
        planned(tmp_path, steps, "m")
    assert len(caught.value.problems) == 2


def test_the_plan_shows_the_adapter(base: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "lora", {**factors({Q: (8, 8)}), "model.norm.weight": torch.ones(8)})
    made = planned(tmp_path, "steps:\n  m: {use: linear, of: [base, x]}\n", "m")
    models: Mapping[str, Any] = explain.as_json(made, 1)["models"]
    assert models["base"]["adapter"] is None
    expected = {"location": f"{tmp_path}/lora", "revision": None, "low_rank": 1, "whole": 1}
    assert models["x"]["adapter"] == expected
    assert f"{tmp_path}/base + {tmp_path}/lora" in "\n".join(explain.tree(made))
    assert f"{tmp_path}/base + {tmp_path}/lora" in explain.mermaid(made)
    rows = {row[1]: row[-1] for row in explain.tensors(made)}
    assert rows[f"{Q}.weight"] == f"linear(base, lora(base, {tmp_path}/lora, scale=2))"
    assert rows["model.norm.weight"] == f"linear(base, {tmp_path}/lora:base_model.model.model.norm.weight)"
    # What the adapter leaves alone is the base itself, and the mean of two copies is read once.
    names = {n.load.file for o in made.outputs for t in o.tensors if t.name == "lm_head.weight" for n in t.node.inputs
             if n.load}  # fmt: skip
    assert names == {f"{tmp_path}/base/model.safetensors"}


def test_an_output_keeps_the_dtype_of_the_base(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    tiny_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    write_adapter(tmp_path / "lora", {**factors({Q: (8, 8)}), "model.norm.weight": torch.ones(8)})
    assert {t.dtype for output in planned(tmp_path).outputs for t in output.tensors} == {"BF16"}


def test_grouped_convolutions_fit_by_their_kernels(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_file({"conv.weight": torch.ones(6, 2, 3, 3)}, tmp_path / "base/model.safetensors")
    (tmp_path / "base/config.json").write_text(json.dumps({"model_type": "custom"}))
    parts = {"conv.lora_A.weight": torch.ones(4, 2, 3, 3), "conv.lora_B.weight": torch.ones(6, 4, 1, 1)}
    write_adapter(tmp_path / "lora", parts)
    assert changed(planned(tmp_path)) == {"conv.weight"}
    write_adapter(tmp_path / "lora", {**parts, "conv.lora_A.weight": torch.ones(4, 6, 3, 3)})
    fails(tmp_path, "do not fit a weight of 6×2×3×3")
