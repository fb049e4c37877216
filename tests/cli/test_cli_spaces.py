"""`merge inspect --spaces` and `merge doctor --spaces`/`--family`: what may be permuted, shown and proved."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_process import Ran
from safetensors.torch import save_file

Merge = Callable[..., Ran]
SIZES = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The headers are all that matters: a Llama of three layers, of zeros."""
    folder = tmp_path_factory.mktemp("llama")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES, **HEADS}
    layer = {
        "self_attn.q_proj": (48, 48), "self_attn.k_proj": (24, 48), "self_attn.v_proj": (24, 48),
        "self_attn.o_proj": (48, 48), "mlp.gate_proj": (112, 48), "mlp.up_proj": (112, 48), "mlp.down_proj": (48, 112),
        "input_layernorm": (48,), "post_attention_layernorm": (48,),
    }  # fmt: skip
    tensors = {f"model.layers.{i}.{name}.weight": torch.zeros(s) for i in range(3) for name, s in layer.items()}
    ends: dict[str, tuple[int, ...]] = {"model.embed_tokens": (96, 48), "model.norm": (48,), "lm_head": (96, 48)}
    save_file(tensors | {f"{name}.weight": torch.zeros(s) for name, s in ends.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def family_file(path: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """The family file of Llama, changed."""
    file = resources.files("mergekit_lite.family") / "llama.yaml"
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    change(data)
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return str(path)


def first(data: dict[str, Any], axes: dict[str, list[str]]) -> None:
    """Rules that stand before the others, so that they hold."""
    rules = {f"{{body}}layers.{{i}}.{name}.weight": along for name, along in axes.items()}
    data["axes"] = rules | data["axes"] | rules


def verdicts(ran: Ran) -> dict[str, str]:
    (checks,) = ran.json["checkpoints"].values()
    return {check["name"]: check["verdict"] for check in checks}


def test_the_table(llama: str, merge: Merge) -> None:
    ran = merge("inspect", llama, "--spaces")
    assert ran.code == 0 and ran.err == ""
    rows = [line.split()[:6] for line in ran.out.splitlines()[-4:]]
    assert sorted(rows) == [
        ["layers.{0..2}.heads", "heads", "3", "6", "2", "4"],
        ["layers.{0..2}.heads.{0..2}.vo", "vo", "9", "8", "1", "2"],
        ["layers.{0..2}.mlp", "mlp", "3", "112", "1", "3"],
        ["residual", "residual", "1", "48", "1", "30"],
    ]
    made = merge("inspect", llama, "--spaces", "--json").json["spaces"]
    (hidden,) = [space for space in made if space["name"] == "layers.1.mlp"]
    assert (hidden["kind"], hidden["size"], hidden["group"], hidden["parent"]) == ("mlp", 112, 1, None)
    assert {(use["tensor"], use["axis"]) for use in hidden["uses"]} == {
        ("model.layers.1.mlp.gate_proj.weight", 0), ("model.layers.1.mlp.up_proj.weight", 0),
        ("model.layers.1.mlp.down_proj.weight", 1),
    }  # fmt: skip
    assert "spaces" not in merge("inspect", llama, "--json").json


def test_spaces_of_a_model_that_nobody_describes(tmp_path: Path, merge: Merge, llama: str) -> None:
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "novel"}')
    for command in ("inspect", "doctor"):
        ran = merge(command, str(tmp_path), "--spaces")
        assert ran.code == (4 if command == "inspect" else 1)
        assert "novel" in ran.out + ran.err and "docs/families.md" in ran.out + ran.err
    assert merge("inspect", str(tmp_path)).code == 0


def test_a_family_file_for_inspect(tmp_path: Path, merge: Merge, llama: str) -> None:
    file = family_file(tmp_path / "mine.yaml", lambda data: first(data, {"mlp.up_proj": ["fixed", "residual"]}))
    made = merge("inspect", llama, "--family", file, "--json").json["spaces"]
    assert {len(space["uses"]) for space in made if space["kind"] == "mlp"} == {2}
    assert merge("inspect", llama, "--family", str(tmp_path / "none.yaml")).code == 4


def test_a_proof(llama: str, merge: Merge) -> None:
    pytest.importorskip("transformers")
    ran = merge("doctor", llama, "--spaces", "--json")
    assert ran.code == 0 and set(verdicts(ran).values()) == {"ok"}
    shown = ["layers.0.mlp", "layers.1.heads.0.vo", "residual", "all together", "layers.0.heads.coordinates"]
    assert set(shown) <= set(verdicts(ran))


def test_a_family_file_that_forgets_a_tensor(llama: str, merge: Merge, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    file = family_file(tmp_path / "mine.yaml", lambda data: first(data, {"mlp.up_proj": ["fixed", "residual"]}))
    ran = merge("doctor", llama, "--family", file, "--json")
    assert ran.code == 1
    found = verdicts(ran)
    assert {name for name, verdict in found.items() if verdict == "fail"} == {
        "layers.0.mlp", "layers.1.mlp", "all together",
    }  # fmt: skip


def test_a_family_file_that_permutes_rotary_coordinates(llama: str, merge: Merge, tmp_path: Path) -> None:
    pytest.importorskip("transformers")

    def change(data: dict[str, Any]) -> None:
        data["spaces"]["free"] = {**data["spaces"]["vo"], "name": "layers.{i}.heads.{j}.qk", "kind": "qk"}
        first(data, {"self_attn.q_proj": ["heads * free", "residual"], "self_attn.k_proj": ["kv * free", "residual"]})

    ran = merge("doctor", llama, "--family", family_file(tmp_path / "mine.yaml", change))
    assert ran.code == 1
    failed = [line.split()[1] for line in ran.out.splitlines() if line.startswith("  fail")]
    assert failed == [f"layers.{i}.heads.{j}.qk" for i in range(2) for j in range(2)] + ["all"]
    assert "hint: " in ran.out


def test_a_family_file_that_does_not_fit(llama: str, merge: Merge, tmp_path: Path) -> None:
    ran = merge(
        "doctor", llama, "--family", family_file(tmp_path / "a.yaml", lambda d: d["axes"].pop("{head}lm_head.weight"))
    )
    assert ran.code == 1 and "lm_head.weight" in ran.out
    ran = merge("doctor", llama, "--family", family_file(tmp_path / "b.yaml", lambda d: d.update(axis={})))
    assert ran.code == 4 and "b.yaml" in ran.err and "axis" in ran.err


def test_a_proof_without_transformers(llama: str, merge: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    ran = merge("doctor", llama, "--spaces")
    assert ran.code == 4 and "pip install transformers" in ran.err
    assert merge("inspect", llama, "--spaces").code == 0


def test_a_model_type_that_transformers_does_not_know(llama: str, merge: Merge, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    save_file({"a.weight": torch.zeros(5, 3), "b.weight": torch.zeros(2, 5)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "novel", "auto_map": {"AutoModel": "novel--code.Novel"}}')
    (tmp_path / "novel.yaml").write_text(
        "name: novel\nmodel_types: [novel]\nspaces: {hidden: {kind: mlp}}\n"
        "axes: {a.weight: [hidden, fixed], b.weight: [fixed, hidden]}\n"
    )
    ran = merge("doctor", str(tmp_path), "--family", str(tmp_path / "novel.yaml"))
    assert ran.code == 4 and "transformers knows no model of type `novel`" in ran.err
    assert merge("inspect", str(tmp_path), "--family", str(tmp_path / "novel.yaml")).code == 0


def test_words_that_do_not_go_together(merge: Merge) -> None:
    ran = merge("doctor", "--spaces")
    assert ran.code == 2 and "needs a checkpoint" in ran.err
