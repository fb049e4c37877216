"""`merge path`: scores on the way between two models, and the barrier, with and without matching first."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_process import Ran
from safetensors.numpy import load_file
from safetensors.torch import save_file

Merge = Callable[..., Ran]
FAMILY = """\
name: two_layers
model_types: [two_layers]
stacks: []
spaces:
  hidden: {name: hidden, kind: mlp}
axes:
  up.weight: [hidden, fixed]
  down.weight: [fixed, hidden]
"""
# Without torch: a score is a process for each point.
LOSS = """\
import json, pathlib, sys
from safetensors.numpy import load_file
def out(folder):
    t = load_file(pathlib.Path(folder) / "model.safetensors")
    return t["up.weight"].T.clip(min=0) @ t["down.weight"].T
print(json.dumps({"loss": float(((out(sys.argv[1]) - out(sys.argv[2])) ** 2).sum())}))
"""


@pytest.fixture
def models(tmp_path: Path) -> tuple[str, str]:
    """`a`, and the same network with its hidden units in another order."""
    generator = torch.Generator().manual_seed(2)
    up, down = torch.randn(6, 4, generator=generator), torch.randn(3, 6, generator=generator)
    order = torch.tensor([3, 4, 5, 0, 1, 2])
    for name, p in (("a", torch.arange(6)), ("b", order)):
        (tmp_path / name).mkdir()
        tensors = {"up.weight": up[p].contiguous(), "down.weight": down[:, p].contiguous()}
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "two_layers", "hidden_size": 6}')
    (tmp_path / "family.yaml").write_text(FAMILY)
    (tmp_path / "loss.py").write_text(LOSS)
    return str(tmp_path / "a"), str(tmp_path / "b")


def loss(a: str, b: str, t: float) -> float:
    """How far the network on the way is from what `a` computes."""
    one, two = load_file(Path(a) / "model.safetensors"), load_file(Path(b) / "model.safetensors")
    up, down = ((1 - t) * one[name] + t * two[name] for name in ("up.weight", "down.weight"))
    wanted = one["up.weight"].T.clip(min=0) @ one["down.weight"].T
    return float(((up.T.clip(min=0) @ down.T - wanted) ** 2).sum())


def test_the_barrier_is_that_of_the_losses_and_falls_to_nothing_once_matched(
    models: tuple[str, str], tmp_path: Path, merge: Merge
) -> None:
    command = f"{sys.executable} {tmp_path / 'loss.py'} {{model}} {models[0]}"
    common = ("path", *models, "--score", command, "--metric", "loss", "--points", "5", "--json")
    plain = merge(*common)
    assert plain.code == 0, plain.err
    wanted = [loss(*models, i / 4) for i in range(5)]
    assert [point["score"] for point in plain.json["points"]] == pytest.approx(wanted, rel=1e-5, abs=1e-9)
    line = [(1 - i / 4) * wanted[0] + i / 4 * wanted[4] for i in range(5)]
    height = max(w - straight for w, straight in zip(wanted, line, strict=True))
    assert plain.json["barrier"] == pytest.approx(height, rel=1e-4) and height > 1
    matched = merge(*common, "--align", "mlp", "--family", str(tmp_path / "family.yaml"))
    assert matched.code == 0, matched.err
    assert matched.json["barrier"] == pytest.approx(0, abs=1e-5)
    upwards = merge(*common, "--goal", "max")
    lowest = max(straight - w for w, straight in zip(wanted, line, strict=True))
    assert upwards.json["barrier"] == pytest.approx(lowest, rel=1e-4, abs=1e-5)


def test_a_table_for_people_and_a_clear_word_where_the_score_fails(
    models: tuple[str, str], tmp_path: Path, merge: Merge
) -> None:
    shown = merge(
        "path", *models, "--score", f"{sys.executable} {tmp_path / 'loss.py'} {{model}} {models[0]}", "--metric", "loss"
    )
    assert shown.code == 0 and "best" in shown.out and shown.out.splitlines()[-1].startswith("barrier ")
    failed = merge("path", *models, "--score", f"{sys.executable} {tmp_path / 'nothing.py'} {{model}}")
    assert failed.code == 5 and "failed with exit code 2" in failed.err and "run it by hand" in failed.err
    unknown = merge("path", *models, "--score", "true {model}", "--align", "mlp")
    assert unknown.code == 3 and "two_layers" in unknown.err
    assert merge("path", *models, "--score", "true").code == 2
