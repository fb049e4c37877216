"""Plans as text, as drawings and as data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mergekit_lite import load_recipe, plan, run
from mergekit_lite.plan import explain
from mergekit_lite.plan.model import Plan
from mergekit_lite.plan.words import size

STAGED = """
version: 1
seed: 7
models: {base: ./base, a: ./a, b: ./b}
steps:
  delta_a: {use: delta, of: a, base: base}
  delta_b: {use: delta, of: b, base: base}
  sparse_a: {use: sparsify, of: delta_a, with: {density: 0.3}}
  mixed: {use: interpolate, of: [sparse_a, delta_b], with: {t: {"*.mlp.*": 0.4, else: 0.5}}}
  merged: {use: add, base: base, of: mixed}
  soup: {use: linear, of: {a: {weight: 3}, b: {}}}
save:
  - {step: merged, to: out/staged, shard: 600}
  - {step: soup, to: out/soup, dtype: bfloat16}
"""
NAMES: Mapping[str, tuple[int, ...]] = {
    "model.layers.0.mlp.up_proj.weight": (16, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.norm.weight": (8,),
}


@pytest.fixture
def staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Callable[..., Path]) -> Plan:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        tiny_checkpoint(tmp_path / name, NAMES, seed=seed)
    (tmp_path / "staged.yaml").write_text(STAGED, encoding="utf-8")
    return plan(load_recipe("staged.yaml"), threads=1)


def test_summary(staged: Plan):
    lines = explain.summary(staged, 1)
    read = rf"  read \S+ kB \({staged.bytes_read / staged.bytes_input:.1f}×\) · "
    cost = re.fullmatch(read + r"write (\S+ kB) in 3 shards · peak \S+ MB · cpu, 1 thread, about \d+ s", lines.pop(6))
    assert cost is not None
    assert cost[1] == size(staged.bytes_written)
    first, second, third = (size(shard.nbytes) for output in staged.outputs for shard in output.shards)
    width = max(len(first), len(second))
    assert lines == [
        "delta_a   delta(a) - base                 delta   3 tensors",
        "sparse_a  sparsify(delta_a)               delta   3 tensors",
        "delta_b   delta(b) - base                 delta   3 tensors",
        "mixed     interpolate(sparse_a, delta_b)  delta   3 tensors",
        "merged    add(mixed) - base               weight  3 tensors",
        "soup      linear(a, b)                    weight  3 tensors",
        "out/staged  from merged",
        f"  model-00001-of-00002.safetensors  {first:{width}}  1 tensor",
        f"  model-00002-of-00002.safetensors  {second:{width}}  2 tensors",
        "out/soup  from soup",
        f"  model.safetensors  {third}  3 tensors",
    ]


def test_tree(staged: Plan):
    assert (
        "\n".join(explain.tree(staged))
        == """\
out/staged
└─ merged  add  weight, 3 tensors
   ├─ mixed  interpolate t=*.mlp.*: 0.4, else: 0.5  delta, 3 tensors
   │  ├─ sparse_a  sparsify density=0.3  delta, 3 tensors
   │  │  └─ delta_a  delta  delta, 3 tensors
   │  │     ├─ a  ./a
   │  │     └─ base (base)  ./base
   │  └─ delta_b  delta  delta, 3 tensors
   │     ├─ b  ./b
   │     └─ base (base)  ./base
   └─ base (base)  ./base
out/soup
└─ soup  linear  weight, 3 tensors
   ├─ a  ./a
   └─ b  ./b"""
    )


def test_mermaid(staged: Plan):
    text = explain.mermaid(staged)
    sizes = [size(output.nbytes) for output in staged.outputs]
    assert (
        text
        == f"""\
