"""What no mixture can be built of is refused before anything is written, with the line that is at fault; a run keeps
the memory that its plan names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_models import WIDTH, mixture, write_dense, write_states
from safetensors.torch import load_file, save_file

from mergekit_lite import InputError, MergeError, RecipeError, load_recipe, plan, run
from mergekit_lite.plan.budget import memory_bytes
from tests.faults.memory import digests, merge, named_figure

OF = "of: [{model: a, hidden: h}, {model: b, hidden: i}]"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that fit together (a, b), and some that do not; states that fit (h, i), and some that do not."""
    at = tmp_path_factory.mktemp("dense")
    changes: dict[str, dict[str, Any]] = {
        "a": {},
        "b": {},
        "wide": {"hidden_size": 48},
        "deep": {"num_hidden_layers": 4},
        "large": {"intermediate_size": 28},
        "biased": {"attention_bias": True},
        "other": {"hidden_act": "gelu"},
    }
    for seed, (name, change) in enumerate(changes.items()):
        write_dense(at / name, "llama", seed, **change)
    write_dense(at / "mistral", "mistral", 9)
    write_dense(at / "qwen", "qwen3", 9)
    for name, (layers, width) in {"h": (3, WIDTH), "i": (3, WIDTH), "short": (2, WIDTH), "broad": (3, 48)}.items():
        write_states(at / f"{name}.safetensors", len(name), layers, width)
    save_file({"x.logits_gram": torch.ones(2, 2)}, at / "routers.safetensors")
    (at / "halved").mkdir()
    (at / "halved" / "config.json").write_bytes((at / "b" / "config.json").read_bytes())
    held = load_file(at / "b" / "model.safetensors")
    held.pop("model.layers.1.mlp.up_proj.weight")
    save_file(held, at / "halved" / "model.safetensors", {"format": "pt"})
    return {path.stem: path for path in at.iterdir()}


WRONG = [
    ("base: a, of: [a, b]", "`moe` needs `style`", "use: moe"),
    ("of: [a, b], with: {style: mixtral}", "needs a `base`", "use: moe"),
    ("base: a, of: [a, b], with: {style: llama}", "`style` is one of", "style: llama"),
    ("base: a, rest: b, of: [a, b], with: {style: mixtral}", "takes no `rest`", "rest: b"),
    ("base: a, of: [a, b], with: {style: mixtral, per_token: 3}", "more than the 2 experts", "use: moe"),
    ("base: a, of: [a, b], with: {style: mixtral, gates: hidden}", "needs `hidden` beside every input", "use: moe"),
    (f"base: a, {OF}, with: {{style: mixtral}}", "`hidden` goes with `gates: hidden`", "use: moe"),
    ("base: a, of: [a, b], with: {style: mixtral, gates: uniform, gate_std: 1}", "about `gates: random`", "use: moe"),
    ("base: a, of: [a, b], with: {style: qwen3_moe}", "is of the model type `llama`", "base: a"),
    ("base: qwen, of: [qwen, qwen], with: {style: mixtral}", "is of the model type `qwen3`", "base: qwen"),
    ("base: a, of: [a, mistral], with: {style: mixtral}", "`mistral` has the model_type `mistral`", "of: [a, mistral]"),
    ("base: a, of: [a, other], with: {style: mixtral}", "`other` has the hidden_act `gelu`", "of: [a, other]"),
    ("base: a, of: [a, wide], with: {style: mixtral}", "`wide` is 48 wide, `a` is 24", "of: [a, wide]"),
    ("base: a, of: [a, deep], with: {style: mixtral}", "`deep` has 4 layers, `a` has 3", "of: [a, deep]"),
    ("base: a, of: [a, large], with: {style: mixtral}", "28 hidden units, of `a` 20", "of: [a, large]"),
    (
        "base: a, of: [a, halved], with: {style: mixtral}",
        "lacks `model.layers.1.mlp.up_proj.weight`",
        "of: [a, halved]",
    ),
    ("base: biased, of: [a, b], with: {style: mixtral}", "has no place for", "base: biased"),
    (
        "base: biased, of: [a, b], with: {style: qwen2_moe, shared: a}",
        "`model.layers.0.self_attn.o_proj.bias`",
        "biased",
    ),
    ("base: a, of: [a, b], with: {style: mixtral, shared: a}", "has no shared expert", "shared: a"),
    ("base: a, of: [a, b], with: {style: qwen2_moe}", "needs a shared expert", "style: qwen2_moe"),
    ("base: a, of: [a, b], with: {style: glm4_moe, shared: large}", "no multiple of the experts' 20", "shared: large"),
    ("base: a, of: [a, b], with: {style: qwen2_moe, shared_scale: 2}", "`shared` names none", "use: moe"),
    ("base: a, of: a, with: {style: glm4_moe, shared: a, per_token: 1}", "has 2 experts or more", "style: glm4_moe"),
    ("base: a, of: [a, b], with: {style: mixtral, dense: 1}", "all layers of a `mixtral` have experts", "dense: 1"),
    ("base: a, of: [a, b], with: {style: deepseek, dense: 3}", "leaves none of the 3 layers", "dense: 3"),
    ("base: a, of: [a, b], with: {style: mixtral, noise: {'*': 0.1}}", "one value for all tensors", "noise"),
    ("base: a, of: [a, b], with: {style: mixtral, noise: -1}", "`noise` must lie in", "noise: -1"),
    (f"base: a, {OF}, with: {{style: mixtral, gates: hidden, negative: h}}", "for and against", "negative: h"),
    ("base: a, of: [a, b], with: {style: mixtral, gates: hidden, hidden: short}", "is 2×24", "hidden: short"),
    ("base: a, of: [a, b], with: {style: mixtral, gates: hidden, hidden: broad}", "is 3×48", "hidden: broad"),
    ("base: a, of: [a, b], with: {style: mixtral, gates: hidden, hidden: routers}", "no means", "hidden: routers"),
    ("base: a, of: [a, b], with: {style: mixtral, gates: hidden, hidden: nobody}", "no model or step", "nobody"),
    (
        "base: a, of: [a, b], with: {style: glm4_moe, shared: a, gates: hidden, hidden: h, shared_hidden: h}",
        "of a `glm4_moe` has no gate",
        "shared_hidden: h",
    ),
]


