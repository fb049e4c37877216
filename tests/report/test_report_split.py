"""Layers to share by a threshold: the list that `use: share` takes, and what it leaves to each model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from mergekit_lite import load_recipe, plan
from mergekit_lite.checkpoint.find import open_checkpoint
from mergekit_lite.cli.app import execute
from mergekit_lite.report.split import _spans, split
from tests.conftest import NAMES

Make = Callable[..., Path]
HOMES = ["lm_head", "model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"]  # as files have them


@given(st.sets(st.integers(0, 30)))
def test_spans_hold_the_numbers_and_no_others(numbers: set[int]) -> None:
    found: list[int] = []
    spans = _spans(numbers)
    for span in spans:
        first, _, last = str(span).partition("-")
        found += range(int(first), int(last or first) + 1)
    assert found == sorted(numbers)
    assert len(spans) == sum(number - 1 not in numbers for number in numbers)


@pytest.mark.parametrize("keep", range(1 << len(HOMES)))
def test_a_share_takes_what_the_split_names(
    keep: int, tmp_path: Path, tiny_checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        tiny_checkpoint(Path(name), seed=seed)
    scores = {home: 0.5 if keep >> place & 1 else 0.1 for place, home in enumerate(HOMES)}
    found = split(*_opened("base"), _opened("a", "b"), scores, 0.3)
    own = [home for home in HOMES if scores[home] < 0.3]
    assert list(found.own) == own
    if own == HOMES:
        assert found.settings == {}
        return
    text = "version: 1\nmodels: {a: ./a, b: ./b}\nsteps: {s: {use: share, of: [b, a], %s}}\nsave: {to: o}\n"
    settings = json.dumps(yaml.safe_load("\n".join(found.text)))[1:-1]
    Path("r.yaml").write_text(text % settings, encoding="utf-8")
    made = plan(load_recipe("r.yaml"))
    shared = [t.name for shard in made.outputs[0].shards if shard.apart for t in shard.tensors]
    assert sorted(shared) == sorted(n for n in NAMES if not n.startswith(tuple(f"{home}." for home in own)))


def _opened(*names: str) -> list:
    return [open_checkpoint(f"./{name}", None, mark=None, offline=True) for name in names]


def test_what_cannot_be_shared_is_left(tmp_path: Path) -> None:
    """Layers that a model lacks a part of, or has in another shape; a pattern that would match more than is meant; what
    no two models change is shared."""
    shapes = {"layers.0.w": 2, "layers.1.w": 2, "layers.2.w": 2, "top.w": 2, "top.in.w": 2, "w[1].x": 2}
    changed = {"a": {"layers.1.w": 3, "top.in.w": None}, "b": {"layers.1.v": 2}}
    for name in ("base", "a", "b"):
        sizes = {key: size for key, size in {**shapes, **changed.get(name, {})}.items() if size}
        (tmp_path / name).mkdir()
        save_file({key: torch.ones(size) for key, size in sizes.items()}, tmp_path / name / "model.safetensors")
    base, a, b = (open_checkpoint(str(tmp_path / n), None, mark=None, offline=True) for n in ("base", "a", "b"))
    scores = {"layers.0": 0.9, "layers.1": 0.9, "layers.2": None, "top": 0.9, "top.in": 0.9, "w[1]": 0.3}
    found = split(base, [a, b], scores, 0.3)
    assert found.layers == (0, 2) and found.tensors == ("top.w", "w[[]1].*")
    assert found.own == ("layers.1", "top.in")


def test_the_command_names_them(
    tmp_path: Path, tiny_checkpoint: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = {name: torch.zeros(shape) for name, shape in NAMES.items()}
    for name, sign in (("base", 0), ("a", 1), ("b", -1)):
        tiny_checkpoint(Path(name))
        # Both move the same way, but for layer 1.
        moved = {key: value + (sign if ".1." in key else abs(sign)) for key, value in base.items()}
        save_file(moved, Path(name) / "model.safetensors")
    command = ["diff", "a", "b", "--base", "base"]
    assert execute([*command, "--split", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "  with: {layers: [0], tensors: [lm_head.*, model.embed_tokens.*, model.norm.*]}" in out
    assert "below 0.5 or not known: model.layers.1\n" in out
    assert execute([*command, "--split", "-1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["split"]["with"]["layers"] == ["0-1"]
    assert execute([*command, "--json"]) == 0
    assert "split" not in json.loads(capsys.readouterr().out)
    assert execute(["diff", "a", "b", "--split", "0.5"]) == 2
    assert "--base BASE" in capsys.readouterr().err
