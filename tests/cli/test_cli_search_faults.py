"""`merge search` among scores that touch what they were given, and files in the study's folder that are not its own."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_process import Ran
from safetensors.numpy import load_file, save_file

Merge = Callable[..., Ran]
RECIPE = """\
version: 1
models: {a: ./a, b: ./b}
steps: {m: {use: interpolate, of: [a, b], with: {t: {x: {choice: [0.25, 0.5]}, y: {choice: [0.25, 0.75]}}}}}
save: {to: out/best}
score: {command: "PYTHON score.py {model}", goal: min}
"""
# The sum of what it finds; then it does to the folder what the word says.
SCORE = """\
import os, pathlib, shutil, sys
from safetensors.numpy import load_file
folder = pathlib.Path(sys.argv[1])
file = folder / "model.safetensors"
print(sum(float(tensor.sum()) for tensor in load_file(file).values()))
before = file.stat()
extra = sorted(path.name for path in folder.rglob("*") if path.name.startswith("cache"))
assert not extra, extra
match pathlib.Path("how").read_text():
    case "nothing":
        pass
    case "bytes, time set back":
        with file.open("r+b") as opened:
            opened.seek(-8, 2)
            opened.write(b"\\0\\0\\x80?" * 2)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    case "cut":
        os.truncate(file, before.st_size - 4)
    case "removed":
        file.unlink()
    case "folder removed":
        shutil.rmtree(folder)
    case "replaced":
        new = folder / "new"
        new.write_bytes(b"x" * before.st_size)
        new.replace(file)
    case "moved, and a link left":
        shutil.rmtree("kept", ignore_errors=True)
        folder.rename("kept")
        folder.symlink_to(pathlib.Path("kept").absolute())
    case "file moved, and a link left":
        file.rename("kept.safetensors")
        file.symlink_to(pathlib.Path("kept.safetensors").absolute())
    case "linked":
        pathlib.Path("kept.safetensors").unlink(missing_ok=True)
        os.link(file, "kept.safetensors")
    case "a file in its place":
        shutil.rmtree(folder)
        folder.write_text("x")
    case "more files":
        (folder / "cache").mkdir()
        (folder / "cache" / "cache.json").write_text("{}")
        (folder / "cache.json").write_text("{}")
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / name).mkdir()
        tensors = {key: rng.standard_normal(40).astype("float32") for key in "xy"}
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "score.py").write_text(SCORE, encoding="utf-8")
    (tmp_path / "how").write_text("nothing", encoding="utf-8")
    (tmp_path / "r.yaml").write_text(RECIPE.replace("PYTHON", sys.executable), encoding="utf-8")
    return tmp_path


def by_hand(values: dict[str, float]) -> float:
    """The score of a filling."""
    a, b = (load_file(f"{name}/model.safetensors") for name in "ab")
    t = {key: next(value for path, value in values.items() if path.endswith(f".{key}")) for key in "xy"}
    return sum(float(((1 - t[key]) * a[key] + t[key] * b[key]).sum()) for key in "xy")


HOWS = [part.split('"')[1] for part in SCORE.splitlines() if part.strip().startswith("case")]


@pytest.mark.parametrize("how", HOWS)
def test_a_score_that_touches_the_model_does_not_reach_the_next_trial(here: Path, merge: Merge, how: str) -> None:
    (here / "how").write_text(how, encoding="utf-8")
    ran = merge("search", "r.yaml", "--sampler", "grid", "--json")
    assert ran.code == 0, ran.err
    assert len(ran.json["trials"]) == 4
    for trial in ran.json["trials"]:
        assert trial["state"] == "done", trial["why"]
        assert trial["scores"]["score"] == pytest.approx(by_hand(trial["values"]), abs=1e-4)
    if how == "linked":  # it holds the trial that it was made from, whatever came later
        kept = load_file("kept.safetensors")
        last = ran.json["trials"][-1]
        assert sum(float(t.sum()) for t in kept.values()) == pytest.approx(last["scores"]["score"], abs=1e-4)
    assert not (here / "r.search/work").exists()


@pytest.mark.parametrize("kind", ["garbage", "another program", "another study", "a folder", "a pipe"])
def test_a_study_that_is_none_is_refused_and_left_as_it_is(here: Path, merge: Merge, kind: str) -> None:
    folder = here / "r.search"
    folder.mkdir()
    file = folder / "study.db"
    if kind == "garbage":
        file.write_bytes(os.urandom(5000))
    elif kind == "another program":
        with sqlite3.connect(file) as opened:
            opened.execute("create table people (name text)")
            opened.execute("insert into people values ('kept')")
        opened.close()
    elif kind == "another study":
        import optuna

        made = optuna.create_study(storage=f"sqlite:///{file}", study_name="merge")
        made.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    elif kind == "a folder":
        file.mkdir()
    else:
        os.mkfifo(file)
    before = file.read_bytes() if file.is_file() else None
    ran = merge("search", "r.yaml", "--trials", "2")
    assert ran.code == (2 if kind == "another study" else 5), ran.err
    assert "study.db" in ran.err and "--out" in ran.err
    assert (file.read_bytes() if file.is_file() else None) == before
    assert not (here / "out").exists() and not list(folder.glob("work/*"))


def test_a_damaged_study_is_told_while_it_is_used(here: Path, merge: Merge) -> None:
    assert merge("search", "r.yaml", "--trials", "2").code == 0
    file = here / "r.search" / "study.db"
    data = bytearray(file.read_bytes())
    for start in range(4096, len(data), 4096):  # all pages but the list of tables
        data[start : start + 64] = b"\xff" * 64
    file.write_bytes(data)
    ran = merge("search", "r.yaml", "--trials", "4")
    assert ran.code == 5 and "study.db" in ran.err and "hint" in ran.err, ran.err


