"""`merge inspect` from its command line to its output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergekit_lite.cli.app import execute

TENSORS = {
    "model.layers.0.mlp.up_proj.weight": torch.tensor([[0.0, 3.0], [-1.0, float("nan")]]).to(torch.bfloat16),
    "model.layers.1.mlp.up_proj.weight": torch.tensor([[1.0, float("inf")], [0.0, 0.0]]).to(torch.bfloat16),
    "model.embed_tokens.weight": torch.ones(3, 2),
    "model.positions": torch.arange(4),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    save_file(TENSORS, tmp_path / "model.safetensors")
    config = {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": True, "vocab_size": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def test_summary(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["inspect", checkpoint]) == 0
    out, err = capsys.readouterr()
    lines = {line[:14].strip(): line[14:] for line in out.splitlines()}
    assert lines["family"] == "llama · model type llama"
    assert lines["layers"] == "2 in layers"
    assert lines["parameters"] == "14 and 4 integers or booleans"
    assert lines["tied"] == "lm_head.weight = model.embed_tokens.weight · stored: model.embed_tokens.weight"
    assert lines["vocabulary"] == "3" and lines["beside"] == "config.json"
    assert "model.positions" not in out and err == ""


def test_list_of_tensors(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["inspect", checkpoint, "--tensors"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if ".weight " in line}
    assert rows["model.embed_tokens.weight"] == ["3×2", "F32", "24", "model.safetensors"]


def test_statistics_as_a_table_and_as_json(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["inspect", checkpoint, "--stats"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert rows["model.layers.0.mlp.up_proj.weight"][2:8] == ["1", "0", "0", "1", "-1", "3"]
    assert execute(["inspect", checkpoint, "--stats", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    entries = {entry["name"]: entry for entry in made["list"]}
    assert set(entries) == set(TENSORS)
    stats = entries["model.layers.1.mlp.up_proj.weight"]["stats"]
    assert stats["positive_infinity"] == 1 and stats["zeros"] == 2 and stats["mean"] == pytest.approx(1 / 3)
    assert made["total"]["nan"] == 1 and made["total"]["count"] == 14


def test_names_from_strangers_do_not_drive_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"bad\x1b[31m[bold]": torch.ones(1)}, tmp_path / "model.safetensors")
    assert execute(["inspect", str(tmp_path), "--tensors"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "bad\\x1b[31m[bold]" in out


def test_a_missing_checkpoint_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["inspect", str(tmp_path / "none"), "--json"]) == 4
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["exit_code"] == 4 and "no checkpoint" in err