@pytest.mark.parametrize(("step", "message", "at"), WRONG)
def test_wrong_input_is_told_where_it_stands(
    step: str, message: str, at: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(MergeError) as fault:
        mixture(tmp_path / "r.yaml", folders, step)
    assert isinstance(fault.value, (RecipeError, InputError))
    problem = fault.value.problems[0]
    assert message in problem.message and problem.mark is not None and at in problem.mark.text
    assert not (tmp_path / "r").exists()


def test_a_delta_is_no_expert(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        f"version: 1\nmodels: {{a: {folders['a']}, b: {folders['b']}}}\nsteps:\n  d: {{use: delta, of: b, base: a}}\n"
        f"  m: {{use: moe, base: a, of: [a, d], with: {{style: mixtral}}}}\nsave: {{to: {tmp_path / 'out'}}}\n"
    )
    with pytest.raises(RecipeError, match="takes whole models, `d` is a delta"):
        plan(load_recipe(path))


def test_what_deserves_a_warning(folders: dict[str, Path], tmp_path: Path) -> None:
    def warned(step: str) -> list[str]:
        path = tmp_path / "r.yaml"
        named = ", ".join(f"{name}: {at}" for name, at in folders.items())
        path.write_text(f"version: 1\nmodels: {{{named}}}\nsteps: {{m: {{use: moe, {step}}}}}\nsave: {{to: x}}\n")
        return [problem.message for problem in plan(load_recipe(path), check_output=False).warnings]

    same = "base: a, of: [{model: a, hidden: h}, {model: b, hidden: h}], with: {style: mixtral, gates: hidden}"
    (found,) = warned(same)
    assert "inputs 0 and 1" in found and "same gate" in found
    assert warned(f"base: a, {OF}, with: {{style: mixtral, gates: hidden}}") == []
    (found,) = warned("base: mistral, of: [mistral, mistral], with: {style: qwen2_moe, shared: mistral}")
    assert "looks back 5 tokens" in found
    assert warned("base: mistral, of: [mistral, mistral], with: {style: mixtral}") == []


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not say how much memory there is")
def test_building_experts_keeps_the_figure_that_its_plan_names(tmp_path: Path) -> None:
    """One layer whose matrices have 8 MB in float32 each, made into three experts with noise."""
    width, units = 1024, 2048
    torch.manual_seed(1)
    lead = "model.layers.0."
    held = {f"{lead}mlp.{name}_proj.weight": torch.randn(units, width).bfloat16() for name in ("gate", "up")}
    held[f"{lead}mlp.down_proj.weight"] = torch.randn(width, units).bfloat16()
    (tmp_path / "a").mkdir()
    save_file(held, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": width, "num_attention_heads": 8}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    path = tmp_path / "r.yaml"
    path.write_text(
        f"version: 1\nmodels: {{a: {tmp_path / 'a'}}}\nsteps:\n  m: {{use: moe, base: a, of: a, with: "
        f"{{style: mixtral, copies: 3, noise: 0.1}}}}\nsave: {{to: {tmp_path / 'out'}}}\n",
        encoding="utf-8",
    )
    refused = merge("run", str(path), "--memory", "90MB", "--threads", "2")
    figure = named_figure(refused)
    assert refused.code == 3 and figure is not None
    kept = merge("run", str(path), "--memory", figure, "--threads", "2")
    assert kept.code == 0, kept.err
    assert kept.peak <= memory_bytes(figure)
    free = run(plan(load_recipe(path), out=tmp_path / "free"), threads=1, block=1 << 14)
    assert digests(kept) == [digest for files in free.shards.values() for digest in files.values()]