def test_scores_that_are_none_are_passed_over(here: Path, merge: Merge) -> None:
    assert merge("search", "r.yaml", "--sampler", "grid").code == 0
    book = here / "r.search" / "scores.jsonl"
    lines = book.read_bytes().splitlines()
    entry = json.loads(lines[0])
    hostile: list[bytes] = [
        b"", b"{", b"[" * 100_000, b"\xff\xfe", b"null", b"1e999", b'{"merged": [], "score": {}, "value": 1}',
        *(json.dumps({**entry, "value": value}).encode() for value in (None, True, "1", [1.0], float("nan"))),
        lines[0][:-9],
    ]  # fmt: skip
    book.write_bytes(b"\n".join(hostile))  # the last without an end, as after a crash
    (here / "r.search" / "study.db").unlink()
    ran = merge("search", "r.yaml", "--sampler", "grid", "--json")
    assert ran.code == 0, ran.err
    for trial in ran.json["trials"]:
        assert trial["scores"]["score"] == pytest.approx(by_hand(trial["values"]), abs=1e-4)
    assert len([line for line in book.read_bytes().splitlines() if b'"value"' in line]) >= 4


def test_secrets_of_the_command_are_in_nothing_that_is_shown_or_kept(
    here: Path, merge: Merge, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "hf_AbCdEfGhIjKlMnOpQrStUv"
    script = "import sys; print('denied for', sys.argv[2], file=sys.stderr); sys.exit(3)"
    (here / "fails.py").write_text(script, encoding="utf-8")
    words = ["--score", f"{sys.executable} fails.py {{model}} {token}", "--goal", "max"]
    for more in ([], ["--json"]):
        ran = merge("search", "r.yaml", *words, *more)
        assert ran.code == 5 and "denied for ***" in ran.err + ran.out
        assert token not in ran.err + ran.out
    for path in (here / "r.search").rglob("*"):
        # What the command itself said is its own.
        assert path.is_dir() or path.parent.name == "logs" or token.encode() not in path.read_bytes(), path
    (here / "works.py").write_text("print(1)", encoding="utf-8")
    words[1] = f"{sys.executable} works.py {{model}} {token}"
    assert merge("search", "r.yaml", "--out", "other", *words, "--trials", "1").code == 0
    assert all(token.encode() not in path.read_bytes() for path in (here / "other").rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "name",
    ["a?b=c&d#e.yaml", "100%25 %00.yaml", "{model} {x}.yaml", "naïve 東京 'q\" $HOME;.yaml", "-r.yaml", "a:b.yaml"],
)
def test_recipes_of_any_name_have_a_study_of_their_own(here: Path, merge: Merge, name: str) -> None:
    (here / name).write_text((here / "r.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    ran = merge("search", "--trials", "2", "--", name)
    assert ran.code == 0, ran.err
    folder = here / f"{name.removesuffix('.yaml')}.search"
    assert (folder / "study.db").is_file() and (folder / "best.yaml").is_file()
    assert {path.name for path in here.iterdir()} == {"a", "b", "score.py", "how", "r.yaml", name, folder.name}
    assert merge("search", "--trials", "3", "--", name).out.count("done") == 1


def test_places_that_are_no_folder_and_more_jobs_than_trials(here: Path, merge: Merge) -> None:
    (here / "file").write_text("x", encoding="utf-8")
    for place in ("file", "file/below"):
        ran = merge("search", "r.yaml", "--trials", "2", "--out", place)
        assert ran.code == 5 and "file" in ran.err and "hint" in ran.err, ran.err
    (here / "real").mkdir()
    (here / "link").symlink_to("real")
    ran = merge("search", "r.yaml", "--trials", "2", "--jobs", "9", "--out", "link", "--json")
    assert ran.code == 0 and len(ran.json["trials"]) == 2
    assert (here / "real" / "best.yaml").is_file()


def test_trials_of_a_process_that_is_gone_are_cleared_and_those_of_others_are_not(here: Path, merge: Merge) -> None:
    from mergekit_lite.evaluate.worker import me

    for name, owner in (("gone", {**me(), "pid": 2**22 + 1}), ("here", me()), ("elsewhere", {**me(), "host": "other"})):
        place = here / "r.search" / "work" / name / "job-0" / "model"
        place.mkdir(parents=True)
        (place.parents[1] / "owner.json").write_text(json.dumps(owner), encoding="utf-8")
    strange = here / "r.search" / "work" / "strange"
    strange.mkdir()
    (strange / "owner.json").write_text("[" * 100_000, encoding="utf-8")
    assert merge("search", "r.yaml", "--trials", "1").code == 0
    assert sorted(path.name for path in (here / "r.search" / "work").iterdir()) == ["elsewhere", "here", "strange"]


def test_a_command_that_prints_strange_things_has_failed(here: Path, merge: Merge) -> None:
    for text in ("'[' * 100000", "'1' + '0' * 400", "'\\x1b[31mred'", "'\\x00'"):
        (here / "strange.py").write_text(f"print({text})", encoding="utf-8")
        words = ["--score", f"{sys.executable} strange.py {{model}}", "--goal", "max"]
        ran = merge("search", "r.yaml", *words, "--trials", "1", "--out", f"out-{abs(hash(text))}")
        assert ran.code == 5 and "no trial has a score" in ran.err, ran.err
        assert "\x1b[31m" not in ran.err and "\x00" not in ran.err
