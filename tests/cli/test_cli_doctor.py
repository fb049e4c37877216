"""`merge doctor`: a line for every check, and its answer as an exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mergekit_lite
from mergekit_lite.cli.app import execute

CONFIG = {"model_type": "llama", "num_hidden_layers": 1, "dtype": "float32"}


def make(folder: Path, last: float = 1.0) -> str:
    """A small checkpoint without a vocabulary, so that it needs no tokenizer."""
    folder.mkdir()
    save_file({"model.layers.0.mlp.up_proj.weight": torch.tensor([1.0, last])}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)


def test_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = make(tmp_path / "good"), make(tmp_path / "bad", float("nan"))
    assert execute(["doctor", good]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == good and out.splitlines()[-1] == "0 failures, 0 warnings" and err == ""
    assert {line.split()[0] for line in out.splitlines()[1:-1]} == {"ok"}
    assert execute(["doctor", good, bad, str(tmp_path / "none")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("  fail")] == ["numbers", "weights"]
    assert lines[-1] == "2 failures, 0 warnings"


def test_warnings_alone_leave_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path / "m")
    (tmp_path / "m.partial").mkdir()
    assert execute(["doctor", folder]) == 0
    assert "hint: go on with" in capsys.readouterr().out
    assert execute(["doctor", folder, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["verdict"] == "warn"
    assert [c["name"] for c in made["checkpoints"][folder] if c["verdict"] == "warn"] == ["run"]


def environment(folder: Path, **variables: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit code and the checks by name of `merge doctor`, started in `folder` as a process of its own."""
    path = os.pathsep.join([str(folder), str(Path(mergekit_lite.__file__).parents[1])])
    ran = subprocess.run(
        [sys.executable, "-m", "mergekit_lite", "doctor", "--json"],
        cwd=folder, env={**os.environ, "PYTHONPATH": path, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return ran.returncode, {check["name"]: check for check in json.loads(ran.stdout)["environment"]}


def test_the_environment(tmp_path: Path) -> None:
    code, checks = environment(tmp_path, HF_HUB_OFFLINE="1")
    assert code == 0
    assert checks["torch"]["detail"] == torch.__version__
    assert checks["hub"]["verdict"] == "warn"
    assert str(tmp_path) in checks["disk"]["detail"]
    assert "not shown" in checks["colours"]["detail"]
    assert checks["plugins"]["verdict"] == "ok"


def test_a_plugin_that_does_not_load(tmp_path: Path) -> None:
    info = tmp_path / "broken_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mergekit_lite.methods]\nbroken = broken_methods\n")
    (tmp_path / "broken_methods.py").write_text("raise RuntimeError('nothing works')\n")
    code, checks = environment(tmp_path, HF_HUB_OFFLINE="1")
    assert code == 1
    assert checks["plugins"]["verdict"] == "fail" and "broken-methods" in checks["plugins"]["detail"]