flowchart LR
  model0[("base<br>./base")]
  model1[("a<br>./a")]
  model2[("b<br>./b")]
  step0["delta_a<br>delta"]
  step1["sparse_a<br>sparsify"]
  step2["delta_b<br>delta"]
  step3["mixed<br>interpolate"]
  step4["merged<br>add"]
  step5["soup<br>linear"]
  model1 --> step0
  model0 -. base .-> step0
  step0 --> step1
  model2 --> step2
  model0 -. base .-> step2
  step1 --> step3
  step2 --> step3
  step3 --> step4
  model0 -. base .-> step4
  model1 --> step5
  model2 --> step5
  out0[/"out/staged<br>{sizes[0]}"/]
  step4 --> out0
  out1[/"out/soup<br>{sizes[1]}"/]
  step5 --> out1"""
    )


def test_mermaid_labels_cannot_break_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Callable[..., Path]
):
    monkeypatch.chdir(tmp_path)
    name = 'a"]; click x <b> #1'
    tiny_checkpoint(tmp_path / name, NAMES)
    recipe = tmp_path / "odd.yaml"
    recipe.write_text(
        f"version: 1\nsteps: {{m: {{use: linear, of: ['./{name}']}}}}\nsave: {{to: out/x}}\n", encoding="utf-8"
    )
    text = explain.mermaid(plan(load_recipe(recipe)))
    assert '[("./a#quot;]; click x #lt;b#gt; #35;1")]' in text


def test_expressions(staged: Plan):
    rows = {(row[0], row[1]): row[-1] for row in explain.tensors(staged)}
    assert rows["out/staged", "model.layers.0.mlp.up_proj.weight"] == (
        "add(interpolate(sparsify(delta(a, base), density=0.3), delta(b, base), t=0.4), base)"
    )
    assert rows["out/staged", "model.norm.weight"].count("t=0.5") == 1
    assert rows["out/soup", "model.norm.weight"] == "linear(a, b, weight=[3, 1])"


def test_rows_say_where_the_bytes_really_are(staged: Plan):
    """The table of tensors, held against what safetensors reads from the finished files."""
    rows = explain.tensors(staged)
    run(staged, threads=1)
    seen = set()
    for folder, name, shape, dtype, file, start, _ in rows:
        with safe_open(Path(folder) / file, "pt") as opened:
            tensor = opened.get_tensor(name)
        assert "×".join(map(str, tensor.shape)) == shape
        assert {torch.float32: "F32", torch.bfloat16: "BF16"}[tensor.dtype] == dtype
        stored = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        whole = (Path(folder) / file).read_bytes()
        assert whole[int(start) : int(start) + len(stored)] == stored
        seen.add((folder, name))
    assert len(seen) == 2 * len(NAMES)


def test_a_copied_tensor_says_from_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Callable[..., Path]
):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a", "b")):
        tiny_checkpoint(tmp_path / name, seed=seed)
    text = (
        "version: 1\nmodels: {a: ./a, b: ./b}\nsteps:\n"
        "  tall: {use: stack, of: [{model: a, layers: [0, 1]}, {model: b, layers: [0, 2]}]}\nsave: {to: out/tall}\n"
    )
    (tmp_path / "tall.yaml").write_text(text, encoding="utf-8")
    rows = {row[1]: row[-1] for row in explain.tensors(plan(load_recipe("tall.yaml")))}
    assert rows["model.norm.weight"] == "copy of a"
    assert rows["model.layers.0.mlp.up_proj.weight"] == "copy of a"
    assert rows["model.layers.2.mlp.up_proj.weight"] == "copy of b:model.layers.1.mlp.up_proj.weight"


def test_a_graph_of_shared_results_does_not_explode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Callable[..., Path]
):
    """60 steps that each use the step before twice: 2**60 leaves, were the expression written out."""
    monkeypatch.chdir(tmp_path)
    tiny_checkpoint(tmp_path / "a", NAMES)
    tiny_checkpoint(tmp_path / "b", NAMES, seed=1)
    steps = ["  s0: {use: linear, of: [./a, ./b]}"]
    steps += [f"  s{i}: {{use: interpolate, of: [s{i - 1}, s{i - 1}], with: {{t: 0.3}}}}" for i in range(1, 61)]
    (tmp_path / "deep.yaml").write_text("version: 1\nsteps:\n" + "\n".join(steps) + "\nsave: {to: out/deep}\n")
    made = plan(load_recipe("deep.yaml"))
    assert all(len(row[-1]) <= explain.LONGEST and row[-1].endswith("…") for row in explain.tensors(made))
    assert len(explain.tree(made)) == 1 + 61 + 60 + 2
    assert len(explain.mermaid(made).splitlines()) < 300


def test_json_adds_up(staged: Plan):
    data = explain.as_json(staged, 3)
    shards = [shard for output in data["outputs"] for shard in output["shards"]]
    assert data["bytes_written"] == sum(shard["bytes"] for shard in shards)
    for shard in shards:
        # Tensors lie end to end up to the end of the file.
        end = shard["tensors"][0]["start"]
        for tensor in shard["tensors"]:
            assert tensor["start"] == end
            end += tensor["bytes"]
        assert end == shard["bytes"]
    assert (data["digest"], data["seed"], data["threads"]) == (staged.digest, 7, 3)
    assert data["models"]["a"]["bytes"] == sum(4 * torch.Size(shape).numel() for shape in NAMES.values())
    assert [step["name"] for step in data["steps"]][-1] == "soup"
