"""`merge plan --check` with models on the Hub: branches that moved, no weight fetched, work without the Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hub_models import model, recipe, weights
from server import Fault, Hub

from mergekit_lite.cli.app import execute


@pytest.fixture
def locked(hub: Hub, here: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A folder with the recipe r.yaml over three models, and its output out/x, whose weights were streamed."""
    for seed, name in enumerate(("base", "math", "code")):
        hub.add(f"org/{name}", model(seed))
    (here / "r.yaml").write_text(recipe("ties"))
    assert execute(["run", "r.yaml", "--fetch", "stream"]) == 0
    shutil.rmtree(here / "cache")
    hub.log.clear()
    capsys.readouterr()
    return here


def check(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = execute(["plan", "r.yaml", "--check", "out/x", "--json", *words])
    return code, json.loads(capsys.readouterr().out)


def test_nothing_has_moved(hub: Hub, locked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(capsys) == (0, {"lock": "out/x/recipe.lock.yaml", "stale": False, "changes": [], "notes": []})
    # The beginnings of the six shards, where their headers are, and no weight kept.
    assert hub.sent("/objects/") <= 6 * 65536 < sum(weights(model(seed)) for seed in range(3)) / 3
    assert not any(path.stat().st_size > 50_000 for path in (locked / "cache").rglob("*.safetensors"))


def test_a_branch_that_moved(hub: Hub, locked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Though the weights are what they were: a card may say that they must not be used any more."""
    before = hub.repos["org/math"].refs["main"]
    now = hub.repos["org/math"].put({"README.md": b"new words"})
    code, found = check(capsys)
    assert code == 1
    assert found["changes"] == [{"what": "revision", "place": "math: org/math@main", "locked": before, "now": now}]
    assert execute(["plan", "r.yaml", "--check", "out/x"]) == 1
    assert f"revision  math: org/math@main  {before} -> {now}" in capsys.readouterr().out


def test_a_commit_does_not_move(hub: Hub, locked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (locked / "r.yaml").read_text()
    commit = hub.repos["org/math"].refs["main"]
    (locked / "r.yaml").write_text(text.replace("math: org/math", f"math: org/math@{commit}"))
    hub.repos["org/math"].put({"README.md": b"new words"})
    assert check(capsys)[0] == 0
    other = hub.repos["org/math"].put({"README.md": b"newer words"})
    (locked / "r.yaml").write_text(text.replace("math: org/math", f"math: org/math@{other}"))
    code, found = check(capsys)
    assert code == 1 and [c["now"] for c in found["changes"] if c["what"] == "revision"] == [other]


def test_offline_takes_the_commits_of_the_lock(hub: Hub, locked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repos["org/math"].put({"README.md": b"new words"})
    code, found = check(capsys, "--offline")
    assert code == 0 and hub.log == []
    assert len(found["notes"]) == 2 and "`base`, `math`, `code` not in the Hub's cache" in found["notes"][1]
    text = (locked / "r.yaml").read_text()
    (locked / "r.yaml").write_text(text.replace("weight: 0.8", "weight: 0.9"))
    code, found = check(capsys, "--offline")
    assert code == 1 and [c["place"] for c in found["changes"]] == ["steps.m.of.code.weight"]


def test_offline_with_a_cache(hub: Hub, locked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that downloads fills it, at commits that `main` has left since."""
    assert execute(["run", "r.yaml", "--out", "out/y"]) == 0
    hub.repos["org/math"].put({"README.md": b"new words"})
    capsys.readouterr()
    hub.log.clear()
    code, found = check(capsys, "--offline")
    assert code == 0 and hub.log == [] and len(found["notes"]) == 1
    # The lock of a run that read whole files has other digests of them, and is as good.
    assert execute(["plan", "r.yaml", "--check", "out/y", "--offline"]) == 0
    assert execute(["plan", "r.yaml", "--check", "out/y"]) == 1


def test_a_hub_that_does_not_answer_is_no_answer(hub: Hub, locked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan does with what the cache has then; whether a branch has moved is not known from there."""
    assert execute(["run", "r.yaml", "--out", "out/y"]) == 0
    assert execute(["plan", "r.yaml", "--check", "out/y"]) == 0
    hub.faults.append(Fault("/api/models/org/math/revision/main", status=503))
    hub.faults.append(Fault("/api/models/org/math\\?", status=503))
    capsys.readouterr()
    assert execute(["plan", "r.yaml", "--check", "out/y"]) == 4
    assert "503" in capsys.readouterr().err


def test_a_model_that_is_gone(hub: Hub, locked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del hub.repos["org/math"], hub.repos["org/code"]
    assert execute(["plan", "r.yaml", "--check", "out/x"]) == 4
    err = capsys.readouterr().err
    assert "`org/math`" in err and "`org/code`" in err and "r.yaml:2:" in err
