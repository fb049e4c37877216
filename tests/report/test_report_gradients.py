"""Gradients of several tasks against each other: against NumPy, and files that do not belong together."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mergekit_lite.cli.app import execute
from mergekit_lite.report.gradients import gradients
from mergekit_lite.report.look import open_location

SHAPES = {"layers.0.w": (7, 9), "layers.0.b": (5,), "layers.1.w": (4, 4), "head.w": (3, 7)}
MODEL = {"kind": "gradient", "model_digests": json.dumps({"model.safetensors": "blake3:1"})}


def drawn(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, three models and three files of gradients; `steady` is a number of the models that has no gradient."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b", "c")):
        Path(name).mkdir()
        save_file(drawn(seed) | {"steady": torch.ones(2) * seed}, f"{name}/model.safetensors")
    for seed, name in enumerate(("x", "y", "z")):
        said = MODEL | {"skipped": json.dumps({"steady": "no parameter"})}
        save_file(drawn(10 + seed), f"{name}.safetensors", said)
    return tmp_path


Ran = tuple[int, str, str]


@pytest.fixture
def diff(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def run(*files: str, more: tuple[str, ...] = (), models: tuple[str, ...] = ("a", "b")) -> Ran:
        capsys.readouterr()
        given = [part for file in files for part in ("--gradients", f"{file}.safetensors")]
        code = execute(["diff", *models, "--base", "base", *given, *more])
        out, err = capsys.readouterr()
        return code, out, " ".join(err.split())

    return run


def test_cosines_by_tensor_layer_and_pair(diff: Callable[..., Ran]) -> None:
    code, out, _ = diff("x", "y", "z", models=("a", "b", "c"), more=("--json",))
    assert code == 0
    found = json.loads(out)
    made = found["gradients"]
    states = [{name: value.double().numpy().ravel() for name, value in drawn(seed).items()} for seed in (10, 11, 12)]

    def cosines(names: list[str]) -> list[float]:
        flat = [np.concatenate([state[name] for name in names]) for state in states]
        return [u @ v / np.sqrt((u @ u) * (v @ v)) for u, v in itertools.combinations(flat, 2)]

    groups = {"layers.0": ["layers.0.w", "layers.0.b"], "layers.1": ["layers.1.w"], "head": ["head.w"]}
    for kind, wanted in (
        ("layers", groups),
        ("tensors", {name: [name] for name in SHAPES}),
    ):
        assert {entry["name"] for entry in made[kind]} == set(wanted)
        for entry in made[kind]:
            expected = cosines(wanted[entry["name"]])
            assert entry["cosine"] == pytest.approx(np.mean(expected), rel=1e-12)
            assert [pair["cosine"] for pair in entry["pairs"]] == pytest.approx(expected, rel=1e-12)
    assert made["all"]["cosine"] == pytest.approx(np.mean(cosines(list(SHAPES))), rel=1e-12)
    assert made["files"] == ["x.safetensors", "y.safetensors", "z.safetensors"]
    # Task vectors are compared as without gradients.
    without = json.loads(diff(models=("a", "b", "c"), more=("--json",))[1])
    assert found == without | {"gradients": made}
    code, out, _ = diff("x", "y", "z", models=("a", "b", "c"))
    lines = [line.split() for line in out.splitlines() if line]
    assert lines[5][:2] == ["steady", "2"] and lines[5][-1] == "-"
    pair = next(line for line in lines if line[:2] == ["b", "c"])
    assert pair[-1] == f"{made['all']['pairs'][2]['cosine']:.4f}"


def test_blocks_and_threads_change_nothing(here: Path) -> None:
    base, a, b, x, y = (open_location(name) for name in ("base", "a", "b", "x.safetensors", "y.safetensors"))
    read: list[int] = []
    whole = gradients(base, [a, b], [x, y], advance=read.append)
    assert sum(read) == sum(4 * value.numel() for value in drawn(0).values())
    for block, threads in ((1, 1), (4, 3)):
        parts = gradients(base, [a, b], [x, y], threads=threads, block=block)
        for name, found in parts.tensors.items():
            assert found.cosine == pytest.approx(whole.tensors[name].cosine, rel=1e-12)


def test_files_that_do_not_belong_together(here: Path, diff: Callable[..., Ran]) -> None:
    """All faults at once, each by the file's name, before a weight is read."""
    good = drawn(20)
    save_file(good, "plain.safetensors")
    save_file(good, "fisher.safetensors", MODEL | {"kind": "fisher"})
    save_file(good, "odd.safetensors", MODEL | {"model_digests": "["})
    save_file(good, "other.safetensors", MODEL | {"model_digests": '{"m": "blake3:2"}', "skipped": '{"steady": ""}'})
    for file in ("plain", "fisher", "odd"):
        code, _, err = diff("x", file)
        assert code == 4 and f"`{file}.safetensors` holds no gradients" in err and "`x.safetensors`" not in err
    code, _, err = diff("x", "other")
    assert code == 4 and "`other.safetensors` was gathered at another model than `x.safetensors`" in err
    save_file({n: t for n, t in good.items() if n != "layers.1.w"}, "less.safetensors", MODEL)
    save_file(good | {"head.w": torch.ones(7, 3), "layers.0.b": torch.ones(5).int()}, "odd.safetensors", MODEL)
    code, _, err = diff("less", "odd")
    assert code == 4
    assert "`less.safetensors` has no gradient of `layers.1.w`, `steady`" in err
    assert "`head.w` of `odd.safetensors` is 7×3, the base's 3×7" in err
    assert "`layers.0.b` of `odd.safetensors` is I32, no gradient" in err


def test_wrong_use(here: Path, diff: Callable[..., Ran], capsys: pytest.CaptureFixture[str]) -> None:
    for files in (("x",), ("x", "y", "z")):
        code, _, err = diff(*files)
        assert code == 2 and "once for every model" in err
    assert execute(["diff", "a", "b", "--gradients", "x.safetensors", "--gradients", "y.safetensors"]) == 2
    assert "`--gradients` goes with `--base`" in capsys.readouterr().err
    code, _, err = diff("x", "none")
    assert code == 4 and "none.safetensors" in err
    Path("box").mkdir()
    code, _, err = diff("x", "y", more=("--sandbox", "box"))
    assert code == 2 and "`x.safetensors` lies outside the sandbox" in err and "`y.safetensors`" in err


def test_numbers_that_are_none_are_left_out_and_told(here: Path, diff: Callable[..., Ran]) -> None:
    broken = drawn(11)
    broken["layers.1.w"][0, 0] = torch.nan
    save_file(broken, "y.safetensors", MODEL | {"skipped": '{"steady": ""}'})
    code, out, err = diff("x", "y", more=("--json",))
    assert code == 0 and "1 number of gradients left out" in err
    layer = next(entry for entry in json.loads(out)["gradients"]["layers"] if entry["name"] == "layers.1")
    one, two = (drawn(seed)["layers.1.w"].double().numpy().ravel()[1:] for seed in (10, 11))
    assert layer["cosine"] == pytest.approx(one @ two / np.sqrt((one @ one) * (two @ two)), rel=1e-12)
