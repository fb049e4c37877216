"""`merge diff`: its answer as an exit code, its table and its JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mergekit_lite.cli.app import execute

Make = Callable[..., str]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def checkpoint(name: str, config: dict[str, object] | None = None, **tensors: Tensor) -> str:
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        if config is not None:
            (tmp_path / name / "config.json").write_text(json.dumps(config))
        return str(tmp_path / name)

    return checkpoint


def test_equal(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (make(name, {"k": 1}, x=torch.tensor([1.0, float("nan")]), y=torch.arange(3)) for name in "ab")
    assert execute(["diff", a, b]) == 0
    assert capsys.readouterr() == ("equal · 2 tensors · 2 same\n", "")
    assert execute(["diff", a, b, "--all"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:3]] == [["x", "same"], ["y", "same"]]


def test_different(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    a = make("a", {"k": 1}, near=torch.zeros(2), far=torch.ones(2), cut=torch.ones(2, 3), old=torch.ones(1))
    b = make("b", {"k": 2}, near=torch.full((2,), 0.25), far=torch.ones(2) * 3, cut=torch.ones(3, 2))
    assert execute(["diff", a, b]) == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["cut", "old", "far", "near"]
    assert lines[1].split()[1:5] == ["shape", "2×3", "|", "3×2"]
    assert lines[3].split()[1:] == ["differs", "2", "2", "1.000000", "2/2"]
    assert lines[4].split()[1:] == ["differs", "0.25", "inf", "nan", "2/2"]
    assert lines[7].split() == ["k", "1", "2"]
    summary = "not equal · 4 tensors · 2 differ · 1 of another shape · 1 only in A · 1 key of config.json"
    assert lines[-1] == summary and err == ""


@pytest.mark.parametrize("tolerance, code", [("0.25", 0), ("0.2", 1), ("0", 1)])
def test_tolerance(make: Make, tolerance: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make("a", x=torch.zeros(2)), make("b", x=torch.full((2,), 0.25, dtype=torch.float64))
    assert execute(["diff", a, b, "--tolerance", tolerance, "--json"]) == code
    assert json.loads(capsys.readouterr().out)["equal"] == (code == 0)


def test_limit_and_order(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    a = make("a", **{f"t{i:02}": torch.zeros(1) for i in range(40)})
    b = make("b", **{f"t{i:02}": torch.full((1,), i + 1.0) for i in range(40)})
    shown = {}
    for arguments in ([], ["--limit", "2"], ["--limit", "0", "--sort", "name"]):
        assert execute(["diff", a, b, *arguments]) == 1
        out, err = capsys.readouterr()
        shown[len(arguments)] = [line.split()[0] for line in out.splitlines()[1:-2]]
        assert ("more: `--limit 0` shows all" in err) == (len(arguments) != 4)
    assert len(shown[0]) == 30
    assert shown[2] == ["t39", "t38"]
    assert shown[4] == [f"t{i:02}" for i in range(40)]
    assert execute(["diff", a, b, "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["tensors"]) == 40


def test_json_of_numbers_that_json_lacks(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make("a", x=torch.zeros(1)), make("b", x=torch.tensor([float("inf")]))
    assert execute(["diff", a, b, "--json"]) == 1
    (tensor,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["tensors"]
    assert (tensor["undefined"], tensor["max_abs"], tensor["cosine"]) == (1, 0.0, None)


def test_without_configuration_the_weights_decide(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make("a", {"k": 1}, x=torch.ones(1)), make("b", x=torch.ones(1))
    assert execute(["diff", a, b]) == 0
    assert "has no config.json" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--tolerance", "-1"], ["--sort", "size"], ["--limit", "-1"]])
def test_bad_options(make: Make, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    a = make("a", x=torch.ones(1))
    assert execute(["diff", a, a, *arguments]) == 2
    assert arguments[0] in capsys.readouterr().err


def test_directions_are_those_of_the_singular_vectors(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """A turned copy has the same singular values and other directions: rho is the cosine, by von Neumann at most 1."""
    generator = torch.Generator().manual_seed(1)
    x, v = torch.randn(6, 5, generator=generator), torch.ones(3)
    order = torch.tensor([2, 0, 1, 5, 3, 4])
    a, b = make("a", x=x, v=v), make("b", x=x[order].contiguous(), v=2 * v)
    assert execute(["diff", a, b, "--directions", "--json", "--sort", "name"]) == 1
    found = {entry["name"]: entry["directions"] for entry in json.loads(capsys.readouterr().out)["tensors"]}
    singular = torch.linalg.svdvals(x.double())
    rho = float((x * x[order]).sum() / (singular**2).sum())
    assert found["x"]["rho"] == pytest.approx(rho, rel=1e-5) and found["v"] is None
    assert execute(["diff", a, b, "--directions"]) == 1
    assert "leading" in capsys.readouterr().out.splitlines()[0]
